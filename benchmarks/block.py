"""What a step, its memory and a forward pass of the fused MedNeXt-v2 cost, beside MONAI's MedNeXt with GRN.

    python benchmarks/block.py              # all of it
    python benchmarks/block.py mini         # a part: mini, width16, width32
    python benchmarks/block.py table        # the tables, from benchmarks/results/block.json

All networks of a part have the same layout and take the same batch. Repeats of all sides alternate in one process, so that a slow
spell of the machine meets all; times are processor seconds of one thread. Memory is what a process of its own adds to its peak
(`VmHWM`) over what it held before the first step. `BENCH_REPEATS=2` makes a short run.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from data import heading, log, machine, row, spread  # noqa: E402
from nnunet_peer import peak_mib  # noqa: E402

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "block.json"
REPEATS = int(os.environ.get("BENCH_REPEATS", 5))
BASE, TINY = (3, 4, 8, 8, 8, 8, 8, 4, 3), (1,) * 9
PARTS = {
    "mini": {"width": 8, "depths": TINY, "ratios": (2,) * 9, "batch": 2, "side": 32},
    "width16": {"width": 16, "depths": BASE, "ratios": BASE, "batch": 1, "side": 64},
    "width32": {"width": 32, "depths": BASE, "ratios": BASE, "batch": 1, "side": 64},
}
SIDES = {
    "monai": "MONAI's MedNeXt, GRN",
    "plain": "this project, plain",
    "fused": "this project, fused",
    "stream": "fused, checkpointing expansion",
    "v1": "v1 (no GRN), plain",
    "v1_fused": "v1 (no GRN), fused",
}


def network(side: str, case: dict):
    "A network with two classes and a head at every level"
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if side == "monai":
        from monai.networks.nets import MedNeXt

        depths, ratios, middle = case["depths"], case["ratios"], len(case["depths"]) // 2
        return MedNeXt(
            init_filters=case["width"],
            in_channels=1,
            out_channels=2,
            encoder_expansion_ratio=ratios[:middle],
            bottleneck_expansion_ratio=ratios[middle],
            decoder_expansion_ratio=ratios[middle + 1 :],
            kernel_size=3,
            deep_supervision=True,
            use_residual_connection=True,
            blocks_down=depths[:middle],
            blocks_bottleneck=depths[middle],
            blocks_up=depths[middle + 1 :],
            global_resp_norm=True,
        )
    from mednext_v2.fused import use_fused
    from mednext_v2.model import Arch, MedNeXt

    arch = Arch(case["width"], case["depths"], case["ratios"], grn=None if side.startswith("v1") else "mean")
    model = MedNeXt(arch, 1, 2, deep_supervision=True, checkpointing="expansion" if side == "stream" else "none")
    return use_fused(model, side in ("fused", "stream", "v1_fused"))


def batch(case: dict):
    "The same numbers for every side"
    import torch

    return torch.randn(case["batch"], 1, *[case["side"]] * 3, generator=torch.Generator().manual_seed(1))


def step(model, x) -> None:
    "Forward and backward; loss and optimizer are the same for all sides, so they are left out"
    model.train().zero_grad()
    sum(output.square().mean() for output in model(x)).backward()


def infer(model, x) -> None:
    import torch

    with torch.inference_mode():
        model.eval()(x)


def child_memory(side: str, part: str) -> dict:
    "MiB that two steps add to the peak"
    model, x = network(side, PARTS[part]), batch(PARTS[part])
    before = peak_mib()
    for _ in range(2):
        step(model, x)
    return {"before_mib": before, "added_mib": peak_mib() - before}


def child_time(part: str) -> dict:
    "Processor seconds of every step and pass; the first of each warms up and is left out"
    models, x = {side: network(side, PARTS[part]) for side in SIDES}, batch(PARTS[part])
    seconds = {kind: {side: [] for side in SIDES} for kind in ("step", "infer")}
    for _ in range(REPEATS + 1):
        for side, model in models.items():
            for kind, function in (("step", step), ("infer", infer)):
                begin = time.process_time()
                function(model, x)
                seconds[kind][side].append(time.process_time() - begin)
    return {kind: {side: values[1:] for side, values in found.items()} for kind, found in seconds.items()}


CHILDREN = {"memory": child_memory, "time": child_time}


def child(name: str, **arguments) -> dict:
    "Runs one of `CHILDREN` in a process of its own"
    command = [sys.executable, __file__, "--child", name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(part: str) -> dict:
    "All sides of a part"
    memory = {side: child("memory", side=side, part=part) for side in SIDES}
    return {"case": PARTS[part], "seconds": child("time", part=part), "memory": memory}


def over(values: list, base: list) -> str:
    "Ratio, repeat by repeat: median, and least to most"
    found = spread([a / b for a, b in zip(values, base)])
    return f"{found['median']:.2f} ({found['least']:.2f}–{found['most']:.2f})"


def table(part: str, result: dict) -> str:
    "Ratios to MONAI's network"
    case, seconds, memory = result["case"], result["seconds"], result["memory"]
    name = f"width {case['width']}, {case['side']}³, batch {case['batch']}"
    lines = heading(name, "step / MONAI's", "forward / MONAI's", "memory of a step, MiB", "memory / MONAI's")
    for side, title in SIDES.items():
        times = [over(seconds[kind][side], seconds[kind]["monai"]) for kind in ("step", "infer")]
        added, base = memory[side]["added_mib"], memory["monai"]["added_mib"]
        lines.append(row(title, *times, f"{added:.0f}", f"{added / base:.2f}"))
    return "\n".join(lines)


def main(parts: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for part in [part for part in parts or PARTS if part != "table"]:
        begin = time.perf_counter()
        known = machine()
        results[part] = {"machine": known, "result": measure(part), "load_after": os.getloadavg()}
        log(f"{part}: {time.perf_counter() - begin:.0f} s")
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(table(part, results[part]["result"]) for part in PARTS if part in results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main(sys.argv[1:])
