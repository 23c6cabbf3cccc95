"""Training in several processes: torchrun starts this file, whose `main` trains; the tests compare what comes out

Gloo on the CPU. In float64 the sums of several processes and of one differ by rounding alone, so the comparison shows
whether the gradient is the same, not how far a training amplifies rounding."""

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
from mednext_v2.augment import PatchSampler
from mednext_v2.scaling import create_model
from mednext_v2.trainer import PatchValidation, fit, patch_validation
from training_toys import toy_cases, toy_recipe

SLOW = 180  # Seconds that a start may take on a crowded machine


# ---------------------------------------------------------------------------------------------- the runs


class Patches(PatchSampler):
    "Patches in the precision wanted, and a run that can be made to fail, or to be slow, at a step"

    dtype, fail_at, pause = torch.float32, None, 0.0

    def batch(self, step):
        if step == self.fail_at:
            raise RuntimeError("a fault of the test's")
        time.sleep(self.pause)
        image, label = super().batch(step)
        return image.to(self.dtype), label

    __getitem__ = batch


def toy_mednext(dtype=torch.float32) -> torch.nn.Module:
    "Two levels; a buffer, since DDP treats networks that have one in another way"
    torch.manual_seed(0)
    model = create_model(
        "tiny", 1, 3, deep_supervision=True, width=4, depths=(1,) * 3, ratios=(2,) * 3
    ).to(dtype)
    model.register_buffer("marker", torch.ones(3, dtype=dtype))
    return model


def train(folder: Path, dtype="float32", parallel="ddp", validation=3, fail_at=None, pause=0.0, options=None, **changes):
    "One run; what it leaves behind, as whole weights and history"
    settings = dict(steps=6, batch=6, lr=3e-3, warmup=2, checkpoint_every=2, validate_every=3, clip=1.0)
    recipe = toy_recipe(**settings | changes)
    dtype, cases = getattr(torch, dtype), toy_cases()
    sampler = Patches(cases, "train", recipe.patch, recipe.batch, recipe.foreground, recipe.augment)
    sampler.dtype, sampler.fail_at, sampler.pause = dtype, fail_at, pause
    fixed = patch_validation(recipe, cases, batches=validation)
    validate = PatchValidation([(image.to(dtype), label) for image, label in fixed.batches])
    model = toy_mednext(dtype)
    history = fit(
        recipe, model, sampler, folder, validate=validate, device="cpu", progress=False, log_every=1,
        parallel=parallel, **options or {},
    )
    return {"model": model.state_dict(), "history": history.to_dict("list")}


def main() -> None:
    "Every run that the command line describes, one after the other; the first process writes what came out"
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("runs")  # JSON: name to the arguments of `train`
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, options in json.loads(arguments.runs).items():
        try:
            begin = time.monotonic()
            found[name] = train(arguments.out / options.pop("folder", name), **options)
            print("TIME", name, round(time.monotonic() - begin, 1), flush=True)
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, arguments.out / "found.pt")


# ------------------------------------------------------------------------------------------------ starts


