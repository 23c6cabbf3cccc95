"What a process loads for each public name and each command: nobody waits for a package that is not used"

import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from mednext_v2.core import EXTRAS, MissingExtra, require_extra
from mednext_v2.models.card import Card, save_model
from mednext_v2.models.registry import create
from mednext_v2.public import HOMES
from model_toys import UNET_CARD

ROOT = Path(__file__).parents[1]

WATCHED = "accelerate blosc2 dvc fsspec hydra joblib matplotlib monai nibabel numpy pandas psutil scipy sklearn torch triton".split()
# Of the module that each public name comes from. MONAI, Accelerate, Blosc and fsspec are loaded by a training when it starts, never here
NETWORK, TABLE, SCANS = "numpy torch", "numpy pandas", "nibabel numpy pandas scipy"
LOADS = {
    "core": "",
    "network.grn": NETWORK,
    "network.blocks": NETWORK,
    "network.mednext": NETWORK,
    "network.scaling": NETWORK,
    "models.card": "numpy pandas torch",
    "models.registry": "numpy pandas torch",
    "models.transfer": "numpy pandas torch",
    "data.datasets": SCANS,
    "data.preprocess": SCANS,
    "data.augment": "numpy pandas torch",
    "training.losses": NETWORK,
    "training.recipe": "numpy pandas torch",
    "training.monitor": f"{SCANS} torch",
    "training.trainer": f"{SCANS} torch",
    "training.run": "numpy pandas torch",
    "inference.windows": "numpy scipy torch",
    "inference.predictor": f"{SCANS} torch",
    "inference.files": f"{SCANS} torch",
    "evaluation.metrics": SCANS,
    "evaluation.statistics": "numpy pandas scipy",
    "zoo.importers": "numpy pandas torch",
    "zoo.catalogue": TABLE,
    "factory": NETWORK,
    "finetuning": f"{SCANS} torch",
    "integrations.hub": "numpy pandas torch",
    "integrations.dicom": f"{SCANS} torch",
}
LATE = set("accelerate blosc2 dvc fsspec hydra joblib matplotlib monai psutil sklearn triton".split())  # Of no name, one that is not in the table included
IMPORT_EACH = """
import os, sys
from importlib import import_module
watched, first, *homes = sys.argv[1:]
if first:
    import_module(first)
for home in homes:
    sys.stdout.flush()
    if not os.fork():  # Each module in a process that has loaded no other
        import_module(f"mednext_v2.{home}")
        print(home, *(name for name in watched.split() if name in sys.modules), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, home
"""


def loaded(homes, first=""):
    command = [sys.executable, "-c", IMPORT_EACH, " ".join(WATCHED), first, *homes]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return {home: set(rest) for home, *rest in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="needs fork")
def test_each_public_name_loads_what_it_needs():
    needs_torch = {home for home in HOMES if "torch" in LOADS.get(home, "torch").split()}
    found = {**loaded(sorted(HOMES.keys() - needs_torch)), **loaded(sorted(needs_torch), first="torch")}
    assert {home: found[home] for home in LOADS} == {home: set(names.split()) for home, names in LOADS.items()}
    assert not {home: late for home in HOMES if (late := found[home] & LATE)}


