"""What a training step of each backbone of the study costs, at equal FLOPs, alone and beside a second training.

    python benchmarks/budget.py          # both, about five minutes
    python benchmarks/budget.py table    # the table, from benchmarks/results/budget.json

A step is what the pipeline does in one: two patches of the task brain_lesion_mr are read, augmented and put through the network with a head at
every level, then loss, gradient and AdamW. Times are wall seconds, one thread a process, the median over repeats that alternate between the
backbones. `beside` is measured while a second process does the same, as in `make repro` on two cores. `BENCH_REPEATS=2` makes a short run.
"""

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from data import SHORT, child, heading, measure_parts, results_file, row, run_script

RESULTS = results_file("budget")
REPEATS = int(os.environ.get("BENCH_REPEATS", 2 if SHORT else 7))
PARTS = ("alone", "beside")


def child_steps(folder: str, repeats: int) -> dict:
    "`seconds` of each repeat, by backbone"
    import torch

    from mednext_v2.data.augment import PatchSampler
    from mednext_v2.data.preprocess import Prepared
    from mednext_v2.models.registry import create
    from mednext_v2.study.budget import FAMILIES, PATCH, scale_to_budget
    from mednext_v2.training.losses import deep_supervision_loss

    torch.set_num_threads(1)
    prepared, made = Prepared(folder), {}
    sampler = PatchSampler(prepared, "train", PATCH, 2, 0.5, "light")
    for name, family in FAMILIES.items():
        network = create(name, 1, 6, True, patch=PATCH, **scale_to_budget(family).overrides)
        made[name] = network, torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    seconds = {name: [] for name in made}
    for step in range(repeats + 1):
        for name, (network, optimizer) in made.items():
            begin = time.perf_counter()
            image, label = sampler.batch(step)[:2]
            loss = deep_supervision_loss(network(image), label)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - begin)
    return {"seconds": {name: values[1:] for name, values in seconds.items()}}  # The first warms up


def measure(part: str) -> dict:
    "Median seconds of a step, by backbone"
    from mednext_v2.data.preprocess import prepare_all
    from mednext_v2.study.seeds import build_dataset

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build_dataset("brain_lesion_mr", None, folder / "raw", (2, 1, 1))
        prepare_all(("brain_lesion_mr",), folder / "raw", folder / "prepared")
        arguments = {"folder": str(folder / "prepared/brain_lesion_mr"), "repeats": REPEATS}
        with ThreadPoolExecutor() as pool:  # Each waits for a process
            running = [pool.submit(child, "steps", __file__, **arguments) for _ in range(1 + (part == "beside"))]
        found = [one.result()["seconds"] for one in running]
    together = {name: [value for one in found for value in one[name]] for name in found[0]}
    return {name: {"step": round(median(values), 4), "repeats": [round(value, 4) for value in values]} for name, values in together.items()}


def table(results: dict) -> str:
    "Seconds of a step by backbone, as Markdown"
    lines = heading("seconds of a step of two patches", *results)
    for name in results[next(iter(results))]["result"]:
        lines.append(row(name, *(f"{part['result'][name]['step']:.3f}" for part in results.values())))
    return "\n".join(lines)


if __name__ == "__main__":
    run_script({"steps": child_steps}, lambda asked: measure_parts(RESULTS, PARTS, measure, asked, table))
