"""Training in several processes: torchrun starts this file, whose `main` trains, and the tests compare

Gloo on the CPU. In float64 the sums of several processes and of one differ by rounding alone, so that
comparison shows whether the gradient is the same, and not how far a training amplifies rounding. Three
processes, since two would hide sums that are made in another order after a resume: a + b = b + a."""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import mednext_v2
from mednext_v2.data.augment import PatchSampler
from mednext_v2.network.scaling import build_mednext
from mednext_v2.training.validation import PatchValidation, patch_validation
from training_toys import fit, toy_cases, toy_recipe

SLOW = 300  # Seconds that a start may take on a crowded machine
PROCESSES = 3


# ---------------------------------------------------------------------------------------------- the runs


class Patches(PatchSampler):
    "Patches in the precision wanted, of a run that is slow, fails, or is told to end at a step"

    dtype, pause, fail_at, tell_at = torch.float32, 0.0, None, None

    def batch(self, step):
        time.sleep(self.pause)
        if step == self.fail_at:
            raise RuntimeError("a fault of the test's")
        if step == self.tell_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        image, label = super().batch(step)
        return image.to(self.dtype), label

    __getitem__ = batch


def toy_mednext(dtype=torch.float32) -> torch.nn.Module:
    "Three levels; a buffer, since DDP treats networks that have one in another way"
    torch.manual_seed(0)
    model = build_mednext("tiny", 1, 3, deep_supervision=True, width=4, depths=(1,) * 3, ratios=(2,) * 3)
    model.register_buffer("marker", torch.ones(3))
    return model.to(dtype)


def train(folder: Path, dtype="float32", parallel="ddp", patches=None, seed=0, options=None, **changes) -> dict:
    "One run; what it leaves behind, as whole weights and history"
    settings = dict(steps=5, batch_size=6, lr=3e-3, warmup=2, checkpoint_every=2, validate_every=4, max_grad_norm=1.0)
    recipe = toy_recipe(**settings | changes)
    dtype, cases = getattr(torch, dtype), toy_cases()
    sampler = Patches(cases, "train", recipe.patch, recipe.batch_size, recipe.foreground, recipe.augment, seed)
    vars(sampler).update(patches or {}, dtype=dtype)
    fixed = patch_validation(recipe, cases, batches=4)  # Not a multiple of three
    validate = PatchValidation([(image.to(dtype), label) for image, label in fixed.batches])
    model = toy_mednext(dtype)
    history = fit(recipe, model, sampler, folder, validate=validate, device="cpu", progress=False, log_every=1, parallel=parallel, **options or {})
    return {"model": model.state_dict(), "history": history.to_dict("list")}


def main() -> None:
    "Every run that the command line describes, one after the other; the first process writes what came out"
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("runs")  # JSON: name to the arguments of `train`
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found, rank = {}, int(os.environ["RANK"])
    for name, options in json.loads(arguments.runs).items():
        folder = arguments.out / options.pop("folder", name)
        fails, damage = options.pop("fails", False), options.pop("damage", False)
        if options.pop("strangers", False):
            options["seed"] = rank
        try:
            found[name] = train(folder, **options)
        except (RuntimeError, ValueError, SystemExit) as error:
            if not fails:
                raise
            found[name] = f"{type(error).__name__} {getattr(error, 'code', '')}: {error}"
        if damage:
            if rank == 0:
                os.truncate(folder / "last.pt", 1000)
            torch.distributed.barrier()
        if rank == 0:
            torch.save(found, arguments.out / "found.pt")


# ------------------------------------------------------------------------------------------------ starts


def start(out: Path, **runs: dict) -> subprocess.Popen:
    "torchrun with this file"
    folders = (Path(__file__).resolve().parent, Path(mednext_v2.__file__).resolve().parents[1])
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    line = [*torchrun, f"{PROCESSES}", __file__, str(out), json.dumps(runs)]
    with open(out / "log.txt", "w") as log:  # A file: a pipe that nobody empties would stop the ranks
        return subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait_for(condition, process: subprocess.Popen, out: Path) -> None:
    "Until it holds; an error that shows the log if the processes end before, or take too long"
    end = time.monotonic() + SLOW
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            code = process.wait()
            raise AssertionError(f"exit code {code}\n{(out / 'log.txt').read_text()[-4000:]}")
        time.sleep(0.02)


