"""What a step, its memory and a forward pass of MedNeXt-v2 cost on a GPU, beside MONAI's MedNeXt with GRN.

    python benchmarks/gpu.py                        # a 128³ patch of the Base network in bf16, about five minutes on an A100
    python benchmarks/gpu.py --side 64 --width 16   # smaller
    python benchmarks/gpu.py --device cpu --side 32 --width 4 --repeats 1 --sides monai plain   # does it run?

Repeats of all sides alternate in one process; every time is taken between two synchronisations. Memory is the allocator's peak
during a step, the weights included. Compiling is timed apart: its share falls with the number of steps. A side that does not fit
or fails is reported, and the others go on.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from block import BASE, network  # noqa: E402
from data import heading, log, machine, row  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
SIDES = {  # Title; then the network of `block.network`, memory format, compiled or not, and what backward recomputes
    "monai": ("MONAI's MedNeXt, GRN", "monai", "contiguous", False, None),
    "plain": ("this project", "plain", "contiguous", False, "none"),
    "last": ("channels last", "plain", "channels_last_3d", False, "none"),
    "compiled": ("compiled", "plain", "contiguous", True, "none"),
    "compiled_last": ("compiled, channels last", "plain", "channels_last_3d", True, "none"),
    "expansion": ("checkpointing expansion", "plain", "contiguous", False, "expansion"),
    "block": ("checkpointing block", "plain", "contiguous", False, "block"),
    "v1": ("v1 (no GRN)", "v1", "contiguous", False, "none"),
}


class Clock:
    "Seconds and peak memory of work on a device"

    def __init__(self, device: str):
        import torch

        self.cuda = torch.cuda if device == "cuda" else None

    def __call__(self, function, *arguments) -> tuple[float, float]:  # Seconds, GiB (NaN on a CPU)
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
            self.cuda.synchronize()
        begin = time.perf_counter()
        function(*arguments)
        if self.cuda:
            self.cuda.synchronize()
        return time.perf_counter() - begin, self.cuda.max_memory_allocated() / 2**30 if self.cuda else float("nan")


def prepared(side: str, case: dict, device: str):
    "A network and its input, on the device and in its memory format"
    import torch

    _, kind, memory_format, compiled, checkpointing = SIDES[side]
    model = network(kind, case).to(device)
    for module in model.modules():
        if checkpointing and hasattr(module, "checkpointing"):
            module.checkpointing = checkpointing
    form = getattr(torch, memory_format if memory_format != "contiguous" else "contiguous_format")
    x = torch.randn(case["batch"], 1, *[case["side"]] * 3).to(device=device, memory_format=form)
    model = model.to(memory_format=form)
    return torch.compile(model) if compiled else model, x


def measure(case: dict, device: str, sides: list[str], repeats: int, precision: str) -> dict:
    "Seconds of steps and passes, peak memory, seconds of the first step, and what went wrong, of each side"
    import torch

    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32
    clock, ready, found = Clock(device), {}, {}

    def cast():
        return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def train(model, x):
        with cast():
            model.train().zero_grad()
            loss = sum(output.float().square().mean() for output in model(x))
        loss.backward()

    def infer(model, x):
        with torch.inference_mode(), cast():
            model.eval()(x)

    for side in sides:
        try:
            ready[side] = prepared(side, case, device)
            first, peak = clock(train, *ready[side])
            clock(infer, *ready[side])
            found[side] = dict(step=[], infer=[], first_step=first, peak_gib=peak)
        except Exception as error:
            ready.pop(side, None)
            found[side] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            log(f"{side}: {found[side]['failed']}")
        if device == "cuda":
            torch.cuda.empty_cache()
    for _ in range(repeats):
        for side, pair in ready.items():
            found[side]["step"].append(clock(train, *pair)[0])
            found[side]["infer"].append(clock(infer, *pair)[0])
    return found


def table(case: dict, found: dict, precision: str) -> str:
    "Milliseconds, GiB, and ratios to MONAI's network"
    name = f"width {case['width']}, {case['side']}³, batch {case['batch']}, {precision}"
    lines, base = heading(name, "step, ms", "/ MONAI's", "forward, ms", "/ MONAI's", "peak, GiB", "first step, s"), found.get("monai", {})
    for side, one in found.items():
        if "failed" in one:
            lines.append(row(SIDES[side][0], one["failed"], "", "", "", "", ""))
            continue
        cells = []
        for kind in ("step", "infer"):
            value = statistics.median(one[kind])
            cells += [f"{1000 * value:.1f}", f"{value / statistics.median(base[kind]):.2f}" if base.get(kind) else "not available"]
        lines.append(row(SIDES[side][0], *cells, f"{one['peak_gib']:.2f}", f"{one['first_step']:.1f}"))
    return "\n".join(lines)


def main() -> None:
    import torch

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options.add_argument("--width", type=int, default=32)
    options.add_argument("--side", type=int, default=128, help="of the cubic patch, voxels")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    options.add_argument("--out", type=Path, default=RESULTS)
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this torch sees no GPU: --device cpu runs the same code, slowly")
    case = {"width": chosen.width, "depths": BASE, "ratios": BASE, "batch": chosen.batch, "side": chosen.side}
    known = machine() | ({"gpu": torch.cuda.get_device_name()} if chosen.device == "cuda" else {})
    found = measure(case, chosen.device, chosen.sides, chosen.repeats, chosen.precision)
    print(table(case, found, chosen.precision))
    chosen.out.write_text(json.dumps({"machine": known, "case": case, "precision": chosen.precision, "result": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
