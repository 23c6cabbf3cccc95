"The variables of a shell, and the systems that a run meets"

import subprocess
import sys

import pytest
from torch import nn

from mednext_v2.core import Resources
from mednext_v2.training.recipe import get_recipe


@pytest.fixture
def engine():
    "Makes an engine for a small network"

    def make(precision="fp32", **options):
        from mednext_v2.training.engine import make_engine

        recipe = get_recipe("smoke", precision=precision, grad_accum_steps=2)
        return make_engine(recipe, nn.Conv3d(1, 1, 1), Resources(**{"device": "cpu"} | options))

    return make


@pytest.mark.parametrize(
    "name, value",
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4"),
        ("MIXED_PRECISION", "bf16"),
        ("MIXED_PRECISION", "fp8"),
        ("DYNAMO_BACKEND", "inductor"),
        ("TORCH_DEVICE", "cuda:1"),
        ("USE_FSDP", "true"),
        ("USE_DEEPSPEED", "True"),
        ("USE_MEGATRON_LM", "true"),
        ("USE_PARALLELISM_CONFIG", "true"),
        ("USE_SAGEMAKER", "1"),
    ],
)
def test_a_variable_against_the_recipe_is_refused_by_name(name, value, engine, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=rf"^ACCELERATE_{name}={value.lower()} in the environment contradicts .* unset it") as error:
        engine()
    assert "\n" not in str(error.value)


def test_the_cpu_is_not_taken_for_a_gpu_unasked(monkeypatch):
    from mednext_v2.training.engine import check_environment

    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    check_environment(get_recipe("smoke"), cpu=True, parallel="ddp")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=yes"):
        check_environment(get_recipe("smoke"), cpu=False, parallel="ddp")


@pytest.mark.parametrize("precision, words", [("fp32", "no"), ("bf16", "bf16")])
@pytest.mark.parametrize("steps", ["1", "2"])
def test_variables_that_agree_change_nothing(precision, words, steps, engine, monkeypatch):
    "`accelerate launch` sets some where it was told nothing; two parts are what the recipe has"
    values = dict(GRADIENT_ACCUMULATION_STEPS=steps, MIXED_PRECISION=words, DYNAMO_BACKEND="NO", USE_CPU="1", TORCH_DEVICE="cpu", USE_FSDP="false")
    for name, value in values.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    made = engine(precision)
    assert made.gradient_accumulation_steps == 1 and made.mixed_precision == words
    assert made.device.type == "cpu" and made.state.dynamo_plugin.backend == "NO"


WITHOUT = """
import os, signal, sys, faulthandler
import psutil, torch, torch.distributed.run, monai.inferers, monai.networks.nets, accelerate  # Which have their own ways on each system
for module in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[module] = None
for place, names in {
    os: "O_NOFOLLOW O_DIRECTORY O_CLOEXEC sched_getaffinity getuid geteuid getpgid killpg fork statvfs fchmod getloadavg",
    signal: "SIGKILL SIGUSR1 SIGUSR2 SIGHUP SIGQUIT SIGCHLD SIGALRM",
    faulthandler: "register",
}.items():
    for name in names.split():
        if hasattr(place, name):
            delattr(place, name)
"""

TOY = """
import importlib, pathlib, pkgutil
import mednext_v2
for module in pkgutil.iter_modules(mednext_v2.__path__):
    importlib.import_module("mednext_v2." + module.name)
from mednext_v2.models.registry import create
from mednext_v2.core import FolderKind, atomic_folder, peak_bytes, write_json
from mednext_v2.inference.windows import sliding_window
from mednext_v2.training.recipe import get_recipe
from mednext_v2.core import Resources
from mednext_v2.training.monitor import Display
from mednext_v2.training.trainer import fit

class Toy:
    "Steps of noise"
    def __getitem__(self, step):
        draw = torch.Generator().manual_seed(step)
        image = torch.randn(2, 1, 32, 32, 32, generator=draw)
        return image, (image > 0).long()

torch.set_num_threads(1)
model = create("mednext_v2_tiny", 1, 2, True)
folder = pathlib.Path(sys.argv[1])
recipe, quiet = get_recipe("smoke", steps=2, checkpoint_every=1), Display(progress=False, log_every=1)
history = fit(recipe, model, Toy(), folder / "run", resources=Resources("cpu"), display=quiet)
assert len(history) == 2 and history.loss.notna().all(), history
assert (folder / "run" / "last.pt").is_file()
scores = sliding_window(model.eval(), torch.randn(1, 40, 33, 32), (32, 32, 32))
assert scores.shape[-3:] == (40, 33, 32)
for number in range(2):  # A folder that is there is replaced
    with atomic_folder(folder / "made", FolderKind("number", ("number.json",))) as temporary:
        write_json(temporary / "number.json", number)
assert (folder / "made" / "number.json").read_text() == "1\\n" and peak_bytes() > 0
left = [str(path) for path in folder.rglob(".tmp-*")]
assert not left, left
"""


def test_two_steps_and_a_prediction_where_names_of_posix_are_missing(tmp_path):
    "As on Windows: they are taken away before the library is imported"
    command = [sys.executable, "-c", WITHOUT + TOY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


LISTING = """
import sys
import torch
from mednext_v2.data.augment import patch_loader

NAMES = ("accelerate dvc seaborn SimpleITK IPython mlflow tensorboard transformers nnunetv2 mednext_v2.training.trainer mednext_v2.models.registry "
         "mednext_v2.network.mednext mednext_v2.inference.predictor mednext_v2.study.runs mednext_v2.training.launch mednext_v2.training.run "
         "mednext_v2.cli").split()

class Listing:
    "Which of the names the process that makes a batch has imported"
    def __getitem__(self, step):
        return torch.tensor([name in sys.modules for name in NAMES]), torch.tensor([__name__ == "__mp_main__"])

if __name__ == "__main__":
    import mednext_v2.training.trainer  # As where one trains
    found, spawned = next(patch_loader(Listing(), 0, 1, workers=1, method="spawn"))
    assert spawned.item() and "mednext_v2.training.trainer" in sys.modules
    print([name for name, there in zip(NAMES, found.tolist()) if there])
"""


def test_a_spawned_worker_imports_what_patches_need(tmp_path):
    "Each starts from nothing on macOS and Windows: no trainer, no networks, no engine"
    script = tmp_path / "train.py"
    script.write_text(LISTING)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
