"""GRN's price: a fused training step of MedNeXt-v2 over one of v1, where it goes, and the least that it can be.

    python benchmarks/price.py              # all of it, under three minutes
    python benchmarks/price.py width16      # a part: width8, width16, width32, tried, second_thread
    python benchmarks/price.py table        # the tables, from benchmarks/results/price.json

Base's layout on 48³, one thread. Sides take turns in one process, in processor seconds. What each operator takes is read off PyTorch's profiler.
The least: v2 must square and sum what v1 need not, scale, and have the expanded rows a second time each way, from memory or made anew; all at
the rates of PyTorch's operators on as many rows as the cache holds, and with as much held as the block holds. `second_thread` is by the
clock and wants two idle cores. `BENCH_REPEATS=2` makes a short run.
"""

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from block import BASE, batch, child_peaks, network, over, step
from data import child, heading, log, measure_parts, results_file, row, run_script, spread, take_turns

RESULTS = results_file("price")
REPEATS = int(os.environ.get("BENCH_REPEATS", 3))
SIDE, BAR = 48, 1.08
WIDTHS = {f"width{width}": width for width in (8, 16, 32)}
PARTS = [*WIDTHS, "tried", "second_thread"]
OPERATORS = {  # By what they do
    "products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::bmm", "aten::addmm"),
    "GELU and its gradient": ("aten::gelu", "aten::gelu_backward"),
    "squares, scaled weights": ("aten::mul", "aten::mul_"),
    "an activation's own share": ("aten::addcmul_",),
    "sums": ("aten::sum",),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "Python between operators": ("Block", "BlockBackward"),
}
OTHERS = "all others"


def case_of(width: int) -> dict:
    return {"width": width, "depths": BASE, "ratios": BASE, "batch": 1, "side": SIDE}


def operator_ms(way, steps: int = 2) -> dict:
    "Milliseconds of a step by what operators do, without those that they call"
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            way()
    kinds = {name: kind for kind, names in OPERATORS.items() for name in names}
    found = dict.fromkeys([*OPERATORS, OTHERS], 0.0)
    for event in profiler.key_averages():
        found[kinds.get(event.key, OTHERS)] += event.self_cpu_time_total / 1e3 / steps
    return found