def start(out: Path, processes: int, **runs: dict) -> subprocess.Popen:
    "torchrun with this file"
    here = Path(__file__).resolve()
    path = os.pathsep.join(filter(None, (str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{processes}", str(here)]
    with open(out / "log.txt", "w") as log:  # A file: a pipe that nobody empties would stop the ranks
        return subprocess.Popen(
            [sys.executable, *line, str(out), json.dumps(runs)], env=environment, stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(out: Path, process: subprocess.Popen) -> tuple[dict, str]:
    "What the runs left behind, and the log, once they have ended well"
    try:
        code = process.wait(SLOW)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        code = f"none within {SLOW} s"
    log = (out / "log.txt").read_text()
    assert code == 0, f"exit code {code}\n{log[-3000:]}"
    return torch.load(out / "found.pt", weights_only=True), log


def rank_process(process: subprocess.Popen, rank: int) -> psutil.Process:
    "The process of a rank"
    children = psutil.Process(process.pid).children(recursive=True)
    return next(c for c in children if c.environ().get("RANK") == str(rank))


def wait_for(path: Path, process: subprocess.Popen) -> None:
    "Until a file is there"
    end = time.monotonic() + SLOW
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, (path.parents[1] / "log.txt").read_text()[-3000:]
        time.sleep(0.02)


def same(a: dict, b: dict) -> bool:
    "Whether weights and curves are equal bit for bit"
    curves = all(x == y or math.isnan(x) and math.isnan(y) for c in a["history"]
                 for x, y in zip(a["history"][c], b["history"][c], strict=True))
    return curves and a["model"].keys() == b["model"].keys() and all(
        torch.equal(v, b["model"][k]) for k, v in a["model"].items()
    )


def furthest(a: dict, b: dict) -> tuple[float, float]:
    "Largest difference of a weight, and of a loss"
    weights = max((v - b["model"][k]).abs().max().item() for k, v in a["model"].items())
    return weights, max(abs(x - y) for x, y in zip(a["history"]["loss"], b["history"]["loss"], strict=True))


# ---------------------------------------------------------------------------------------------- equality

KINDS = {  # What every number of processes must train alike
    "batch_dice": dict(),
    "sample_dice": dict(batch_dice=False, present_only=True),
    "present_only": dict(present_only=True, foreground=0.2),
    "sgd": dict(optimizer="sgd", augment="none"),
    "accumulate": dict(batch=8, accumulate=2),
    "ema": dict(ema=0.9),
}
STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "All kinds in two processes, in one start, both strategies by turns"
    out = tmp_path_factory.mktemp("two")
    runs = {f"{s} {k}": dict(changes, dtype="float64", parallel=s) for k, changes in KINDS.items() for s in STRATEGIES}
    runs |= {f"{s} float32": dict(parallel=s) for s in STRATEGIES}
    runs |= {f"{s} bf16": dict(parallel=s, precision="bf16", options=dict(pictures=1)) for s in STRATEGIES}
    for s in STRATEGIES:
        runs[f"{s} failed"] = dict(parallel=s, folder=f"{s} resumed", fail_at=5)
        runs[f"{s} resumed"] = dict(parallel=s)
    runs["odd"] = dict(batch=5)
    runs["few"] = dict(batch=4, accumulate=4)
    return finish(out, start(out, 2, **runs))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "The same in this process"
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("one")
    found = {kind: train(out / kind, dtype="float64", **changes) for kind, changes in KINDS.items()}
    return found | {"float32": train(out / "float32"), "bf16": train(out / "bf16", precision="bf16")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(one, two, strategy, kind):
    found, wanted = two[0][f"{strategy} {kind}"], one[kind]
    assert not isinstance(found, str), found
    weights, losses = furthest(found, wanted)
    assert weights < 1e-10 and losses < 1e-10
    start = toy_mednext(torch.float64).state_dict()
    assert max((v - start[k]).abs().max().item() for k, v in wanted["model"].items()) > 1e-4  # They did train
    assert found["history"]["lr"] == wanted["history"]["lr"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_curve_in_float32(one, two, strategy):
    weights, losses = furthest(two[0][f"{strategy} float32"], one["float32"])
    assert losses < 1e-5 and weights < 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_is_half_precision(one, two, strategy):
    _, losses = furthest(two[0][f"{strategy} bf16"], one["bf16"])
    _, rounding = furthest(one["float32"], one["bf16"])
    assert 0 < rounding < 0.1 and losses < 0.1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_counts_every_patch_once(one, two, strategy):
    # Three batches for two processes: one of them has nothing to do in the last round
    for kind in KINDS:
        found, wanted = two[0][f"{strategy} {kind}"]["history"]["val_dice"], one[kind]["history"]["val_dice"]
        assert [x for x in found if x == x] == pytest.approx([x for x in wanted if x == x], abs=1e-12), kind
        assert sum(x == x for x in wanted) == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_failed_run_goes_on_as_if_it_had_not(two, strategy):
    found, _ = two
    assert "a fault of the test's" in found[f"{strategy} failed"]
    assert same(found[f"{strategy} resumed"], found[f"{strategy} float32"])


def test_batches_that_cannot_be_dealt_out(two):
    found, _ = two
    assert re.match("ValueError: .*5 patches cannot be dealt out to 2 processes", found["odd"])
    assert re.match(r"ValueError: .*\b4\b.*accumulate", found["few"]) and "\n" not in found["few"]


def test_nothing_to_worry_about_in_the_log(two):
    _, log = two
    noise = ("OMP_NUM_THREADS", "socket", "[W")
    lines = [line for line in log.splitlines() if "Warning" in line and not any(word in line for word in noise)]
    assert not lines


# ------------------------------------------------------------------------------------------------- faults


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "Three processes, one of which is killed after a checkpoint: folder, seconds to the end, exit code, log"
    # Two would hide it if sums were made in another order after a resume: a + b = b + a
    out = tmp_path_factory.mktemp("three")
    process = start(out, 3, killed=dict(steps=40, pause=0.2))
    wait_for(out / "killed" / "previous.pt", process)
    ranks = [rank_process(process, rank) for rank in range(3)]
    begin = time.monotonic()
    ranks[1].send_signal(signal.SIGKILL)
    process.wait(60)
    gone = all(not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE for rank in ranks)
    return out, time.monotonic() - begin, process.returncode, gone, (out / "log.txt").read_text()


def test_killed_rank_ends_the_run(killed):
    out, seconds, code, gone, log = killed
    assert seconds < 30 and code != 0 and gone
    assert "SIGKILL" in log and re.search(r"rank\s*: 1 ", log)
    assert not (out / "found.pt").exists()


def test_killed_run_goes_on_bit_for_bit(killed):
    out = killed[0]
    state = torch.load(out / "killed" / "last.pt", weights_only=True)
    assert 0 < state["progress"]["step"] < 40
    found, _ = finish(out, start(out, 3, killed=dict(steps=40), whole=dict(steps=40)))
    assert len(found["killed"]["history"]["loss"]) == 40
    assert same(found["killed"], found["whole"])


if __name__ == "__main__":
    main()
