"`make repro` on a toy pipeline: what it says, what it runs side by side, and that it goes on after a kill at any moment"

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from mednext_v2.core import read_yaml
from mednext_v2.repro import MARK, as_minutes, clean_rwlock, find_leftovers, read_yaml_text, seconds_left, splice_entry
from mednext_v2.stages import compose_params, profiles, run_stage

ROOT = Path(__file__).parents[1]
COMMAND = """import os, sys; from mednext_v2 import repro; repro.compose_params = lambda _: None
if "FAST" not in os.environ: repro.unpinned_because = str  # On any processor
repro.main(sys.argv[1:])"""
SLOW = "i=0; while [ ! -f FILE ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i + 1)); done"  # Until it is there, or 30 s
STAGES = """
stages:
  first: {cmd: "cat in.txt > first.txt", deps: [in.txt], outs: [first.txt]}
  slow: {cmd: "touch slow.begun; SLOW; cat first.txt first.txt > slow.txt", deps: [first.txt], outs: [slow.txt]}
  last: {cmd: "cat slow.txt > last.txt", deps: [slow.txt], outs: [last.txt]}
""".replace("SLOW", SLOW.replace("FILE", "go"))
PAIR = """
stages:
  left: {cmd: "touch left.begun; AFTER RIGHT; cp right.begun left.txt", deps: [in.txt], outs: [left.txt], meta: {side_by_side: true}}
  right: {cmd: "touch right.begun; AFTER LEFT; cp left.begun right.txt", deps: [in.txt], outs: [right.txt], meta: {side_by_side: true}}
  alone: {cmd: "cat in.txt > alone.txt", deps: [in.txt, left.txt], outs: [alone.txt]}
""".replace("AFTER RIGHT", SLOW.replace("FILE", "right.begun")).replace("AFTER LEFT", SLOW.replace("FILE", "left.begun"))


