"""`make rehearsal`: make repro of mini in a copy, killed once in each kind of stage, and `make verify` at its end

A run that was killed goes on with nothing removed by hand, and ends with the same weights as one that was not. Kinds of stages are killed in turn
with kill -9 of the run alone, whose stages then live on, and of everything that it has started.
Where this kind of processor gave the committed numbers before (benchmarks/machines.md), other numbers are an error; elsewhere they are printed as a finding.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mednext_v2.study.arithmetic import describe_processor

ROOT = Path(__file__).resolve().parents[1]
PROFILE = "mini"
LIMIT = 40 * 60  # Seconds for all of it, on machines three times as slow: a hang is an error
DELAY = 4  # Seconds from a stage's first line to the kill: its notebook has begun
RUN = [sys.executable, "-u", "-m", "mednext_v2.repro", PROFILE]


def kill_all(folder: Path, run: subprocess.Popen) -> None:
    "SIGKILL for the run and all that stages of this folder have started"
    from mednext_v2.repro import find_leftovers

    run.kill()
    for process in find_leftovers(folder):
        try:
            process.kill()
        except Exception:  # It has just ended
            pass


def run_once(folder: Path, environment: dict, killed: set[str]) -> int:  # The exit code; -9 if it was killed here
    "Run until the end, or until a stage of a kind begins that was never killed"
    process = subprocess.Popen(RUN, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    for line in process.stdout:
        print(line, end="", flush=True)
        if not line.startswith("stage "):
            continue
        kind = line.split(": ", 1)[1].split()[0].rstrip(",")
        if kind not in killed:
            killed.add(kind)
            time.sleep(DELAY)
            if process.poll() is None:
                print(f"-- kill -9 in {kind}", flush=True)
                process.kill() if len(killed) % 2 else kill_all(folder, process)
            break
    process.stdout.close()
    return process.wait()


def judge(
    code: int,  # Of `make verify`
    machines: str,  # benchmarks/machines.md
    processor: dict,  # From `describe_processor`
) -> int:  # Exit code
    "A difference is an error where this kind of processor gave the committed numbers before; elsewhere it is a finding, which is printed"
    names, _, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in machines.splitlines() if line.startswith("|")]
    confirmed = [row for row in (dict(zip(names, cells)) for cells in rows) if row["profile"] == PROFILE and row["verdict"] == "identical"]
    known = {(row["processor"], row["instructions"]) for row in confirmed}
    if code != 1 or (processor["processor"], processor["instructions"]) in known:
        return code
    where = f"{processor['processor']} ({processor['instructions']})"
    print(f"-- A FINDING: the numbers are others on {where}, where nobody has made them before; make verify RECORD=1 notes it")
    return 0


def give_up(*_) -> None:
    raise SystemExit(f"-- not done after {LIMIT // 60} minutes: what is printed last hangs, or the machine is too slow")


def main() -> None:
    began, killed = time.monotonic(), set()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT)
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-")) / "mednext_v2"
    try:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        environment = os.environ | {"PYTHONPATH": str(folder)}
        while (code := run_once(folder, environment, killed)) == -signal.SIGKILL:
            pass
        if code:
            logs = sorted((folder / f"runs/{PROFILE}/logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
            print(logs[-1].read_text(errors="replace")[-5000:] if logs else "no stage has a log")
            raise SystemExit(f"rehearsal: make repro ended with {code} after kills in {', '.join(sorted(killed))}")
        again = subprocess.run(RUN, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
        assert again.startswith("nothing to do"), again
        print(f"made in {(time.monotonic() - began) / 60:.1f} minutes, with kills in {', '.join(sorted(killed))}; a second run has nothing to do", flush=True)
        verified = subprocess.run([sys.executable, "-m", "mednext_v2.report.verify", PROFILE], cwd=folder, env=environment)
        raise SystemExit(judge(verified.returncode, (ROOT / "benchmarks/machines.md").read_text(encoding="utf-8"), describe_processor()))
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
