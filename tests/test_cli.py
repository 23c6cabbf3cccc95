"The answers of commands as JSON, and what else every command shares"

import json
import math
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from hub_toys import Hub
from mednext_v2 import cli
from mednext_v2.data.datasets import write_description
from mednext_v2.models.registry import create
from model_toys import save_unet
from test_training_sets import CHEST, write_raw

FACTS = {"labels": {"liver": 1, "spleen": 2}, "spacing": [1.0] * 3, "patch": [32] * 3, "normalisation": {"schemes": ["zscore"], "nonzero": False}}
ENTRY = {"title": "Toy", "file": "toy.zip", "licence": "MIT", "non_commercial": "no", "layout": "plain", "modality": "CT", "source": "made up"}
RAW = f"raw/{CHEST.folder}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    "Raw data, a scan, a model folder, a checkpoint of another program, and a registry of one model that can be fetched"
    folder = tmp_path_factory.mktemp("work")
    write_raw(CHEST, folder / "raw")
    for part, tail in (("images", "_0000"), ("labels", "")):  # One of the three cases is for testing
        (folder / RAW / f"{part}Ts").mkdir()
        (folder / RAW / f"{part}Tr/chest_0{tail}.nii.gz").rename(folder / RAW / f"{part}Ts/chest_0{tail}.nii.gz")
    write_description(CHEST, folder / RAW, 2)
    (folder / RAW / "splits_final.json").write_text('[{"train": ["chest_1"], "val": ["chest_2"]}]')
    save_unet(folder / "model", licence="MIT")
    torch.manual_seed(0)
    torch.save(create("mednext_v2_tiny", 1, 3, width=4).state_dict(), folder / "theirs.pth")
    (folder / "facts.json").write_text(json.dumps(FACTS))
    with zipfile.ZipFile(folder / "toy.zip", "w") as archive:
        archive.writestr("toy/weights.pth", b"numbers" * 10)
    entry = ENTRY | {"url": f"{folder.as_uri()}/{{file}}", "where": "https://example.org/toy"}
    (folder / "zoo.yaml").write_text(json.dumps({"toy": entry}))
    values = np.random.default_rng(0).normal(size=(20, 18, 16)).astype("float32")
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0])), folder / "scan.nii.gz")
    return folder


