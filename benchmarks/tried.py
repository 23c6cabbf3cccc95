"""What the fused block is made of, each beside what was tried in its place, and what whole networks gain from other settings.

    python benchmarks/tried.py              # all of it, about ten minutes
    python benchmarks/tried.py table        # the table, from benchmarks/results/tried.json

Processor seconds of one thread; the ways of a question take turns, and the table gives each as a multiple of the one that is kept.
Sizes are those of the finest level: 16 channels, 64³ voxels, expansion by 3. `BENCH_REPEATS=1` makes a short run.
"""

import ctypes
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from block import PARTS, batch, network, step
from data import child, heading, measure_parts, row, run_script, spread, take_turns

RESULTS = Path(__file__).resolve().parent / "results" / "tried.json"
REPEATS = int(os.environ.get("BENCH_REPEATS", 7))
CHANNELS, SIDE, RATIO = 16, 64, 3


def row_chunks(count: int, wide: int) -> list[slice]:
    "Chunks of rows as one thread takes them"
    from mednext_v2.network.fused import chunk_length

    length = chunk_length(wide)
    return [slice(begin, min(begin + length, count)) for begin in range(0, count, length)]


def portion_by_portion(cuts: list, way):
    "A way for all rows that keeps no result, as fresh memory would take longer than a product"

    def run():
        for cut in cuts:
            way(cut)

    return run


def volume_of(channels: int, side: int):
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch.randn(1, channels, side, side, side).contiguous(memory_format=torch.channels_last_3d)


# ---------------------------------------------------------------- questions: a function gives the ways, the kept one first
def expand_product():
    import torch
    from torch.nn import functional as F

    from mednext_v2.network import fused

    x, wide = volume_of(CHANNELS, SIDE), CHANNELS * RATIO
    rows, weight, bias = fused.to_tokens(x)[0], torch.randn(wide, CHANNELS), torch.randn(wide)
    cuts = row_chunks(len(rows), wide)
    return {
        "oneDNN, in portions": portion_by_portion(cuts, lambda cut: fused.linear(rows[cut], weight, bias)),
        "MKL, in portions": portion_by_portion(cuts, lambda cut: torch.addmm(bias, rows[cut], weight.t())),
        "oneDNN, all rows at once": lambda: fused.linear(rows, weight, bias),
        "a convolution of kernel 1": lambda: F.conv3d(x, weight.view(wide, CHANNELS, 1, 1, 1), bias),
    }


def expand_and_activate():
    import torch
    from torch.nn import functional as F

    from mednext_v2.network import fused

    wide = CHANNELS * RATIO
    rows, weight, bias = fused.to_tokens(volume_of(CHANNELS, SIDE))[0], torch.randn(wide, CHANNELS), torch.randn(wide)
    cuts = row_chunks(len(rows), wide)
    return {
        "GELU in oneDNN's product": portion_by_portion(cuts, lambda cut: fused.linear(rows[cut], weight, bias, gelu=True)),
        "a product, then GELU": portion_by_portion(cuts, lambda cut: F.gelu(fused.linear(rows[cut], weight, bias))),
    }


def sums_over_rows():
    "At twice the channels, where it matters more"
    import torch

    from mednext_v2.network import fused

    channels, wide = 2 * CHANNELS, 2 * CHANNELS * RATIO
    cuts = row_chunks(SIDE**3, wide)
    narrow, broad = torch.randn(cuts[0].stop, channels), torch.randn(cuts[0].stop, wide)
    return {
        "MKL": portion_by_portion(cuts, lambda _: fused.transposed_product(broad, narrow)),
        "oneDNN": portion_by_portion(cuts, lambda _: fused.linear(broad.t(), narrow.t())),
        "oneDNN, transposed": portion_by_portion(cuts, lambda _: fused.linear(narrow.t(), broad.t())),
    }


