"""Where the time of `make repro` goes.

    make repro 2>&1 | python benchmarks/repro.py     # passes the log through, and writes benchmarks/results/repro.json at its end
    python benchmarks/repro.py table                 # the table

A stage's seconds are those from the line with which DVC starts it to the next such line. Pretrainings run two at a time, so theirs are
counted together, as all stages of a kind are.
"""

import json
import re
import sys
import time
from pathlib import Path

from data import heading, machine, row

RESULTS = Path(__file__).resolve().parent / "results" / "repro.json"
STARTS = re.compile(r"Running stage '([\w.-]+?)(?:@([\w.-]+))?'")


def follow(lines) -> list:
    "Stage, variant and seconds, in order; the first row is what came before any stage"
    found, begin = [], time.perf_counter()
    name, variant = "installation", ""
    for line in lines:
        print(line, end="", flush=True)
        if match := STARTS.search(line):
            now = time.perf_counter()
            found.append((name, variant, now - begin))
            begin, (name, variant) = now, match.groups("")
    return [*found, (name, variant, time.perf_counter() - begin)]


def table(stages: list) -> str:
    "Seconds by kind of stage"
    sums, whole = {}, sum(seconds for *_, seconds in stages)
    for name, _, seconds in stages:
        count, total = sums.get(name, (0, 0.0))
        sums[name] = count + 1, total + seconds
    lines = heading("stage", "runs", "seconds", "share")
    lines += [row(name, count, f"{total:.0f}", f"{100 * total / whole:.0f} %") for name, (count, total) in sums.items()]
    return "\n".join([*lines, row("all", len(stages), f"{whole:.0f}", "")])


if __name__ == "__main__":
    if sys.argv[1:] != ["table"]:
        stages = follow(sys.stdin)
        RESULTS.write_text(json.dumps({"machine": machine(), "stages": stages}, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())["stages"]))
