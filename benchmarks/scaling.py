"""How the cost of a training step, a forward pass and a preparation grows: with patch, width, depth, classes, batch, threads and cases.

    python benchmarks/scaling.py              # all of it, about ten minutes
    python benchmarks/scaling.py width        # an axis
    python benchmarks/scaling.py table        # the table, from benchmarks/results/scaling.json

One axis at a time, around MedNeXt-v2 Tiny of width 8 on a patch of 32³, in the fused form, with its loss. Each axis is a process of its own,
in which the values take turns; seconds are of a core, those of the axis of threads of the clock. Memory is that of the tensors of a
step alive at once. The exponent is the slope of a line through the logarithms. `BENCH_REPEATS=1` makes a short run.
"""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from data import child, heading, measure_parts, row, run_script, spread
from nnunet_peer import peak_mib

RESULTS = Path(__file__).resolve().parent / "results" / "scaling.json"
REPEATS = int(os.environ.get("BENCH_REPEATS", 5))
AROUND = {"side": 32, "width": 8, "depth": 1, "classes": 4, "batch": 1, "threads": 1}
AXES = {  # What it is, and its values
    "side": ("side of the patch, voxels", [32, 48, 64, 80, 96]),
    "width": ("width, channels", [4, 8, 16, 32, 64]),
    "depth": ("blocks a level", [1, 2, 4, 8]),
    "classes": ("classes", [4, 8, 16, 32, 64, 128]),
    "batch": ("patches a step", [1, 2, 4, 8]),
    "threads": ("threads", [1, 2]),
    "cases": ("cases that are prepared", [8, 16, 32, 64]),
}


def step_of(**values):
    "A training step and a forward pass of these sizes, as functions"
    import torch

    from mednext_v2.network.scaling import build_mednext
    from mednext_v2.training.losses import deep_supervision_loss

    patch, batch, classes = [values["side"]] * 3, values["batch"], values["classes"]
    torch.manual_seed(0)
    model = build_mednext("tiny", 1, classes, deep_supervision=True, width=values["width"], depths=(values["depth"],) * 9)
    image, label = torch.randn(batch, 1, *patch), torch.randint(classes, (batch, 1, *patch))

    def step():
        model.train().zero_grad()
        deep_supervision_loss(model(image), label).backward()

    def infer():
        with torch.inference_mode():
            model.eval()(image)

    return step, infer


def child_axis(axis: str) -> dict:
    "Seconds of each value, and its memory; the first round warms up and is left out"
    import torch

    from mednext_v2.network.scaling import MemoryMeter

    sizes = [AROUND | {axis: value} for value in AXES[axis][1]]
    made = [step_of(**size) for size in sizes]
    clock = time.perf_counter if axis == "threads" else time.process_time
    found = [{"step": [], "infer": []} for _ in sizes]
    for repeat in range(REPEATS + 1):
        for size, functions, one in zip(sizes, made, found):
            torch.set_num_threads(size["threads"])
            for kind, function in zip(("step", "infer"), functions):
                begin = clock()
                function()
                one[kind] += [clock() - begin] * (repeat > 0)
    for (step, _), one in zip(made, found):
        with MemoryMeter() as meter:
            step()
        one["alive_mib"] = meter.peak / 2**20
    return {"values": AXES[axis][1], "found": found}


def child_cases(count: int) -> dict:
    "A preparation of so many cases by one process"
    from mednext_v2.data.datasets import get_dataset
    from mednext_v2.data.preprocess import prepare
    from mednext_v2.study.seeds import build_dataset

    with tempfile.TemporaryDirectory(prefix="mednext-") as work:
        build_dataset("liver_lesion_ct", None, work, (count - 2, 1, 1))
        before, begin = peak_mib(), time.process_time()
        prepare(get_dataset("liver_lesion_ct"), work, Path(work) / "prepared")
        return {"seconds": time.process_time() - begin, "before_mib": before, "peak_mib": peak_mib()}


CHILDREN = {"axis": child_axis, "cases": child_cases}


def measure(axis: str) -> dict:
    "All values of an axis"
    if axis != "cases":
        return child("axis", __file__, axis=axis)
    rounds = [[child("cases", __file__, count=count) for count in AXES[axis][1]] for _ in range(min(REPEATS, 3))]
    found = [{"prepare": [one["seconds"] for one in same], "alive_mib": same[0]["peak_mib"]} for same in zip(*rounds)]
    return {"values": AXES[axis][1], "found": found}


def table(results: dict) -> str:
    "The cost of each value, and how it grows"
    from mednext_v2.report.speed import exponent

    lines = heading("axis", "values", "what", "cost of each value", "exponent")
    for axis, entry in results.items():
        values, found = entry["result"]["values"], entry["result"]["found"]
        for kind in found[0]:
            memory = kind == "alive_mib"
            costs = [one[kind] if memory else spread(one[kind])["median"] for one in found]
            what = "memory, MiB" if memory else {"step": "a step, s", "infer": "a forward pass, s", "prepare": "preparation, s"}[kind]
            shown = ", ".join(f"{cost:.0f}" if memory else f"{cost:.3g}" for cost in costs)
            lines.append(row(AXES[axis][0], ", ".join(map(str, values)), what, shown, f"{exponent(values, costs):.2f}"))
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(CHILDREN, lambda asked: measure_parts(RESULTS, AXES, measure, asked, table))
