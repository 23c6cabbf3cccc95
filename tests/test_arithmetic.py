"The pins of the pipeline: what a machine or a shell prefers does not change a bit of a training"

import os
import subprocess
import sys

import pytest

from mednext_v2.study import arithmetic
from mednext_v2.study.arithmetic import PINS, describe_machine, pin_arithmetic, unpinned_because

# Trained in a process of its own, as a stage is; prints a hash of the weights and a few other numbers that libraries compute
TRAINING = """
import hashlib, sys
import numpy as np, torch
from mednext_v2.models.registry import create
from mednext_v2.training.checkpoint import weights_digest
from mednext_v2.training.losses import deep_supervision_loss

torch.manual_seed(0)
model = create(sys.argv[1], 1, 3, True, **{"width": 4} if "mednext" in sys.argv[1] else {"filters": (4, 8, 16)}).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
image, label = torch.randn(2, 1, 32, 32, 16), torch.randint(0, 3, (2, 1, 32, 32, 16))
for _ in range(3):
    deep_supervision_loss(model(image), label).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
    optimizer.step()
    optimizer.zero_grad()
values = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
others = [np.exp(values), values @ values, values.sum(axis=0)]
print(weights_digest(model), hashlib.sha256(b"".join(part.tobytes() for part in others)).hexdigest()[:16])
"""
STARTER = """
import subprocess, sys
from mednext_v2.study.arithmetic import pin_arithmetic
pin_arithmetic()
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""
OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
}
pinnable = pytest.mark.skipif(bool(unpinned_because({})), reason="an x86-64 processor with AVX2 alone can be pinned")


def train(backbone: str, pinned: bool, **environment: str) -> str:
    "What `TRAINING` prints on a machine that prefers other instructions"
    started = [sys.executable, *(["-c", STARTER] if pinned else []), "-c", TRAINING, backbone]
    kept = {name: value for name, value in os.environ.items() if name not in {*PINS, "FAST"}}
    done = subprocess.run(started, env={**kept, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pinnable
@pytest.mark.parametrize("backbone", ["mednext_v2_tiny", "unet"])
def test_a_pinned_training_is_the_same_under_other_capabilities_and_an_unpinned_one_is_not(backbone):
    pinned = {train(backbone, True), train(backbone, True, **OLD), train(backbone, True, OMP_NUM_THREADS="2", PYTHONHASHSEED="7")}
    assert len(pinned) == 1, pinned
    assert train(backbone, False, **OLD) not in pinned, "the simulated machine computes as the pins do: this test shows nothing"


def test_fast_and_other_processors_run_unpinned_and_say_so(monkeypatch, capsys):
    monkeypatch.setenv("FAST", "1")
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert not pin_arithmetic() and os.environ["MKL_CBWR"] == "AVX2"
    assert "not pinned (FAST is set)" in capsys.readouterr().err
    monkeypatch.delenv("FAST")
    monkeypatch.setattr(arithmetic.platform, "machine", lambda: "arm64")
    assert not pin_arithmetic() and "the processor is arm64, not x86-64" in capsys.readouterr().err
    monkeypatch.setattr(arithmetic.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(arithmetic, "cpu_facts", lambda: {"flags": "sse4_2 avx"})
    assert not pin_arithmetic() and "the processor has no AVX2" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "fast"), [("1", True), ("yes", True), ("True", True), ("", False), ("0", False), ("no", False), ("FALSE", False)])
def test_fast_is_yes_or_no(value, fast):
    assert (unpinned_because({"FAST": value}) == "FAST is set") == fast


@pytest.mark.parametrize("value", ["2", "maybe", "-"])
def test_fast_that_is_neither_is_refused(value):
    with pytest.raises(ValueError, match=f"FAST is '{value}': say 1, yes or true"):
        unpinned_because({"FAST": value})


def test_speed_is_that_of_the_best_try(monkeypatch):
    """Of tries that another program slows down, the fastest counts."""
    import torch

    clock, product, calls = iter(range(10**6)), torch.mm, []
    monkeypatch.setattr(arithmetic.time, "perf_counter", lambda: next(clock) / 1000)
    monkeypatch.setattr(torch, "mm", lambda a, b: (calls.append(1), product(a[:1, :1], b[:1, :1]))[1])
    found = describe_machine(0.095)["gflops"]  # Nine products in ten steps of the clock, ten times
    assert found == round(2 * 512**3 * 9 / 0.010 / 1e9, 1) and len(calls) == 90


def test_the_machine_is_described():
    found = describe_machine(0.05)
    assert list(found) == ["processor", "instructions", "cores", "gflops"] and found["gflops"] > 0


@pinnable
def test_a_stage_runs_pinned(tmp_path):
    """The kernel of a stage's notebook sees the pins whatever the shell has set."""
    import nbformat

    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    lines = "import os\nfrom mednext_v2.study.arithmetic import PINS\nassert {name: os.environ.get(name) for name in PINS} == PINS"
    book.cells = [nbformat.v4.new_code_cell("case = ''", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(lines)]
    nbformat.write(book, tmp_path / "stage.ipynb")
    command = [sys.executable, "-m", "mednext_v2.stages", "run", str(tmp_path / "stage.ipynb"), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, **OLD, "PYTHONHASHSEED": "3"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
