"""What a step, its memory and a forward pass of MedNeXt-v2 cost on a CPU, beside its peers.

    python benchmarks/block.py              # all of it, about fifteen minutes
    python benchmarks/block.py mini         # a part: mini, width16, width32
    python benchmarks/block.py table        # the tables, from benchmarks/results/block.json

All networks of a part take the same batch and have a head at every level. MONAI's MedNeXt and this project's are of the same layout;
nnU-Net's two are other networks, of the same channels per level, for scale. Repeats of all sides alternate in one process, so that a slow
spell of the machine meets all; times are processor seconds of one thread, the kernel's among them. Memory is what a process of its own
adds to its peak (`VmHWM`) over what it held before the first step, and, apart, the bytes of tensors that are alive at once. A roofline
needs two peaks, measured in the same process: a large product of matrices, and a copy of a large array. `BENCH_REPEATS=2` makes a short run.
"""

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from data import SHORT, child, heading, log, measure_parts, results_file, row, run_script, spread
from nnunet_peer import peak_mib

RESULTS = results_file("block")
REPEATS = int(os.environ.get("BENCH_REPEATS", 5))
BASE, TINY = (3, 4, 8, 8, 8, 8, 8, 4, 3), (1,) * 9
PARTS = {
    "mini": {"width": 8, "depths": TINY, "ratios": (2,) * 9, "batch": 2, "side": 32},
    "width16": {"width": 16, "depths": BASE, "ratios": BASE, "batch": 1, "side": 64},
    "width32": {"width": 32, "depths": BASE, "ratios": BASE, "batch": 1, "side": 64},
}
SIDES = {
    "monai": "MONAI's MedNeXt, GRN",
    "naive": "this project, plain, GRN as a formula",
    "plain": "this project, plain",
    "fused": "this project, fused",
    "v1": "v1 (no GRN), plain",
    "v1_fused": "v1 (no GRN), fused",
    "unet": "nnU-Net's plain U-Net",
    "resenc_l": "nnU-Net's ResEnc-L",
}
if SHORT:
    SIDES = {side: SIDES[side] for side in ("monai", "fused", "v1_fused", "resenc_l")}


def monai_network(case: dict):
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


def nnunet_network(side: str, case: dict):
    "As nnU-Net's planner builds them, for these channels and five levels"
    import dynamic_network_architectures.architectures.unet as nets
    from torch import nn

    levels = len(case["depths"]) // 2 + 1
    blocks = {"unet": {"n_conv_per_stage": 2}, "resenc_l": {"n_blocks_per_stage": (1, 3, 4, 6, 6)[:levels]}}[side]
    return {"unet": nets.PlainConvUNet, "resenc_l": nets.ResidualEncoderUNet}[side](
        input_channels=1,
        n_stages=levels,
        features_per_stage=[min(320, case["width"] * 2**level) for level in range(levels)],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (levels - 1),
        num_classes=2,
        n_conv_per_stage_decoder={"unet": 2, "resenc_l": 1}[side],
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **blocks,
    )


def naive_expansion(self, x):
    "GRN as its formula is written, a tensor for each operation"
    import torch
    from torch.nn.functional import gelu

    x = gelu(self.conv2(self.norm(x)))
    channel_norm = torch.norm(x, p=2, dim=(2, 3, 4), keepdim=True)
    relative_norm = channel_norm / (channel_norm.mean(dim=1, keepdim=True) + 1e-6)
    return self.conv3(self.grn_gamma * (x * relative_norm) + self.grn_beta + x)


def network(side: str, case: dict):
    "A network with two classes and a head at every level"
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if side == "monai":
        return monai_network(case)
    if side in ("unet", "resenc_l"):
        return nnunet_network(side, case)
    from mednext_v2.network.blocks import MedNeXtBlock
    from mednext_v2.network.fused import use_fused
    from mednext_v2.network.mednext import Arch, MedNeXt

    arch = Arch(case["width"], case["depths"], case["ratios"], grn=None if side.startswith("v1") else "mean")
    model = use_fused(MedNeXt(arch, 1, 2, deep_supervision=True), side.endswith("fused"))
    for block in model.modules() if side == "naive" else ():
        if isinstance(block, MedNeXtBlock):
            block._expansion = naive_expansion.__get__(block)
    return model


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
    "What two steps add to the peak, and what operators of a third read, write and keep alive"
    from mednext_v2.network.scaling import MemoryMeter

    model, x = network(side, PARTS[part]), batch(PARTS[part])
    before = peak_mib()
    for _ in range(2):
        step(model, x)
    added = peak_mib() - before
    model.zero_grad()
    with MemoryMeter() as meter:
        step(model, x)
    return {"before_mib": before, "added_mib": added, "alive_mib": meter.peak / 2**20, "moved_mib": meter.moved / 2**20}