def norm_statistics():
    import torch

    from mednext_v2.network import fused

    x = volume_of(CHANNELS, SIDE)
    rows = fused.to_tokens(x)[0]
    return {
        "moments: one pass, shifted": lambda: fused.moments(rows, 1e-5),
        "var_mean": lambda: torch.var_mean(rows, 0),
        "native_group_norm, with its output": lambda: torch.native_group_norm(x, None, None, 1, CHANNELS, SIDE**3, CHANNELS, 1e-5),
    }


def depthwise_forward():
    import itertools

    import torch
    from torch.nn import functional as F

    from mednext_v2.network import fused

    x, weight = volume_of(CHANNELS, SIDE), torch.randn(CHANNELS, 1, 3, 3, 3)
    plain = x.contiguous()

    def shifted():
        wide, total = F.pad(plain, (1,) * 6), torch.zeros_like(plain)
        for place in itertools.product(range(3), repeat=3):
            a, b, c = (slice(n, n + SIDE) for n in place)
            total.addcmul_(wide[:, :, a, b, c], weight[:, 0, place[0], place[1], place[2]].view(1, -1, 1, 1, 1))
        return total

    return {
        "convolution, channels last": lambda: fused.depthwise(x, weight, None, fused.SAME),
        "convolution, channels first": lambda: F.conv3d(plain, weight, padding=1, groups=CHANNELS),
        "27 shifted sums": shifted,
    }


