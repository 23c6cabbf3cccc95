"""What a step, its memory and a forward pass of MedNeXt-v2 cost on a GPU, beside its peers.

    python benchmarks/gpu.py                        # a 128³ patch of the Base network in bf16, under five minutes on an H100
    python benchmarks/gpu.py --side 64 --width 16   # smaller
    python benchmarks/gpu.py --device cpu --side 32 --width 4 --repeats 1 --sides monai plain   # does it run?

Repeats of all sides alternate in one process; every time is taken between two synchronisations. Memory is the allocator's peak during a
step, with the side's own weights and gradients, beside what `scaling.estimate` says of it. The first step compiles: its share falls with the
number of steps. A side that does not fit or fails is reported, and the others go on. Shares of the machine's peak count the products of three
forward passes for a step, whatever a side computes besides.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from block import BASE, network
from data import heading, log, machine, row

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
SIDES = {  # Title; then the network of `block.network`, memory format, compiled or not, and what backward recomputes
    "monai": ("MONAI's MedNeXt, GRN", "monai", "contiguous", False, None),
    "fused": ("this project, fused", "fused", "channels_last_3d", False, "none"),
    "graphed": ("fused, as a CUDA graph", "fused", "channels_last_3d", False, "none"),
    "plain": ("plain", "plain", "contiguous", False, "none"),
    "last": ("plain, channels last", "plain", "channels_last_3d", False, "none"),
    "compiled": ("plain, compiled", "plain", "contiguous", True, "none"),
    "compiled_last": ("plain, compiled, channels last", "plain", "channels_last_3d", True, "none"),
    "expansion": ("plain, checkpointing expansion", "plain", "contiguous", False, "expansion"),
    "block": ("plain, checkpointing block", "plain", "contiguous", False, "block"),
    "v1": ("v1 (no GRN), plain", "v1", "contiguous", False, "none"),
    "v1_fused": ("v1 (no GRN), fused", "v1_fused", "channels_last_3d", False, "none"),
    "unet": ("nnU-Net's plain U-Net", "unet", "contiguous", False, None),
    "resenc_l": ("nnU-Net's ResEnc-L", "resenc_l", "contiguous", False, None),
}


class Clock:
    "Seconds and peak memory of work on a device"

    def __init__(self, device: str):
        import torch

        self.cuda = torch.cuda if device == "cuda" else None

    def __call__(self, function, *arguments) -> tuple[float, float | None]:  # Seconds, GiB (None on a CPU)
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
            self.cuda.synchronize()
        begin = time.perf_counter()
        function(*arguments)
        if self.cuda:
            self.cuda.synchronize()
        return time.perf_counter() - begin, self.cuda.max_memory_allocated() / 2**30 if self.cuda else None


def peaks(device: str) -> dict:
    "What the device can do: FLOPs a second of a large product in bf16, bytes a second of a large copy"
    import torch

    side, count = (8192, 2**30) if device == "cuda" else (1024, 2**24)
    a, source = torch.randn(side, side, device=device, dtype=torch.bfloat16), torch.ones(count, device=device, dtype=torch.bfloat16)
    clock, target = Clock(device), torch.empty_like(source)
    amounts = {"flops": (2 * side**3, lambda: a @ a), "bytes": (2 * source.nbytes, lambda: target.copy_(source))}
    return {name: amount / min(clock(function)[0] for _ in range(10)) for name, (amount, function) in amounts.items()}


def expected(side: str, case: dict, precision: str) -> dict:
    "FLOPs of a forward pass and, of our own, bytes of a step"
    import torch

    from mednext_v2.network.scaling import count_flops, estimate

    _, kind, _, compiled, grad_checkpointing = SIDES[side]
    patch = (case["side"],) * 3
    with torch.device("meta"):
        model = network(kind, case)
    found = {"flops": case["batch"] * count_flops(model, patch, 1)}
    if grad_checkpointing and not compiled:
        form = "cuda" if kind.endswith("fused") else None
        cost = estimate(model.arch, patch, case["batch"], precision, grad_checkpointing, 1, 2, deep_supervision=True, fused=form)
        found["estimated_gib"] = (cost.total_bytes - cost.optimizer_bytes) / 2**30
    return found


def prepared(side: str, case: dict, device: str):
    "A network and its input, on the device and in its memory format"
    import torch

    _, kind, memory_format, compiled, grad_checkpointing = SIDES[side]
    model = network(kind, case).to(device)
    for module in model.modules():
        if grad_checkpointing and hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = grad_checkpointing
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
        before = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0
        try:
            model, x = prepared(side, case, device)
            first, _ = clock(train, model, x)
            if side == "graphed":
                # Autocast's cache of weights would belong to one step
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
                    model = torch.cuda.make_graphed_callables(model.train(), (x,))
            _, peak = clock(train, model, x)
            clock(infer, model, x)
            ready[side] = model, x
            found[side] = dict(step=[], infer=[], first_step=first, peak_gib=peak and peak - before) | expected(side, case, precision)
        except Exception as error:
            model = x = None
            found[side] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            log(f"{side}: {found[side]['failed']}")
        if device == "cuda":
            torch.cuda.empty_cache()
    for _ in range(repeats):
        for side, pair in ready.items():
            found[side]["step"].append(clock(train, *pair)[0])
            found[side]["infer"].append(clock(infer, *pair)[0])
    return found


def table(case: dict, found: dict, precision: str, limits: dict) -> str:
    "Milliseconds, GiB, and ratios to MONAI's network"
    name = f"width {case['width']}, {case['side']}³, batch {case['batch']}, {precision}"
    base = found.get("monai", {})
    lines = heading(name, "step, ms", "/ MONAI's", "of peak", "forward, ms", "/ MONAI's", "memory, GiB", "estimated", "first step, s")
    for side, one in found.items():
        if "failed" in one:
            lines.append(row(SIDES[side][0], one["failed"], *[""] * 7))
            continue
        cells = []
        for kind in ("step", "infer"):
            value = statistics.median(one[kind])
            cells += [f"{1000 * value:.1f}", f"{value / statistics.median(base[kind]):.2f}" if base.get(kind) else "not available"]
            cells += [f"{3 * one['flops'] / value / limits['flops']:.1%}"] if kind == "step" else []
        estimated = f"{one['estimated_gib']:.2f}" if "estimated_gib" in one else ""
        memory = f"{one['peak_gib']:.2f}" if one["peak_gib"] else "not available"
        lines.append(row(SIDES[side][0], *cells, memory, estimated, f"{one['first_step']:.1f}"))
    return "\n".join(lines)


def main() -> None:
    import torch

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options.add_argument("--width", type=int, default=32)
    options.add_argument("--side", type=int, default=128, help="of the cubic patch, voxels")
    options.add_argument("--batch-size", type=int, default=1)
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    options.add_argument("--out", type=Path, default=RESULTS)
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this torch sees no GPU: --device cpu runs the same code, slowly")
    case = {"width": chosen.width, "depths": BASE, "ratios": BASE, "batch": chosen.batch_size, "side": chosen.side}
    known = machine() | ({"gpu": torch.cuda.get_device_name()} if chosen.device == "cuda" else {})
    limits = peaks(chosen.device)
    found = measure(case, chosen.device, chosen.sides, chosen.repeats, chosen.precision)
    print(table(case, found, chosen.precision, limits))
    kept = {"machine": known, "case": case, "precision": chosen.precision, "peaks": limits, "result": found}
    chosen.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
