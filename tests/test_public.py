"What a process loads for each public name and each command: nobody waits for a package that is not used"

import subprocess
import sys

import pytest

from mednext_v2.public import HOMES

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
    "finetuning": f"{SCANS} torch",
    "integrations.hub": "numpy pandas torch",
    "integrations.dicom": f"{SCANS} torch",
}
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
    needs_torch = {home for home, names in LOADS.items() if "torch" in names.split()}
    found = {**loaded([*LOADS.keys() - needs_torch]), **loaded(sorted(needs_torch), first="torch")}
    assert found == {home: set(names.split()) for home, names in LOADS.items()}
    assert LOADS.keys() == HOMES.keys(), "say here what the module of a new public name loads"


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