@pytest.fixture
def desk(workplace, tmp_path, monkeypatch):
    "A copy of it, as the working directory, with a hub of its own"
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    for name, value in {"HF_TOKEN": "hf_toy", "HF_HUB_CACHE": str(tmp_path / "hub"), "MEDNEXT_V2_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield tmp_path


def answer_of(line: str, read) -> dict:
    "What a command prints, which is one JSON document; JSON has no NaN"
    cli.main([*line.split(), "--json"])
    return json.loads(read().out, parse_constant=pytest.fail)


WRITERS = {  # Command line, some of its values, and the paths whose sizes are told
    f"convert --dataset raw {RAW} out --skip chest_1": (dict(dataset="raw", cases=2, skipped=["chest_1"], splits={"val": 1, "test": 1}, notes={}), {"folder"}),
    f"prepare {RAW} out --spacing 1 1 1": (
        dict(cases=3, folder="out", spacing=[1.0] * 3, labels=CHEST.labels, splits={"train": 1, "val": 1, "test": 1}),
        {"folder"},
    ),
    "import theirs.pth out --facts facts.json --licence MIT": (
        dict(model="out", backbone="mednext_v2_tiny", overrides={"width": 4}, licence="MIT", in_channels=1, labels=FACTS["labels"], unused=[], unset=[]),
        {"model"},
    ),
    "push model clinic/toy": (dict(sent=True, repository="clinic/toy", files=["card.json", "model.safetensors", "README.md"]), set()),
    "push model clinic/toy --show": (dict(sent=False, repository="clinic/toy", files=["card.json", "model.safetensors", "README.md"]), set()),
    "export model out": (
        dict(format="onnx", file="out/model.onnx", labels={"core": 1, "rim": 2}, outputs=3, sides={"multiples_of": [4] * 3}),
        {"folder", "file"},
    ),
    "bundle model out": (dict(folder="out", configs=["evaluate", "finetune", "inference", "metadata", "train"]), {"folder"}),
    "zoo fetch toy --zoo zoo.yaml": (dict(name="toy", licence="MIT", non_commercial="no"), {"folder"}),
    "predict -m model -i scan.nii.gz -o out.nii.gz --device cpu": (dict(), set()),
    f"doctor --data {RAW} --fix out": (dict(clean=True, cases=3, copy="out", actions=[]), {"copy"}),
    "datasets amos": (dict(), set()),
    "info theirs.pth": (dict(backbone="mednext_v2_tiny", overrides={"width": 4}, in_channels=1, num_classes=3), set()),
    "completion bash": (dict(), set()),
}


@pytest.mark.parametrize("line", WRITERS)
def test_every_command_answers_with_one_json_object(desk, line, capfd):
    if line.startswith("export"):
        pytest.importorskip("onnxruntime")
    expected, measured = WRITERS[line]
    answer = answer_of(line, capfd.readouterr)
    assert line.startswith(answer["command"]) and "message" not in answer and len(answer) > 3
    assert {name: answer[name] for name in expected} == expected
    assert set(answer["sizes"]) == measured
    for name, size in answer["sizes"].items():
        files = [path for path in (Path(answer[name]).rglob("*") if Path(answer[name]).is_dir() else [Path(answer[name])]) if path.is_file()]
        assert size == {"files": len(files), "bytes": sum(path.stat().st_size for path in files)} and files


def test_numbers_and_addresses_of_an_answer_are_true(desk, capfd):
    answer = answer_of("import theirs.pth out --facts facts.json", capfd.readouterr)
    assert answer["parameters"] == sum(value.numel() for value in create("mednext_v2_tiny", 1, 3, width=4).parameters())
    answer = answer_of("push model clinic/toy", capfd.readouterr)
    assert answer["address"].endswith("/clinic/toy") and answer["commit"].startswith(f"{answer['address']}/commit/")
    assert answer_of(f"convert --dataset raw {RAW} out", capfd.readouterr)["folder"] == f"out/{CHEST.folder}"
    assert math.isfinite(max(answer_of("export model onnx", capfd.readouterr)["differences"].values()))


def test_a_check_that_fails_answers_before_its_code(desk, capfd):
    cli.main("zoo fetch toy --zoo zoo.yaml --quiet".split())
    next((desk / "cache").rglob("weights.pth")).write_bytes(b"other")
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        answer_of("zoo verify --zoo zoo.yaml", capfd.readouterr)
    assert ended.value.code == 1 and [row["state"] for row in json.loads(capfd.readouterr().out)["models"]] == ["changed"]


def test_warnings_and_what_others_print_stay_out_of_the_answer(capfd, monkeypatch):
    def command(_):
        print("a note")
        subprocess.run([sys.executable, "-c", "print('from another process')"], check=True)
        warnings.warn("two cases have no label", stacklevel=1)
        return cli.Answer("done", number=1)

    monkeypatch.setattr(cli, "datasets", command)
    with pytest.warns(UserWarning, match="two cases"):  # It is shown, too
        cli.main(["datasets", "--json"])
    said = capfd.readouterr()
    assert json.loads(said.out) == {"command": "datasets", "number": 1, "sizes": {}, "warnings": ["two cases have no label"]}
    assert "a note" in said.err and "from another process" in said.err


def test_an_error_names_the_cases_that_failed(desk, capfd):
    scans = desk / "scans"
    scans.mkdir()
    (scans / "a_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(SystemExit, match="1 of 1 failed"):
        answer_of("predict -m model -i scans -o out --device cpu", capfd.readouterr)
    answer = json.loads(capfd.readouterr().out)
    assert "1 of 1 failed" in answer["error"] and list(answer["failures"]) == ["a"]