def child_flops(side: str, part: str) -> dict:
    "FLOPs of the convolutions of a step"
    from torch.utils.flop_counter import FlopCounterMode

    plain = {"fused": "plain", "v1_fused": "v1"}.get(side, side)  # Of products by oneDNN the counter does not know
    model, x = network(plain, PARTS[part]), batch(PARTS[part])
    with FlopCounterMode(display=False) as counter:
        step(model, x)
    return {"step": counter.get_total_flops()}


def child_peaks() -> dict:
    "What one thread of this machine can do: FLOPs a second of a large product, bytes a second of a large copy"
    import torch

    from mednext_v2.network.fused import linear

    torch.set_num_threads(1)
    a, source = torch.randn(2048, 2048), torch.ones(2**27)
    target, found = torch.empty_like(source), {"flops": [], "bytes": []}
    for _ in range(6):
        for name, amount, function in (("flops", 2 * 2048**3, lambda: linear(a, a)), ("bytes", 2 * source.nbytes, lambda: target.copy_(source))):
            begin = time.process_time()
            function()
            found[name].append(amount / (time.process_time() - begin))
    return {name: max(values) for name, values in found.items()}


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


CHILDREN = {"memory": child_memory, "time": child_time, "flops": child_flops, "peaks": child_peaks}


def measure(part: str) -> dict:
    "All sides of a part; a short run has no roofline"
    found: dict = {}
    for name in ("memory",) if SHORT else ("memory", "flops"):
        log(f"{part}: {name}, one side at a time")
        found[name] = {side: child(name, __file__, side=side, part=part) for side in SIDES}
    log(f"{part}: times, {REPEATS + 1} rounds")
    return {"case": PARTS[part], "peaks": child("peaks", __file__), "seconds": child("time", __file__, part=part), **found}


def over(values: list, base: list) -> str:
    "Ratio, repeat by repeat: median, and least to most"
    found = spread([a / b for a, b in zip(values, base)])
    return f"{found['median']:.2f} ({found['least']:.2f}–{found['most']:.2f})"


def table(part: str, result: dict) -> str:
    "Ratios to MONAI's network"
    case, seconds, memory = result["case"], result["seconds"], result["memory"]
    name = f"width {case['width']}, {case['side']}³, batch {case['batch']}"
    lines = heading(name, "step / MONAI's", "forward / MONAI's", "memory of a step, MiB", "memory / MONAI's", "tensors / MONAI's")
    for side, title in SIDES.items():
        times = [over(seconds[kind][side], seconds[kind]["monai"]) for kind in ("step", "infer")]
        ratios = [f"{memory[side][key] / memory['monai'][key]:.3f}" for key in ("added_mib", "alive_mib")]
        lines.append(row(title, *times, f"{memory[side]['added_mib']:.0f}", *ratios))
    return "\n".join(lines)


def grn_table(results: dict) -> str:
    "What GRN costs: v2 over v1"
    lines = heading("v2 / v1", "step", "forward", "memory of a step", "tensors alive at once")
    for part, entry in results.items():
        seconds, memory = entry["result"]["seconds"], entry["result"]["memory"]
        for title, v2, v1 in (("plain", "plain", "v1"), ("fused", "fused", "v1_fused")):
            times = [over(seconds[kind][v2], seconds[kind][v1]) for kind in ("step", "infer")]
            ratios = [f"{memory[v2][key] / memory[v1][key]:.3f}" for key in ("added_mib", "alive_mib")]
            lines.append(row(f"{part}, {title}", *times, *ratios))
    return "\n".join(lines)


def roofline(part: str, result: dict) -> str:
    "Each step as a share of what the machine can do"
    peaks = result["peaks"]
    name = f"{part}; peaks {peaks['flops'] / 1e9:.0f} GFLOP/s, {peaks['bytes'] / 1e9:.0f} GB/s"
    lines = heading(name, "seconds of a step", "GFLOP", "share of the arithmetic peak", "GB read and written", "of the bandwidth peak")
    for side, title in SIDES.items():
        seconds = spread(result["seconds"]["step"][side])["median"]
        flops, moved = result["flops"][side]["step"], result["memory"][side]["moved_mib"] * 2**20
        shares = [f"{100 * amount / seconds / peaks[kind]:.0f} %" for amount, kind in ((flops, "flops"), (moved, "bytes"))]
        lines.append(row(title, f"{seconds:.3f}", f"{flops / 1e9:.1f}", shares[0], f"{moved / 1e9:.1f}", shares[1]))
    return "\n".join(lines)


def tables(results: dict) -> str:
    "All tables"
    shown = [show(part, entry["result"]) for show in ((table,) if SHORT else (table, roofline)) for part, entry in results.items()]
    return "\n\n".join(shown if SHORT else [*shown, grn_table(results)])


if __name__ == "__main__":
    run_script(CHILDREN, lambda asked: measure_parts(RESULTS, PARTS, measure, asked, tables))
