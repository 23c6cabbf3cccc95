"Scripts as a user writes them, run from top to bottom on toy data"

import contextlib
import io
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from mednext_v2.data.preprocess import prepare
from mednext_v2.data.scans import write_volume
from model_toys import declare_torchvision
from test_training_sets import CHEST, scan, write_raw

SCRIPTS = Path(__file__).parent / "scripts"
NEEDS = {  # What a script reads is written by these
    "make_network": (),
    "train": (),
    "fine_tune": ("train",),
    "predict_folder": ("fine_tune",),
    "compare_models": ("predict_folder",),
    "monai_loop": (),
    "lightning_loop": (),
}


def write_test_cases(folder: Path, cases: int = 2) -> None:
    "Scans and labels, named as in nnU-Net"
    for number in range(cases):
        image, places = scan(77 + number)
        label = np.zeros(image.shape, np.uint8)
        for name, value in CHEST.labels.items():
            label[places[name]] = value
        case = "held" if number == 0 else f"held{number}"
        for place, voxels in ((f"scans/{case}_0000", image), (f"labels/{case}", label)):
            write_volume(folder / f"{place}.nii.gz", voxels, np.eye(4))
        raw = folder / "raw" / CHEST.folder
        for place, voxels in ((f"imagesTs/{case}_0000", image), (f"labelsTs/{case}", label)):
            write_volume(raw / f"{place}.nii.gz", voxels, np.eye(4))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Runs a script, and before it those it needs, in a folder with toy data; gives what it prints"
    folder, printed = tmp_path_factory.mktemp("user"), {}
    write_raw(CHEST, folder / "raw")
    write_test_cases(folder)
    prepare(CHEST, folder / "raw", folder / "prepared")

    def run_script(name: str) -> str:
        for earlier in NEEDS[name]:
            run_script(earlier)
        if name not in printed:
            with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as text:
                runpy.run_path(str(SCRIPTS / f"{name}.py"))
            printed[name] = text.getvalue()
        return printed[name]

    torch.set_num_threads(1)
    declare_torchvision()
    run_script.folder = folder
    return run_script


def test_every_script_is_run():
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_a_script_imports_from_the_top(name):
    assert "mednext_v2." not in (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name, said", [
    ("make_network", "parameters, "),
    ("train", "for spleen, liver: (1, 3, 32, 32, 32)"),
    ("fine_tune", "spleen"),
    ("predict_folder", "(20, 20, 20)"),
    ("compare_models", "surface dice"),
    ("monai_loop", "MetaTensor (1, 3, 20, 20, 20)"),
    ("lightning_loop", "10 steps"),
])  # fmt: skip
def test_a_script_runs(run, name, said):
    assert said in run(name)


def test_scripts_leave_what_they_promise(run):
    run("compare_models")
    made = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    assert {"models/trained/card.json", "finetuned/scores.csv", "predictions/trained/held.nii.gz", "predictions/ensemble/held1.nii.gz"} <= made
    assert os.stat(run.folder / "predictions/finetuned/held.nii.gz").st_size > 0