def test_recipes_scores_and_plans_know_names_without_monai():
    modules = "training.recipe training.checkpoint evaluation.cases scoring.evaluate scoring.ablations study.runs report.tables".split()
    lines = [f"import mednext_v2.{module}" for module in modules]
    code = "; ".join(["import sys", *lines, "sys.exit(', '.join({'monai', 'accelerate', 'blosc2', 'fsspec', 'triton'} & set(sys.modules)) or 0)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


HELP_EACH = """
import contextlib, io, sys
from mednext_v2 import cli
for verb in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main([*verb.split("/"), "--help"])
    assert "usage: mednextv2 " in out.getvalue(), verb
    assert not (found := set(sys.argv[1].split()) & set(sys.modules)), (verb, found)
"""


def test_help_of_each_command_loads_nothing():
    from mednext_v2 import cli

    verbs = cli.parser()._subparsers._group_actions[0].choices
    done = subprocess.run([sys.executable, "-c", HELP_EACH, " ".join(WATCHED), *verbs], capture_output=True, text=True, timeout=120)
    assert len(verbs) > 12 and done.returncode == 0, done.stderr


def test_creating_a_model_costs_little_more_than_torch():
    "Modules beyond those of torch itself: seconds vary with the machine, files that are read do not"
    code = "import sys, torch; n = len(sys.modules); from mednext_v2 import create_model; print(n, len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    torch_alone, both = map(int, done.stdout.split())
    assert both < 1.15 * torch_alone


# ---- Extras

WITHOUT = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None  # As if it were not installed
from mednext_v2 import cli
cli.main(sys.argv[2:])
"""


def run_without(names, *arguments):
    command = [sys.executable, "-c", WITHOUT, names, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_extras_are_those_of_the_settings():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = {extra: settings["DEFAULT"][f"{extra}_requirements"] for extra in EXTRAS}
    as_module = {"pillow": "PIL", "hydra_core": "hydra", "ipykernel": None}
    for extra, words in wanted.items():
        names = [re.split("[><=!;]", word)[0].replace("-", "_") for word in words.split()]
        assert {as_module.get(name, name) for name in names} - {None} == set(EXTRAS[extra].split()), extra
    core = settings["DEFAULT"]["requirements"]
    assert not [word for word in wanted["train"].split() if word in core.split()]
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert all(f'"{name.removesuffix("_requirements")}"' in text for name in settings["DEFAULT"] if name.endswith("_requirements"))


def test_an_extra_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(EXTRAS, "train", "monai no_such_package")
    with pytest.raises(MissingExtra, match=r"^training needs no_such_package: pip install 'mednext_v2\[train\]'"):
        require_extra("train", "training")


def test_prediction_and_scores_need_no_extra(tmp_path):
    torch.manual_seed(0)
    settings = {"width": 4}
    model, out = create("mednext_v2_tiny", 1, 3, **settings), tmp_path / "predictions"
    save_model(tmp_path / "model", model, Card(**UNET_CARD | dict(backbone="mednext_v2_tiny", overrides=settings, patch=(32, 32, 32))))
    for folder, voxels in (("images", np.random.default_rng(0).normal(size=(36, 34, 32))), ("truths", np.ones((36, 34, 32)))):
        (tmp_path / folder).mkdir()
        image = nibabel.Nifti1Image(voxels.astype(np.float32 if folder == "images" else np.uint8), np.diag([2, 2, 2, 1]))
        nibabel.save(image, tmp_path / folder / f"a{'_0000' if folder == 'images' else ''}.nii.gz")
    extras = " ".join([*EXTRAS.values(), "huggingface_hub", "pydicom", "SimpleITK"])
    done = run_without(extras, "predict", "-m", tmp_path / "model", "-i", tmp_path / "images", "-o", out)
    assert done.returncode == 0 and [path.name for path in out.glob("*.nii.gz")] == ["a.nii.gz"], done.stderr
    (tmp_path / "truths" / "dataset.json").write_text(
        '{"channel_names": {"0": "MR"}, "labels": {"background": 0, "core": 1, "rim": 2}, "numTraining": 1, "file_ending": ".nii.gz"}'
    )
    done = run_without(extras, "evaluate", out, tmp_path / "truths")
    assert done.returncode == 0 and "core" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("train data model", "train"),
        ("finetune -d data -o out", "train"),
        ("finetune -d data -o out --html", "review"),
        ("evaluate predictions truths --html", "review"),
        ("plan", "pipeline"),
    ],
)
def test_commands_ask_for_their_extra_before_anything_else(line, extra, monkeypatch, capsys):
    from mednext_v2 import cli

    monkeypatch.setitem(EXTRAS, extra, "no_such_package")
    with pytest.raises(SystemExit, match=rf"needs no_such_package: pip install 'mednext_v2\[{extra}\]'"):
        cli.main(line.split())


def test_no_extra_replaces_the_pytorch_that_is_there():
    "timm asks for torchvision, and each release of torchvision for one of torch"
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    kept = {name: value for name, value in settings["DEFAULT"].items() if name.endswith("_requirements") and name != "nnunet_requirements"}  # nnU-Net itself
    words = " ".join(kept.values()).split()
    assert not {"timm", "torchvision", "torchaudio", "dynamic_network_architectures", "nnunetv2"} & {re.split("[><=!;]", word)[0] for word in words}


# ---- Help, JSON, completion


def test_help_lists_each_command_once_under_what_one_wants_to_do(capsys):
    from mednext_v2 import cli

    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    verbs = cli.parser()._subparsers._group_actions[0].choices
    assert all(len(re.findall(rf"^  {verb}( |$)", said, flags=re.M)) == 1 for verb in verbs)
    titles = [line.rstrip(":") for line in said.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[: len(cli.SECTIONS)] == list(cli.SECTIONS)


@pytest.mark.parametrize(
    ("line", "key"),
    [("datasets --json", "datasets"), ("zoo list --json", "models"), ("info --patch 32 --json", "networks"), ("datasets amos --json", "dataset")],
)
def test_answers_as_json(line, key, capsys):
    from mednext_v2 import cli

    cli.main(line.split())
    answer = json.loads(capsys.readouterr().out)
    assert answer["command"] == line.partition(" --")[0].removesuffix(" amos") and len(answer[key]) > 1


def test_errors_as_json_and_as_a_line(tmp_path, capsys):
    from mednext_v2 import cli

    with pytest.raises(SystemExit, match="^mednextv2: "):
        cli.main(["doctor", "--data", str(tmp_path / "none"), "--json"])
    assert "none" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell, capsys):
    from mednext_v2 import cli

    cli.main(["completion", shell])
    script = capsys.readouterr().out
    assert "finetune" in script and "--save-probabilities" in script
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, text=True, capture_output=True).returncode == 0