class Toy:
    "A project with a pipeline of shell commands"

    def __init__(self, folder: Path, stages: str):
        self.folder = folder
        (folder / "conf/profile").mkdir(parents=True)
        (folder / "conf/profile/toy.yaml").write_text("compute: {device: cuda}")  # One stage at a time
        (folder / "dvc.yaml").write_text(stages)
        (folder / "in.txt").write_text("1")
        (folder / ".dvc").mkdir()
        (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")

    def start(self, *options: str, **variables: str) -> subprocess.Popen:
        command = [sys.executable, "-c", COMMAND, "toy", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_SITE_CACHE_DIR": str(self.folder / "site"), **variables}
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *options: str, code: int = 0, **variables: str) -> str:
        process = self.start(*options, **variables)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == code, output
        return output

    def wait_for(self, name: str) -> None:
        end = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < end, f"{name} does not appear"
            time.sleep(0.02)

    def processes(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        "Of a run in the middle of `slow`: what DVC is in, and the command that it runs"
        found = find_leftovers(self.folder)
        return [one for one in found if "reproduce_stage" in " ".join(one.cmdline())], [one for one in found if "slow.begun" in " ".join(one.cmdline())]


@pytest.fixture
def toy(tmp_path):
    toy = Toy(tmp_path, STAGES)
    yield toy
    for process in find_leftovers(tmp_path):
        process.kill()


def test_a_line_for_each_stage_and_no_advice_and_then_nothing_to_do(toy):
    (toy.folder / "go").touch()
    assert toy.run().splitlines() == ["stage 1 of 3: first", "stage 2 of 3: slow", "stage 3 of 3: last"]
    assert (toy.folder / "last.txt").read_text() == "11"
    lines = (toy.folder / "runs/toy/logs/last.log").read_text().splitlines()
    assert lines == ["Running stage 'last':", "> cat slow.txt > last.txt"]
    assert toy.run().splitlines() == ["nothing to do: all 3 stages of toy are up to date"]
    (toy.folder / "last.txt").unlink()
    assert toy.run().splitlines() == ["2 of 3 stages are up to date", "stage 3 of 3: last"]
    assert (toy.folder / "last.txt").read_text() == "11"


def test_time_left_comes_from_an_earlier_run(toy):
    (toy.folder / "go").touch()
    toy.run()
    noted = toy.folder / "runs/toy/seconds.json"
    assert set(json.loads(noted.read_text())) == {"first", "slow", "last"}
    noted.write_text(json.dumps({"first": 1e-6, "slow": 60, "last": 60}))  # The pace will be dreadful
    (toy.folder / "in.txt").write_text("2")
    first, slow, last = toy.run().splitlines()
    assert first == "stage 1 of 3: first", "nothing is known yet"
    assert re.fullmatch(r"stage 2 of 3: slow, \d{4,} minutes left", slow) and re.fullmatch(r"stage 3 of 3: last, (\d+ minutes?|less than a minute) left", last)


def test_seconds_left():
    weights = {"a": 10.0, "b": 20.0, "c": 30.0}
    assert seconds_left(weights, {}, {"a": 0}) is None and seconds_left({}, {"a": 3}, {"b": 0}) is None
    assert seconds_left(weights, {"a": 5}, {"b": 0, "c": 0}) == 25
    assert seconds_left(weights, {"a": 5}, {"b": 4, "c": 99}) == 6, "a stage that takes longer than it should gives nothing back"
    assert seconds_left(weights, {"a": 10}, {"new": 0}) == 20, "one that was never measured counts as the mean"
    assert [as_minutes(seconds) for seconds in (None, 20, 80, 660)] == ["", ", less than a minute left", ", 1 minute left", ", 11 minutes left"]


def test_stages_that_may_run_side_by_side_and_others_alone(tmp_path):
    lines = Toy(tmp_path, PAIR).run("--jobs", "2").splitlines()
    assert lines == ["stage 1 of 3: left", "stage 2 of 3: right", "stage 3 of 3: alone"], "each of the two waits for the other"


def test_a_failure_is_one_line_with_the_log_and_no_other_stage_starts(toy):
    text = (toy.folder / "dvc.yaml").read_text()
    (toy.folder / "dvc.yaml").write_text(text.replace("cat first.txt first.txt", "echo broken disk; false"))
    (toy.folder / "go").touch()
    lines = toy.run(code=1).splitlines()
    assert lines[-1] == "repro: the stage slow failed; its log is runs/toy/logs/slow.log" and len(lines) == 3
    assert "broken disk" in (toy.folder / "runs/toy/logs/slow.log").read_text()
    (toy.folder / "dvc.yaml").write_text(text)
    assert toy.run().splitlines() == ["1 of 3 stages are up to date", "stage 2 of 3: slow", "stage 3 of 3: last"]


def test_an_unknown_profile_and_a_broken_pipeline_are_one_line(toy):
    (toy.folder / "conf/profile/toy.yaml").rename(toy.folder / "conf/profile/other.yaml")
    assert toy.run(code=1) == "repro: no profile is called 'toy'; conf/profile holds: other\n"
    (toy.folder / "conf/profile/toy.yaml").write_text("compute: {device: cuda}")
    (toy.folder / "dvc.yaml").write_text("stages:\n  a: {cmd: 1, cmd: 2\n")
    assert toy.run(code=1).startswith("repro: dvc: ")


@pytest.mark.parametrize("jobs", ["-1", "0"])
def test_no_stage_at_a_time_is_refused(toy, jobs):
    assert toy.run("--jobs", jobs, code=1) == f"repro: --jobs is {jobs}: give 1 or more stages at a time, or leave it out for one a core\n"


def test_the_first_line_says_that_arithmetic_is_not_pinned(toy):
    (toy.folder / "go").touch()
    first, second, *_ = toy.run(FAST="1").splitlines()
    assert first == "arithmetic is not pinned (FAST is set): numbers will differ a little from the committed ones" and second.startswith("stage 1")
    assert toy.run(FAST="2", code=1).startswith("repro: FAST is '2': say 1, yes or true")
    assert toy.run().startswith("nothing to do")


def test_an_unpacked_archive_needs_no_git(toy):
    (toy.folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (toy.folder / "go").touch()
    assert toy.run().splitlines()[-1] == "stage 3 of 3: last" and (toy.folder / "last.txt").read_text() == "11"


def test_stages_find_the_python_of_the_run_though_path_has_another(tmp_path):
    toy = Toy(tmp_path, "stages:\n  who: {cmd: 'command -v python > who.txt', outs: [who.txt]}\n")
    toy.run(PATH="/usr/bin:/bin")
    assert (tmp_path / "who.txt").read_text().strip() == str(Path(sys.executable).parent / "python")


def test_a_database_that_cannot_be_written_is_one_line(toy):
    import shlex

    command = shlex.join([sys.executable, "-c", COMMAND, "toy"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "DVC_SITE_CACHE_DIR": str(toy.folder / "site")}
    done = subprocess.run(["bash", "-c", f"ulimit -f 4; {command}"], cwd=toy.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("repro: DVC cannot write its database (")


def test_what_runs_beside_a_stage_that_failed_is_named_and_may_end(tmp_path):
    text = PAIR.replace("cp right.begun left.txt", "false").replace("cp left.begun right.txt", "sleep 2; cp left.begun right.txt")
    lines = Toy(tmp_path, text).run("--jobs", "2", code=1).splitlines()
    assert lines[2:] == ["repro: the stage left failed; its log is runs/toy/logs/left.log", "repro: what runs beside it may end first: right"]
    assert (tmp_path / "right.txt").exists()


# ---- a kill ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victims", ["run", "all but the command", "all"])
def test_killed_in_the_middle_of_a_stage_the_next_run_goes_on(toy, victims):
    run = toy.start()
    toy.wait_for("slow.begun")
    dvc, command = toy.processes()
    assert dvc and command
    for process in {"run": [], "all but the command": dvc, "all": [*dvc, *command]}[victims] + [psutil.Process(run.pid)]:
        process.kill()
    if victims != "all but the command":  # There it stays a zombie, as in a container without init
        run.wait()
    (toy.folder / "slow.begun").unlink()
    again = toy.start()
    toy.wait_for("slow.begun")
    assert not [one for one in (*dvc, *command) if one.is_running() and one.status() != psutil.STATUS_ZOMBIE], "of the killed run none is left"
    (toy.folder / "go").touch()
    lines = again.communicate(timeout=60)[0].splitlines()
    assert lines == ["1 of 3 stages are up to date", "stage 2 of 3: slow", "stage 3 of 3: last"] and again.returncode == 0
    assert (toy.folder / "last.txt").read_text() == "11" and not find_leftovers(toy.folder)
    run.wait()


@pytest.mark.parametrize("victim", ["dvc", "command"])
def test_a_stage_that_is_killed_is_named_and_leaves_no_process(toy, victim):
    run = toy.start()
    toy.wait_for("slow.begun")
    dvc, command = toy.processes()
    for process in {"dvc": dvc, "command": command}[victim]:
        process.kill()
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 1 and re.search(r"the stage slow (was killed by signal 9|failed); its log is runs/toy/logs/slow.log\n$", output)
    assert not find_leftovers(toy.folder)
    (toy.folder / "go").touch()
    assert "stage 3 of 3: last" in toy.run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_ends_its_stages(toy, number):
    run = toy.start()
    toy.wait_for("slow.begun")
    run.send_signal(number)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + number and "Traceback" not in output
    assert not find_leftovers(toy.folder)


def test_killed_time_and_again_it_ends_the_same(toy):
    (toy.folder / "go").touch()
    for seconds in (0.2, 0.5, 0.8, 1.1, 1.5, 2.0, 2.6):
        run = toy.start()
        time.sleep(seconds)
        run.kill()
        run.communicate()
    toy.run()
    assert (toy.folder / "last.txt").read_text() == "11" and toy.run().startswith("nothing to do")


@pytest.mark.parametrize("after", [False, True])
def test_dvc_lock_is_whole_whenever_its_writer_is_killed(toy, after):
    (toy.folder / "go").touch()
    toy.run()
    whole = read_yaml_text((toy.folder / "dvc.lock").read_text())
    (toy.folder / "in.txt").write_text("2")
    code = """
import os, signal
from mednext_v2.repro import reproduce_stage
real = os.replace
def replace(old, new):
    if str(new).endswith("dvc.lock"):
        after and real(old, new)
        os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)
os.replace, after = replace, AFTER
reproduce_stage("first")
""".replace("AFTER", str(after))
    done = subprocess.run([sys.executable, "-c", code], cwd=toy.folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    now = read_yaml_text((toy.folder / "dvc.lock").read_text())
    assert list(now["stages"]) == ["first", "slow", "last"] and (now != whole) == after
    toy.run()
    assert (toy.folder / "last.txt").read_text() == "22"
    assert not list(toy.folder.glob(".tmp-*"))


# ---- what is alive keeps its locks -----------------------------------------------------------------------------------------


def test_a_second_run_waits_for_a_living_one(toy):
    first = toy.start()
    toy.wait_for("slow.begun")
    second = toy.start()
    assert second.stdout is not None
    assert re.fullmatch(rf"another make repro is at work here \(process {first.pid} on \S+\): waiting for its end\n", second.stdout.readline())
    dvc, command = toy.processes()
    assert len(dvc) == 1 and command, "its stage goes on"
    (toy.folder / "go").touch()
    assert first.communicate(timeout=60)[0].splitlines()[-1] == "stage 3 of 3: last" and first.returncode == 0
    assert second.communicate(timeout=60)[0] == "nothing to do: all 3 stages of toy are up to date\n"


def test_dvc_that_was_started_by_hand_is_waited_for(toy):
    (toy.folder / ".dvc/tmp").mkdir()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write_rwlock(toy.folder / ".dvc/tmp/rwlock", sleeper.pid)
    (toy.folder / "go").touch()
    run = toy.start()
    assert run.stdout is not None
    assert run.stdout.readline() == f"dvc is at work here (process {sleeper.pid}): waiting for its end\n"
    sleeper.kill()  # And stays a zombie
    assert run.communicate(timeout=60)[0].splitlines()[-1] == "stage 3 of 3: last" and run.returncode == 0
    sleeper.wait()


def test_a_process_that_holds_the_lock_of_dvc_is_waited_for_and_named(toy):
    (toy.folder / ".dvc/tmp").mkdir()
    hold = "import time, zc.lockfile; lock = zc.lockfile.LockFile('.dvc/tmp/lock'); print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=toy.folder, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    (toy.folder / "go").touch()
    run = toy.start()
    assert run.stdout is not None
    assert run.stdout.readline() == "another process holds .dvc/tmp/lock, the lock of dvc: waiting for its end\n"
    holder.kill()
    holder.communicate()
    assert run.communicate(timeout=60)[0].splitlines()[-1] == "stage 3 of 3: last" and run.returncode == 0


def write_rwlock(path: Path, *pids: int) -> None:
    holders = [{"pid": pid, "cmd": "dvc repro"} for pid in pids]
    path.write_text(json.dumps({"write": {f"/out{one['pid']}": one for one in holders}, "read": {"/in": holders}}))


def test_rwlock_keeps_what_the_living_hold_and_no_more(tmp_path):
    path, mine = tmp_path / "rwlock", os.getpid()
    assert clean_rwlock(path) == set()
    gone = subprocess.Popen(["true"])
    time.sleep(0.2)  # A zombie
    write_rwlock(path, gone.pid, mine)
    assert clean_rwlock(path) == {mine}
    assert json.loads(path.read_text()) == {"write": {f"/out{mine}": {"pid": mine, "cmd": "dvc repro"}}, "read": {"/in": [{"pid": mine, "cmd": "dvc repro"}]}}
    cut = path.read_text()[:-5]
    path.write_text(cut)
    assert clean_rwlock(path) == {mine} and path.read_text() == cut, "half written, but its owner lives"
    before = psutil.Process().create_time() - 100
    os.utime(path, (before, before))
    assert clean_rwlock(path) == set() and not path.exists(), "the number is another process's by now"
    write_rwlock(path, gone.pid)
    gone.wait()
    assert clean_rwlock(path) == set() and not path.exists()


def test_only_processes_with_the_mark_of_this_folder_are_found(tmp_path):
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    marks = [{}, {MARK: str(tmp_path / "other")}, {MARK: str(tmp_path)}]
    started = [subprocess.Popen(sleep, env={**os.environ, **mark}, stdout=subprocess.PIPE) for mark in marks]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    assert [process.pid for process in find_leftovers(tmp_path)] == [started[-1].pid]
    for process in started:
        process.kill()
        process.communicate()


# ---- DVC's files and logs --------------------------------------------------------------------------------------------------


def test_dvc_reads_its_lock_file_and_parameters_as_we_do(tmp_path):
    from dvc.utils.serialize import load_yaml

    for path in [ROOT / "dvc.lock", *(compose_params(profile, tmp_path / f"{profile}.yaml") for profile in profiles())]:
        ours, theirs = read_yaml_text(path.read_text(encoding="utf-8")), load_yaml(str(path))
        assert ours == theirs and json.dumps(ours) == json.dumps(theirs), path  # 1 is no 1.0


def test_dvc_writes_its_lock_file_as_we_do():
    from dvc.utils.serialize import dumps_yaml

    text = (ROOT / "dvc.lock").read_text(encoding="utf-8")
    values = read_yaml_text(text)
    names = list(values["stages"])
    for name in (names[0], names[len(names) // 2], names[-1]):
        assert splice_entry(text, name, values["stages"][name]) == text
    changed = {**values["stages"][names[1]], "cmd": "another, which is so long that it has to be folded " * 4 + "'quoted': #"}
    new = splice_entry(text, names[1], changed)
    assert new is not None
    assert new == dumps_yaml({**values, "stages": {**values["stages"], names[1]: changed}})
    assert splice_entry(new, names[1], values["stages"][names[1]]) == text
    assert splice_entry("schema: '2.0'\nstages: {}\n", "a", {}) is None, "DVC itself writes a file of another form"


def test_nothing_that_only_remarks_is_in_the_log_of_a_notebook(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    for name in ("SPYDER", "NUMEXPR_MAX_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    source = "import logging; logging.basicConfig(level='INFO')\nimport numexpr\nfrom tqdm.auto import tqdm\nprint(list(tqdm([7], disable=True)))"
    notebook.cells = [nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(source)]
    nbformat.write(notebook, tmp_path / "stage.ipynb")
    run_stage(tmp_path / "stage.ipynb", tmp_path / "out")
    output = "".join(capfd.readouterr())
    assert "[7]" in output and not re.search("warning|IProgress|NumExpr", output, re.I), output


def test_stages_that_run_side_by_side_keep_one_core_busy():
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    marked = {name for name, stage in stages.items() if stage.get("meta", {}).get("side_by_side")}
    trained = {"rates_pretrain", "rates_scratch", "rates_finetune", "pretrain", "scratch", "finetune", "evaluate", "ablate", "features"}
    assert marked == trained | {"paper", "qualitative", "architecture"}, "the others start a pool of processes, or are alone at their time"