def value_ns(width: int) -> dict:
    "Nanoseconds for each expanded value at the finest level: of a chunk in the cache, and what holding 32 MiB of chunks takes beyond the cache"
    import torch

    from mednext_v2.network import fused

    torch.set_num_threads(1)
    wide = BASE[0] * width
    rows, weight, bias = torch.randn(fused.chunk_length(wide), width), torch.randn(wide, width), torch.randn(wide)
    u, share = fused.linear(rows, weight, bias), torch.randn(wide)
    spare, held = torch.empty_like(u), torch.empty(fused.MAX_HELD // u.numel(), *u.shape)

    def write_and_read(chunks):
        for chunk in chunks:
            chunk.copy_(u)
        for chunk in chunks:
            chunk.sum(0)

    ways = {
        "product": lambda: fused.linear(rows, weight, bias),
        "GELU": lambda: torch.ops.aten.gelu.out(u, out=spare),
        "squares and their sums": lambda: torch.mul(u, u, out=spare).sum(0),
        "own share": lambda: spare.addcmul_(u, share),
        "held": lambda: write_and_read(held),
        "in the cache": lambda: write_and_read([spare] * len(held)),
    }
    found = {}
    for name, way in ways.items():  # One after the other, so that each finds its rows in the cache
        seconds = []
        for _ in range(30):
            begin = time.process_time()
            way()
            seconds.append(time.process_time() - begin)
        found[name] = 1e9 * spread(seconds[5:])["median"] / (held.numel() if name in ("held", "in the cache") else u.numel())
    return found | {"held": max(found["held"] - found.pop("in the cache"), 0)}


def expanded_values(width: int) -> list[int]:
    "Of each block and sample in a step"
    from mednext_v2.network.mednext import Arch
    from mednext_v2.network.scaling import list_blocks

    return [block.ratio * block.channels * block.inside for block in list_blocks(Arch(width, BASE, BASE), (SIDE,) * 3)]


def child_width(width: int) -> dict:
    "Both sides, operator by operator, and the rates of the processor"
    from mednext_v2.network.fused import CHUNK_VALUES, MAX_HELD

    case = case_of(width)
    x, models = batch(case), {"v2": network("fused", case), "v1": network("v1_fused", case)}
    ways = {name: (lambda model=model: step(model, x)) for name, model in models.items()}
    seconds = take_turns(ways, REPEATS)
    operators = {name: operator_ms(way) for name, way in ways.items()}
    found = {"ns": value_ns(width), "values": expanded_values(width), "limits": (CHUNK_VALUES, MAX_HELD), "peaks": child_peaks()}
    return {"seconds": seconds, "operators": operators, **found}


def squares_by(way):
    "`channel_norms` with another way to square and sum"
    from mednext_v2.network.fused import split_rows

    def channel_norms(norms, expand_rows, d, hold):
        held, spare = [], None
        for (rows,) in split_rows(len(norms), d):
            _, v = expand_rows(rows, gelu=True)
            spare = way(norms, v, spare)
            held += [v] if hold else []
        if spare is not None and way is added_up:
            norms += spare.sum(0)
        norms.sqrt_()
        return held

    return channel_norms


def in_one_buffer(norms, v, spare):
    import torch

    spare = torch.empty_like(v) if spare is None else spare
    norms += torch.mul(v, v, out=spare[: len(v)]).sum(0)
    return spare


def added_up(norms, v, spare):
    if spare is None:
        return v * v
    spare[: len(v)].addcmul_(v, v)
    return spare


def left_out(norms, v, spare):
    norms += 1
    return None


def child_tried() -> dict:
    "Steps at width 16 with parts of the fused block replaced"
    from mednext_v2.network import fused

    case = case_of(16)
    x, model = batch(case), network("fused", case)

    def way(**settings):
        def run():
            before = {name: getattr(fused, name) for name in settings}
            for name, value in settings.items():
                setattr(fused, name, value)
            step(model, x)
            for name, value in before.items():
                setattr(fused, name, value)

        return run

    ways = {
        "as it is": way(),
        "nothing held": way(MAX_HELD=0),
        "16 MiB held": way(MAX_HELD=2**22),
        "64 MiB held": way(MAX_HELD=2**24),
        "squares in one buffer": way(channel_norms=squares_by(in_one_buffer)),
        "squares added up before they are summed": way(channel_norms=squares_by(added_up)),
        "squares left out (wrong numbers)": way(channel_norms=squares_by(left_out)),
    }
    return {"seconds": take_turns(ways, REPEATS)}


def child_second_thread() -> dict:
    "A step of v2 with one thread and with two, by the clock, and what the operators take of it"
    import torch

    case = case_of(16)
    x, model = batch(case), network("fused", case)

    def way(threads: int):
        def run():
            torch.set_num_threads(threads)
            step(model, x)

        return run

    ways = {str(threads): way(threads) for threads in (1, 2)}
    return {"seconds": take_turns(ways, REPEATS, time.perf_counter), "operators": {name: operator_ms(one) for name, one in ways.items()}}


CHILDREN = {"width": child_width, "tried": child_tried, "second_thread": child_second_thread}


def measure(part: str) -> dict:
    log(part)
    return child("width", __file__, width=WIDTHS[part]) if part in WIDTHS else child(part, __file__)


def least(result: dict, free: bool = False) -> float:
    "The least v2 / v1; with `free`, if squares and own share cost nothing"
    from mednext_v2.report.speed import least_price

    return least_price(result["ns"], result["values"], spread(result["seconds"]["v1"])["median"], result["limits"], free)


def tables(results: dict) -> str:
    "All tables"
    found = {part: entry["result"] for part, entry in results.items()}
    widths = {part: found[part] for part in WIDTHS if part in found}
    lines = heading("a step on 48³", "v1, s", "v2, s", "v2 / v1", "the least", "if squares and share were free", "GFLOP/s", "GB/s")
    for part, one in widths.items():
        v1, v2 = (one["seconds"][name] for name in ("v1", "v2"))
        times, peaks = [f"{spread(values)['median']:.3f}" for values in (v1, v2)], [f"{one['peaks'][name] / 1e9:.0f}" for name in ("flops", "bytes")]
        lines.append(row(f"width {WIDTHS[part]}", *times, over(v2, v1), f"{least(one):.2f}", f"{least(one, free=True):.2f}", *peaks))
    lines += ["", *heading("ns for each expanded value, finest level", *(f"width {WIDTHS[part]}" for part in widths))]
    lines += [row(name, *(f"{one['ns'][name]:.2f}" for one in widths.values())) for name in next(iter(widths.values()))["ns"]]
    lines += ["", *heading("v2 more than v1, ms of a step", *(f"width {WIDTHS[part]}" for part in widths))]
    for name in [*OPERATORS, OTHERS]:
        more = [one["operators"]["v2"][name] - one["operators"]["v1"][name] for one in widths.values()]
        lines.append(row(name, *(f"{value:.0f}" for value in more)))
    if "tried" in found:
        seconds = found["tried"]["seconds"]
        lines += ["", *heading("tried, a step of v2 at width 16", "of the one that is kept")]
        lines += [row(name, over(values, seconds["as it is"])) for name, values in seconds.items()]
    if "second_thread" in found:
        seconds, operators = (found["second_thread"][name] for name in ("seconds", "operators"))
        lines += [
            "",
            *heading(f"a second thread, a step at width 16: {over(seconds['1'], seconds['2'])} times", "ms, 1 thread", "ms, 2 threads", "over the half"),
        ]
        for name in [*OPERATORS, OTHERS]:
            one, two = (operators[count][name] for count in "12")
            lines.append(row(name, f"{one:.0f}", f"{two:.0f}", f"{two - one / 2:.0f}"))
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(CHILDREN, lambda asked: measure_parts(RESULTS, PARTS, measure, asked, tables))