def read(out: Path) -> dict:
    "What the runs left behind"
    return torch.load(out / "found.pt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    "Whether weights and curves are equal bit for bit"
    columns = [zip(values, b["history"][name], strict=True) for name, values in a["history"].items()]
    curves = all(x == y or math.isnan(x) and math.isnan(y) for pairs in columns for x, y in pairs)
    return curves and all(torch.equal(a["model"][k], v) for k, v in b["model"].items())


def furthest(a: dict, b: dict) -> tuple[float, float]:
    "Largest difference of a weight, and of a loss"
    weights = max((a["model"][k] - v).abs().max().item() for k, v in b["model"].items())
    return weights, max(abs(x - y) for x, y in zip(a["history"]["loss"], b["history"]["loss"], strict=True))


KINDS = {  # What any number of processes must train alike, in float64
    "batch dice, average": dict(ema=0.9),
    "sample dice, parts": dict(grad_accum_steps=2, batch_dice=False, present_only=True),
    "present only, sgd": dict(present_only=True, foreground=0.2, optimizer="sgd", lr=1e-3, augment="none"),
}
PAIRS = [("ddp", kind) for kind in KINDS] + [("fsdp", kind) for kind in list(KINDS)[:2]]
STRATEGIES = ("ddp", "fsdp")
LONG = dict(steps=14, batch_size=3, checkpoint_every=2, validate_every=7)  # The run that is killed


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    "All runs in one start: what they left, folder, log, and how it ended when a rank of the last was killed"
    out = tmp_path_factory.mktemp("several")
    runs = {f"{s} {k}": dict(KINDS[k], dtype="float64", parallel=s) for s, k in PAIRS}
    for s in STRATEGIES:
        runs[f"{s} float32"] = dict(parallel=s)
        runs[f"{s} bf16"] = dict(parallel=s, precision="bf16", options=dict(pictures=1))
        runs[f"{s} failed"] = dict(parallel=s, folder=f"{s} resumed", fails=True, patches=dict(fail_at=4))
        runs[f"{s} failed"]["damage"] = s == "ddp"
        runs[f"{s} resumed"] = dict(parallel=s)
    runs["told"] = dict(folder="told resumed", fails=True, patches=dict(tell_at=2))
    runs["told resumed"] = dict()
    runs["odd"] = dict(fails=True, batch_size=5)
    runs["few"] = dict(fails=True, batch_size=6, grad_accum_steps=3)
    runs["strangers"] = dict(fails=True, strangers=True)
    process = start(out, **runs, killed=dict(LONG, patches=dict(pause=0.3)))
    wait_for((out / "killed" / "previous.pt").exists, process, out)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "RANK" in p.environ()]
    begin = time.monotonic()
    next(p for p in ranks if p.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
    process.wait(SLOW)
    alive = [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    end = dict(seconds=time.monotonic() - begin, code=process.returncode, alive=alive)
    return read(out), out, (out / "log.txt").read_text(), end


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "The same in this process"
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("one")
    found = {kind: train(out / kind, dtype="float64", **changes) for kind, changes in KINDS.items()}
    return found | {"float32": train(out / "float32"), "bf16": train(out / "bf16", precision="bf16")}


# ---------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize(("strategy", "kind"), PAIRS)
def test_several_processes_train_as_one(one, several, strategy, kind):
    found, wanted = several[0][f"{strategy} {kind}"], one[kind]
    weights, losses = furthest(found, wanted)
    assert weights < 1e-10 and losses < 1e-10
    assert found["history"]["lr"] == wanted["history"]["lr"]
    begin = toy_mednext(torch.float64).state_dict()
    assert max((wanted["model"][k] - v).abs().max().item() for k, v in begin.items()) > 1e-4  # It did train


@pytest.mark.parametrize(("strategy", "kind"), PAIRS)
def test_validation_counts_every_patch_once(one, several, strategy, kind):
    # Four batches for three processes: two of them have nothing to do in the second round
    curves = [run["history"]["val_dice"] for run in (several[0][f"{strategy} {kind}"], one[kind])]
    found, wanted = ([dice for dice in curve if not math.isnan(dice)] for curve in curves)
    assert found == pytest.approx(wanted, abs=1e-12) and len(wanted) == 2 and min(wanted) > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_curve_in_float32(one, several, strategy):
    weights, losses = furthest(several[0][f"{strategy} float32"], one["float32"])
    assert losses < 1e-5 and weights < 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_is_half_precision(one, several, strategy):
    found = several[0][f"{strategy} bf16"]
    _, rounding = furthest(several[0][f"{strategy} float32"], found)
    assert 1e-6 < rounding < 0.02 and furthest(one["bf16"], found)[1] < 0.02
    assert len(list((several[1] / f"{strategy} bf16" / "pictures").iterdir())) == 2


# ------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_failed_run_goes_on_as_if_it_had_not(several, strategy):
    found, out, log, _ = several
    assert "a fault of the test's" in found[f"{strategy} failed"]
    assert same(found[f"{strategy} resumed"], found[f"{strategy} float32"])
    # The last one under DDP was damaged: the first process sets it aside, all go on from the one before
    assert (out / f"{strategy} resumed" / "last.damaged").exists() == (strategy == "ddp")
    assert log.count("last.pt is damaged") == 1


def test_process_that_is_told_to_end_takes_the_others_along(several):
    found = several[0]
    assert re.match("Preempted 75: .* at step 3: saved", found["told"])
    assert same(found["told resumed"], found["ddp float32"])


def test_killed_rank_ends_the_run(several):
    _, _, log, end = several
    assert end["seconds"] < 30 and end["code"] not in (0, None) and not end["alive"]
    assert re.search(r"rank\s*: 1 [^[]*exitcode\s*: -9", log)


def test_killed_run_goes_on_bit_for_bit(several):
    out = several[1]
    assert 4 <= torch.load(out / "killed" / "last.pt", weights_only=True)["progress"]["step"] < 14
    process = start(out, killed=LONG, whole=LONG)
    wait_for(lambda: process.poll() == 0, process, out)
    found = read(out)
    assert found["killed"]["history"]["step"] == list(range(1, 15)) and same(found["killed"], found["whole"])


# ------------------------------------------------------------------------------------------------ bad input


def test_batches_that_cannot_be_dealt_out(several):
    found = several[0]
    assert re.match("ValueError : recipe: batch_size 5 must be divisible by 3", found["odd"])
    few = "ValueError : recipe: batch_size 6 must be divisible by 9, processes x grad_accum_steps = 3 x 3"
    assert found["few"] == few


def test_processes_that_are_about_to_train_different_runs(several):
    assert re.match("ValueError : process 1 is about to train another run.*data is", several[0]["strangers"])


if __name__ == "__main__":
    main()