def depthwise_gradient():
    import torch

    from mednext_v2.network import fused

    x, weight = volume_of(CHANNELS, SIDE), torch.randn(CHANNELS, 1, 3, 3, 3)
    options = ([CHANNELS], [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, CHANNELS, [True, True, False])
    return {
        "planes and a mirrored convolution": lambda: fused.depthwise_gradients(x, x, weight, fused.SAME),
        "PyTorch's own, channels last": lambda: torch.ops.aten.convolution_backward(x, x, weight, *options),
    }


def transposed_depthwise():
    import torch
    from torch.nn import functional as F

    from mednext_v2.network import fused
    from mednext_v2.network.blocks import UpBlock

    x, block = volume_of(2 * CHANNELS, SIDE // 2).requires_grad_(), UpBlock(2 * CHANNELS, CHANNELS, RATIO)
    kept = fused.depthwise

    def stock(x, weight, bias, kind):
        return F.conv_transpose3d(x, weight, bias, stride=2, padding=1, groups=x.shape[1])

    def by_parity(x, weight, bias, kind):
        sides = [2 * side - 1 for side in x.shape[2:]]
        y = x.new_empty(1, *sides, x.shape[1]).permute(0, 4, 1, 2, 3)
        for place in range(8):
            odd, part = [place >> axis & 1 for axis in range(3)], weight
            for axis, one in enumerate(odd):
                part = part.index_select(2 + axis, torch.tensor([2, 0] if one else [1]))
            y[:, :, odd[0] :: 2, odd[1] :: 2, odd[2] :: 2] = F.conv3d(x, part, bias, groups=x.shape[1])
        return y

    def step_with(depthwise):
        def way():
            fused.depthwise = depthwise
            y = block(x)
            y.backward(torch.ones_like(y))
            fused.depthwise = kept

        return way

    return {
        "zeros between, then a convolution": step_with(kept),
        "conv_transpose3d": step_with(stock),
        "eight small convolutions, interleaved": step_with(by_parity),
    }


def block_step(**settings):
    "A step of a block, with constants of `fused` set"
    import torch

    from mednext_v2.network import fused
    from mednext_v2.network.blocks import MedNeXtBlock

    x, block = volume_of(CHANNELS, SIDE).requires_grad_(), MedNeXtBlock(CHANNELS, ratio=RATIO)

    def way():
        before = {name: getattr(fused, name) for name in settings}
        for name, value in settings.items():
            setattr(fused, name, value)
        y = block(x)
        y.backward(torch.ones_like(y))
        for name, value in before.items():
            setattr(fused, name, value)

    return way


def portions():
    from mednext_v2.network.fused import CHUNK_VALUES

    sizes = [CHUNK_VALUES, *(2**power for power in (14, 16, 20, 22) if 2**power != CHUNK_VALUES)]
    return {f"{size * 4 // 1024} KiB at a time": block_step(CHUNK_VALUES=size) for size in sizes}


def holding():
    return {"large samples expanded anew": block_step(), "every expanded sample held between passes": block_step(MAX_HELD=2**40)}


def whole(name: str, compiled: bool = False, half: bool = False, last: bool = False):
    "A step of the mini network"
    import torch

    model, x = network(name, PARTS["mini"]), batch(PARTS["mini"])
    if last:
        model, x = model.to(memory_format=torch.channels_last_3d), x.contiguous(memory_format=torch.channels_last_3d)
    if compiled:
        model = torch.compile(model)

    def way():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            step(model, x)

    return way


def network_settings():
    "torch.compile needs a C++ compiler; the fused form is taken apart by it"
    return {
        "fused": whole("fused"),
        "plain": whole("plain"),
        "plain, channels last": whole("plain", last=True),
        "plain, autocast to bfloat16": whole("plain", half=True),
        "fused, autocast to bfloat16": whole("fused", half=True),
        "compiled": whole("plain", compiled=True),
    }


QUESTIONS = {
    "expand_product": ("The product that expands", expand_product),
    "expand_and_activate": ("The same with GELU", expand_and_activate),
    "sums_over_rows": ("Sums over rows, 32 channels", sums_over_rows),
    "norm_statistics": ("Statistics of the norm", norm_statistics),
    "depthwise_forward": ("Depthwise convolution", depthwise_forward),
    "depthwise_gradient": ("Its gradients", depthwise_gradient),
    "transposed_depthwise": ("Transposed depthwise convolution, a step of a block", transposed_depthwise),
    "portions": ("Rows at a time, a step of a block", portions),
    "holding": ("What GRN waits for, a step of a block", holding),
    "network_settings": ("A step of the mini network", network_settings),
    "malloc": ("Freed memory, a step at width 16, 64³", None),
}


def child_question(question: str) -> dict:
    return take_turns(QUESTIONS[question][1](), REPEATS)


def child_malloc(keep: bool) -> dict:
    "A step with or without glibc handing freed memory back to the system"
    if keep:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    found = {}
    for side in ("fused", "monai"):
        model, x = network(side, PARTS["width16"]), batch(PARTS["width16"])
        found[side] = take_turns({side: lambda: step(model, x)}, REPEATS)[side][: max(1, REPEATS // 2)]
    return found


CHILDREN = {"question": child_question, "malloc": child_malloc}


def measure(question: str) -> dict:
    if question != "malloc":
        found = child("question", __file__, question=question)
        found.pop("command_s")
        return found
    usual, kept = (child("malloc", __file__, keep=keep) for keep in (False, True))
    titles = {"fused": "fused", "monai": "MONAI's MedNeXt"}
    found = {f"{title}, handed back as usual": usual[side] for side, title in titles.items()}
    return found | {f"{title}, freed memory kept": kept[side] for side, title in titles.items()}


def table(results: dict) -> str:
    "Each way as a multiple of the one that is kept"
    lines = heading("question", "way", "ms", "of the one that is kept")
    for question, entry in results.items():
        medians = {way: spread(values)["median"] for way, values in entry["result"].items()}
        first = next(iter(medians.values()))
        for place, (way, seconds) in enumerate(medians.items()):
            title = "" if place else QUESTIONS[question][0]
            lines.append(row(title, way, f"{1e3 * seconds:.1f}", f"{seconds / first:.2f}" if place else "kept"))
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(CHILDREN, lambda asked: measure_parts(RESULTS, QUESTIONS, measure, asked, table))
