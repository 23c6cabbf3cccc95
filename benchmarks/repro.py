"""Where the time of `make repro` goes.

    make repro 2>&1 | .venv/bin/python benchmarks/repro.py   # passes the log through, and writes benchmarks/results/repro.json at its end
    (in a fresh clone: with the Python of another environment that has this package, since .venv is not there yet)
    python benchmarks/repro.py table                 # the table

The seconds are those that `make repro` itself notes in runs/mini/seconds.json: a stage's part of the wall clock, of which two stages side by
side get half each. What came before the first stage is the installation.
"""

import json
import sys
import time
from pathlib import Path

from data import heading, machine, row
from mednext_v2.study.arithmetic import describe_machine

RESULTS = Path(__file__).resolve().parent / "results" / "repro.json"
SECONDS = Path(__file__).resolve().parents[1] / "runs" / "mini" / "seconds.json"


def follow(lines) -> list:
    "Stage, variant and seconds, in order; the first row is what came before any stage"
    installation, begin = 0.0, time.perf_counter()
    for line in lines:
        print(line, end="", flush=True)
        if line.startswith("stage 1 of "):
            installation = time.perf_counter() - begin
    seconds = json.loads(SECONDS.read_text())
    return [("installation", "", installation), *((*name.partition("@")[::2], value) for name, value in seconds.items())]


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
        RESULTS.write_text(json.dumps({"machine": machine() | describe_machine(), "stages": stages}, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())["stages"]))
