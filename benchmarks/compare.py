"""Measures the ratios to the named peers anew, in ten minutes on two cores, and compares them with the committed ones.

    python benchmarks/compare.py               # `make bench`
    python benchmarks/compare.py block data    # some scripts alone
    python benchmarks/compare.py --strict      # `make bench STRICT=1`: exit code 1 for a regression or a part that failed
    python benchmarks/compare.py --table       # compare once more what lies in runs/bench

Each script measures parts of what it measured for benchmarks/results, at the same sizes with fewer repeats, and writes to runs/bench; the
committed results stay as they are (`make bench-full` takes those anew, in over an hour). Compared are ratios, this project's cost over a
peer's of the same run, as seconds say more of the machine and its other work than of the code.

A ratio has changed if the ranges of its repeats in the two runs do not meet and its medians are further apart than noise: 10 % for times, 15 % for
the memory of a process, 2 % for what is counted (bytes on disk, tensors alive at once). Where only one repeat was taken, its range is taken
to be 15 % each way. On another processor ratios of times are expected to change: such changes are listed, and none is called a regression.
A part that there is no time left for is left out by name.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data import heading, log, row
from mednext_v2.report.speed import find_runs, same_processor

HERE = Path(__file__).resolve().parent
COMMITTED, FRESH = HERE / "results", HERE.parent / "runs" / "bench"
NOISE = {"time": 0.10, "memory": 0.15, "count": 0.02}
LONE = 0.15  # Half the range of a single repeat
WORDS = {"time": ("faster", "slower"), "memory": ("less", "more"), "count": ("less", "more")}
BAD = ("slower", "more")
OTHER, UNKNOWN = "not comparable: another processor", "not comparable: processor not recorded"
# Script, its part, repeats, seconds on two cores of 110 GFLOP/s each; what matters most comes first
STEPS = [
    ("block", "mini", 5, 50),
    ("block", "width16", 2, 150),
    ("inference", "some", 1, 90),
    ("storage", "", 3, 80),
    ("data", "speed", 2, 60),
    ("metrics", "", 2, 110),
]


@dataclass
class Ratio:
    "One cost of this project over that of a peer, by repeats"

    values: list
    kind: str = "time"

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def ends(self) -> tuple:
        lone = LONE if len(self.values) == 1 and self.kind == "time" else 0
        return min(self.values) * (1 - lone), max(self.values) * (1 + lone)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.ends[0]:.3f} to {self.ends[1]:.3f}{', one repeat' if len(self.values) == 1 and self.kind == 'time' else ''})"


@dataclass
class Part:
    "A part of a script's results: what it ran on, and its ratios by name"

    machine: dict
    ratios: dict = field(default_factory=dict)


# ---------------------------------------------------------------- ratios in the results of each script
def divide(ours: list, theirs: list, kind: str = "time") -> Ratio:
    "Repeat by repeat, as many as both have"
    count = min(len(ours), len(theirs))
    return Ratio([float(a / b) for a, b in zip(ours[:count], theirs[:count])], kind)


def block_parts(results: dict) -> dict[str, Part]:
    "The fused network over each other in the part but this project's own plain forms"
    names = {"monai": "MONAI's", "v1_fused": "v1's, fused", "unet": "nnU-Net's U-Net's", "resenc_l": "nnU-Net's ResEnc-L's"}
    found = {}
    for name, entry in results.items():
        for machine, result in find_runs(entry):
            case, part = result["case"], Part(machine)
            size = f"width {case['width']}, {case['side']}³"
            for kind, title in (("step", "step"), ("infer", "forward pass")):
                sides = result["seconds"][kind]
                for peer in [peer for peer in names if peer in sides]:
                    part.ratios[f"{title} / {names[peer]}, {size}"] = divide(sides["fused"], sides[peer])
            for key, title, kind in (("added_mib", "memory of a step", "memory"), ("alive_mib", "tensors of a step", "count")):
                memory = result["memory"]
                part.ratios[f"{title} / MONAI's, {size}"] = divide([memory["fused"][key]], [memory["monai"][key]], kind)
            found[name] = part
    return found


def inference_parts(results: dict) -> dict[str, Part]:
    "Processor seconds, and memory above what there was before the scan"
    found = {}
    for name, entry in results.items():
        measured, classes = entry["result"]["measured"], entry["result"]["size"][0]
        if not isinstance(measured["cpu_s"], dict):  # This project alone
            continue
        part = found[name] = Part(entry["machine"])
        for peer, title in (("monai", "MONAI's"), ("nnunet", "nnU-Net's")):
            for key, what, kind in (("cpu_s", "label maps", "time"), ("above_mib", "memory of label maps", "memory")):
                part.ratios[f"{what} / {title}, {classes} classes"] = divide(measured[key]["ours"]["all"], measured[key][peer]["all"], kind)
    return found


def data_parts(results: dict) -> dict[str, Part]:
    "Preparation: cases a second become seconds a case; and a large case"
    found = {}
    for grain, one in results.get("speed", {}).get("result", {}).items():
        part = found.setdefault("speed", Part(results["speed"]["machine"]))
        rates = one["without_start"]["cases_per_s"]
        part.ratios[f"preparation / nnU-Net's, {grain}"] = divide(rates["nnunet"]["all"], rates["ours"]["all"])
    for name in [name for name in ("memory", "paper") if name in results]:
        result = results[name]["result"]
        sides = [result["cpu_s"][side]["all"] for side in ("ours", "nnunet")]
        found[name] = Part(results[name]["machine"], {f"preparation / nnU-Net's, {' x '.join(map(str, result['shape']))}": divide(*sides)})
    return found


def storage_parts(results: dict) -> dict[str, Part]:
    "A patch of 64³ from a file opened anew, writing, and bytes; of the first volume, which a short run has as well"
    rows = {(one["method"], one["array"]): one for one in results["rows"] if one["volume"] == "ctA"}
    peers = {("nibabel gz", "int16"): "nibabel's", ("npy mapped", "float16"): "npy's", ("zarr zstd 32", "float16"): "Zarr's"}
    peers |= {("blosc2 as nnU-Net", "float32"): "nnU-Net's blosc2"}
    machine = results["machine"]
    part = Part({"cpu": machine.get("processor"), **machine})
    ours = rows[("storage 32", "float16")]
    rounds = len(rows[("nibabel gz", "int16")]["first_ms"])

    def by_round(values: list) -> list:
        return [float(np.median(some)) for some in np.array_split(values, rounds)]

    for key, title in peers.items():
        theirs = rows[key]
        part.ratios[f"read a patch / {title}"] = divide(by_round(ours["first_ms"]), by_round(theirs["first_ms"]))
        part.ratios[f"write / {title}"] = divide(ours["write_ms"], theirs["write_ms"])
        part.ratios[f"bytes / {title}"] = divide([ours["bytes"]], [theirs["bytes"]], "count")
    return {"": part}


def metrics_parts(results: dict) -> dict[str, Part]:
    "Seconds of a core for the scores of a case"
    seconds = results["core_seconds"]
    ours = next(name for name in seconds if name.startswith("ours"))
    shape = " x ".join(map(str, results["shape"]))
    ratios = {
        f"scores / {peer.partition(':')[0]}'s, {results['classes']} classes, {shape}": divide(seconds[ours], seconds[peer]) for peer in seconds if peer != ours
    }
    return {"": Part(results["machine"], ratios)}


READERS: dict[str, Callable] = {"block": block_parts, "inference": inference_parts, "storage": storage_parts, "data": data_parts, "metrics": metrics_parts}


def read_parts(folder: Path) -> dict[tuple[str, str], Part]:
    "All parts in a folder of results, by script and part"
    found = {}
    for script, reader in READERS.items():
        path = folder / f"{script}.json"
        if path.is_file():
            found |= {(script, name): part for name, part in reader(json.loads(path.read_text(encoding="utf-8"))).items()}
    return found


# ---------------------------------------------------------------- comparison
def judge(then: Ratio, now: Ratio, same: bool | None) -> str:
    "same, faster, slower, less, more, or why it cannot be said; what is counted does not depend on the processor"
    change, (low, high), (least, most) = now.median / then.median - 1, then.ends, now.ends
    if abs(change) <= NOISE[now.kind] or (least <= high and most >= low):
        return "same"
    if now.kind == "time" and not same:
        return UNKNOWN if same is None else OTHER
    return WORDS[now.kind][change > 0]


@dataclass
class Row:
    "A ratio in both runs"

    what: str
    then: Ratio
    now: Ratio
    verdict: str

    def cells(self) -> list:
        return [self.what, self.then, self.now, f"{100 * (self.now.median / self.then.median - 1):+.0f} %", self.verdict]


def compare(then: dict, now: dict, asked: list) -> tuple[list[Row], list[str]]:
    "A row for each ratio that both runs have, and what only one of them has"
    rows, notes = [], []
    for key in asked:
        name = " ".join(filter(None, key))
        if key not in now:
            notes.append(f"{name}: missing in this run")
        elif key not in then:
            notes.append(f"{name}: missing in the committed results; `make bench-full` takes them anew")
        else:
            old, new = then[key].ratios, now[key].ratios
            same = same_processor(then[key].machine, now[key].machine)
            rows += [Row(what, old[what], new[what], judge(old[what], new[what], same)) for what in new if what in old]
            notes += [f"{name}: {what} is missing in the committed results" for what in new if what not in old]
    return rows, notes


def describe(machine: dict) -> str:
    "A processor in a line"
    rate = f"{machine['gflops']:.0f} GFLOP/s a core" if machine.get("gflops") else ""
    kind = f"family {machine['family']}, model {machine['model']}" if machine.get("family") else ""
    return ", ".join(filter(None, (machine.get("cpu") or "a processor that was not recorded", machine.get("instructions"), kind, rate, machine.get("date"))))


def measured_on(script: str, parts: Iterable[str] = ()) -> str:
    "The line below a heading of README.md: processors and days of these parts of the committed results, of all if none is named"
    results = json.loads((COMMITTED / f"{script}.json").read_text(encoding="utf-8"))
    entries = [results] if "machine" in results else [results[part] for part in list(parts) or results]
    machines = [{"cpu": machine.get("processor"), **machine, "gflops": None} for machine in (entry["machine"] for entry in entries)]
    return f"Measured on {'; '.join(dict.fromkeys(map(describe, machines)))}."


def processors(then: dict, now: dict, asked: list) -> list[str]:
    "Where processors differ, in words; and where other work may have shared the cores"
    found = []
    for key in [key for key in asked if key in then and key in now]:
        old, new, name = then[key].machine, now[key].machine, " ".join(filter(None, key))
        same = same_processor(old, new)
        if not same:
            meaning = "another processor" if same is False else "perhaps another processor"
            found.append(f"{name}: {meaning} (committed: {describe(old)}; now: {describe(new)}). Changed ratios of times are expected, and are no regressions.")
        load = (new.get("load_before") or [0])[0]
        if load > 1.5:
            found.append(f"{name}: other work shared the cores when it began (a load of {load:.1f}); repeat it on an idle machine before you trust a change.")
    return found


def report(rows: list[Row], notes: list[str], about: list[str]) -> str:
    "Regressions first, then every ratio, then what is missing and what it was measured on"
    titles = ("what (this project / peer)", "committed (spread)", "this run (spread)", "change", "verdict")

    def table(chosen: list[Row]) -> list[str]:
        return heading(*titles) + [row(*one.cells()) for one in chosen]

    worse = [one for one in rows if one.verdict in BAD]
    moved = [one for one in rows if one.verdict in (OTHER, UNKNOWN)]
    lines = [f"Regressions: {len(worse)} of {len(rows)} ratios", "", *(table(worse) + [""] if worse else [])]
    if moved:
        lines += [f"Changed, not comparable: {len(moved)}", ""]
    lines += ["All ratios (below 1, this project takes less)", "", *table(rows)]
    for title, texts in (("Missing", notes), ("Measured on", about)):
        lines += ["", f"{title}:", *(f"- {text}" for text in texts)] if texts else []
    return "\n".join(lines)


# ---------------------------------------------------------------- the run
def fits(spent: float, expected: float, pace: float, limit: float) -> bool:
    "Whether a step that is expected to take so long, on a machine of this pace, ends before the limit; all in seconds"
    return spent + expected * max(1.0, pace) <= limit


def run_step(script: str, part: str, repeats: int, seconds: float) -> str:
    "Runs a part, shows its lines but tables, and stops it after so many seconds; empty, or why it has no result"
    command = [sys.executable, "-u", str(HERE / f"{script}.py"), *filter(None, [part])]
    environment = os.environ | {"BENCH_SHORT": "1", "BENCH_REPEATS": str(repeats), "OMP_NUM_THREADS": "1"}
    last, late = "no output", threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="bench_") as work,
        subprocess.Popen(
            command,
            env=environment | {"TMPDIR": work},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # So that its children end with it
        ) as process,
    ):

        def stop() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in filter(str.strip, process.stdout or ()):
                last = line.strip()
                if not line.startswith(("|", "{")):
                    log(f"    {last}")
            process.wait()
        except BaseException:
            stop()
            raise
        finally:
            timer.cancel()
    if late.is_set():
        return f"stopped after {seconds:.0f} s: no time left"
    return f"failed: {last}" if process.returncode else ""


def run(steps: list, limit: float) -> dict[tuple[str, str], str]:
    "Runs the steps that fit into so many seconds; why each of the others has no result"
    begin, done, expected, reasons = time.perf_counter(), 0.0, 0.0, {}
    for number, (script, part, repeats, seconds) in enumerate(steps, 1):
        spent, name = time.perf_counter() - begin, " ".join(filter(None, (script, part)))
        if not fits(spent, seconds, done / expected if expected else 1, limit):
            reasons[script, part] = f"left out after {spent:.0f} s: no time left"
            log(f"{number} of {len(steps)}: {name}: {reasons[script, part]}")
            continue
        log(f"{number} of {len(steps)}: {name}, about {seconds} s; {spent:.0f} of {limit:.0f} s are spent")
        if reason := run_step(script, part, repeats, limit - spent):
            reasons[script, part] = reason
            log(f"{name}: {reason}")
        done, expected = done + time.perf_counter() - begin - spent, expected + seconds
    log(f"all: {time.perf_counter() - begin:.0f} s")
    return reasons


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", choices=[*READERS, []], help="block, inference, storage, data, metrics (default: all)")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if something got slower or a part failed")
    parser.add_argument("--table", action="store_true", help="measure nothing, compare what is in runs/bench")
    parser.add_argument("--minutes", type=float, default=10, help="what does not fit is left out by name (default: 10)")
    options = parser.parse_args()
    steps = [step for step in STEPS if not options.scripts or step[0] in options.scripts]
    reasons = {}
    if not options.table:
        for script, *_ in steps:
            (FRESH / f"{script}.json").unlink(missing_ok=True)
        reasons = run(steps, 60 * options.minutes)
    then, now, asked = read_parts(COMMITTED), read_parts(FRESH), [(script, part) for script, part, *_ in steps]
    for key in reasons:  # A part that was stopped may have written half of a file
        now.pop(key, None)
    rows, notes = compare(then, now, [key for key in asked if key not in reasons])
    notes += [f"{' '.join(filter(None, key))}: {reason}" for key, reason in reasons.items()]
    text = report(rows, notes, processors(then, now, asked))
    FRESH.mkdir(parents=True, exist_ok=True)
    (FRESH / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    failed = any(reason.startswith("failed") for reason in reasons.values())
    return int(options.strict and (failed or any(one.verdict in BAD for one in rows)))


if __name__ == "__main__":
    sys.exit(main())
