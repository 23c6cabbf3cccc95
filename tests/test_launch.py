"Runs in real processes: how each ends, how soon, with what exit code and what message; and what fits in memory"

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import pytest

from mednext_v2.training import launch as module
from mednext_v2.training.launch import HUNG, SAVED, Forecast, RunEnded, Step, check_memory, heartbeat, launch, read_spec

HERE = Path(__file__).parent


# What ranks run. They import this file, and torch only where they need it.


def rank() -> str:
    return os.environ.get("RANK", "0")


def tell(out: str, name: str, text: str = "") -> None:
    (Path(out) / f"{name}{rank()}").write_text(text or str(os.getpid()))


def greet(out: str, words: list) -> None:
    tell(out, "said", " ".join([*words, os.environ.get("WORLD_SIZE", "1")]))


def fail_in_one(out: str) -> None:
    if rank() == "1":
        raise ValueError("recipe: lr must be a positive number, got -1")
    time.sleep(1000)


def sum_for_ever(out: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for step in range(10**9):
        dist.all_reduce(torch.ones(1))
        if step == 3:
            tell(out, "pid")
        if rank() == "1" and step > 3:
            time.sleep(1000)  # Rank 0 now waits inside the collective


def deaf(out: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(out, "pid")
    time.sleep(1000)


class Slow:
    def __init__(self, out):
        self.out = out

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        (Path(self.out) / "pid0").write_text(str(os.getpid()))
        time.sleep(0.3)
        return index


def read_ahead(out: str) -> None:
    from torch.utils.data import DataLoader

    for step, _ in enumerate(DataLoader(Slow(out), batch_size=None, num_workers=1)):
        heartbeat(step)


def train_and_save(out: str) -> None:
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    tell(out, "pid")
    while not told:
        time.sleep(0.1)
        heartbeat(7)
    time.sleep(0.5 * int(rank()))  # One saves later than the other
    tell(out, "saved")
    raise SystemExit(SAVED)


def stuck_here(out: str) -> None:
    tell(out, "pid")
    time.sleep(1000)


def hang_in_one(out: str) -> None:
    for step in range(1, 1000):
        if rank() == "1" and step == 2:
            stuck_here(out)
        time.sleep(0.3)
        heartbeat(step)


@pytest.fixture
def start(tmp_path):
    "Starts a run from the command line; whatever it leaves behind is killed after the test"
    started = []

    def begin(function, *options: str, **arguments) -> subprocess.Popen:
        spec = tmp_path / "spec.json"
        spec.write_text(json.dumps({"function": f"test_launch:{function.__name__}", "arguments": dict(out=str(tmp_path), **arguments)}))
        line = [sys.executable, "-m", "mednext_v2.training.launch", str(spec), *options]
        (tmp_path / "temporary").mkdir(exist_ok=True)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
        env["TMPDIR"] = str(tmp_path / "temporary")
        started.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for run in started:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(run.pid).children(recursive=True):
                process.kill()
        run.kill()
    for path in tmp_path.glob("pid*"):
        with suppress(OSError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def wait_for(path: Path, seconds: float = 90) -> int:
    "The number in a file, once it is there"
    end = time.time() + seconds
    while time.time() < end:
        with suppress(OSError, ValueError):
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"no {path.name} after {seconds} s")


def finish(run: subprocess.Popen, seconds: float = 90) -> tuple[int, str]:
    "Exit code, and the line that says why"
    _, errors = run.communicate(timeout=seconds)
    return run.returncode, errors[errors.rfind("launch: ") :] if "launch: " in errors else errors


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_run_of_two_ends_well_and_both_get_the_arguments(start, tmp_path):
    run = start(greet, "--processes", "2", words=["well", "done"])
    assert finish(run)[0] == 0
    assert [(tmp_path / f"said{r}").read_text() for r in (0, 1)] == ["well done 2"] * 2
    assert not list((tmp_path / "temporary").iterdir()), "nothing is left"


def test_an_error_in_one_rank_is_one_line_that_names_it(start):
    run = start(fail_in_one, "--processes", "2")
    code, why = finish(run)
    assert code == 1
    assert why == "launch: rank 1 (step 0): ValueError: recipe: lr must be a positive number, got -1\n"


@pytest.mark.parametrize("function", [sum_for_ever, deaf])
def test_a_killed_rank_ends_the_run_within_half_a_minute(start, tmp_path, function):
    run = start(function, "--processes", "2")
    others, victim = (wait_for(tmp_path / f"pid{r}") for r in (0, 1))
    os.kill(victim, signal.SIGKILL)
    since = time.time()
    code, why = finish(run)
    assert time.time() - since < 30
    assert code == 137
    assert why.startswith("launch: rank 1 (step 0) was killed by SIGKILL: probably out of memory")
    assert re.search(r"now [\d.]+ of [\d.]+ GB are free", why) and gone(others)


def test_a_killed_loader_process_ends_the_run_and_memory_is_named(start, tmp_path):
    run = start(read_ahead, "--processes", "1")
    os.kill(wait_for(tmp_path / "pid0"), signal.SIGKILL)
    since = time.time()
    code, why = finish(run)
    assert time.time() - since < 30 and code == 1
    assert re.match(r"launch: rank 0 \(step \d+\): RuntimeError: DataLoader worker .*(killed|exited unexpectedly)", why)
    assert "probably out of memory" in why and "fewer workers" in why


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_run_that_is_told_to_stop_saves_and_says_so(start, tmp_path, number, processes):
    run = start(train_and_save, "--processes", str(processes))
    for r in range(processes):
        wait_for(tmp_path / f"pid{r}")
    run.send_signal(number)
    code, why = finish(run)
    assert code == SAVED == 75
    assert all((tmp_path / f"saved{r}").exists() for r in range(processes))
    assert "was told to stop and has saved: start the run again, it goes on" in why


def test_a_run_that_does_not_save_in_time_is_ended(start, tmp_path):
    run = start(deaf, "--processes", "1", "--grace", "1")
    pid = wait_for(tmp_path / "pid0")
    run.terminate()
    assert finish(run, 20) == (143, "launch: was told to stop and did not save within 1 s\n")
    assert gone(pid)


def test_a_hang_is_noticed_and_shown_with_the_line_where_it_is(start, tmp_path):
    run = start(hang_in_one, "--processes", "2", "--patience", "4")
    code, why = finish(run)
    assert code == HUNG == 124
    assert re.match(r"launch: hung: nothing from rank 1 \(step \d+\) for 4 s", why), why
    traces = dict(re.findall(r"^rank (\d):\n(.*?)(?=^rank|\Z)", why, re.S | re.M))
    assert "in stuck_here" in traces["1"] and "in hang_in_one" in traces["0"]
    assert "in stuck_here" not in traces["0"] and gone(wait_for(tmp_path / "pid1"))


def test_ranks_save_when_whoever_started_them_is_killed(start, tmp_path):
    run = start(train_and_save, "--processes", "1")
    pid = wait_for(tmp_path / "pid0")
    run.kill()
    wait_for(tmp_path / "saved0", 20)
    for _ in range(50):
        if gone(pid):
            return
        time.sleep(0.1)
    raise AssertionError("the rank outlived its run")


def test_launch_from_python_raises_what_the_command_line_prints(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
    with pytest.raises(RunEnded, match=r"^rank 0 \(step 0\): ModuleNotFoundError: No module named 'nothing'$") as ended:
        launch(dict(function="nothing:fit", arguments={}))
    assert ended.value.code == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are given back"


def test_a_rank_that_nobody_watches_needs_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv(module.WATCH_VARIABLE, raising=False)
    heartbeat(3)
    module.write_report(error="nobody reads this")


# A GPU for each process, on a machine that only says how many it has

PRETEND = """
import sys, time, torch
torch.cuda.device_count = lambda: 3
from mednext_v2.training.launch import claim_gpus
with claim_gpus("cuda", int(sys.argv[1])) as environment:
    print(environment.get("CUDA_VISIBLE_DEVICES"), flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    "Three GPUs without nvidia-smi; claims in a folder of this test"
    for name in ("CUDA_VISIBLE_DEVICES", module.SHARE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(module.tempfile, "tempdir", None)
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    return tmp_path


def claim_in_process(count: int = 1, seconds: float = 600) -> subprocess.Popen:
    line = [sys.executable, "-c", PRETEND, str(count), str(seconds)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)})


def test_trainings_side_by_side_get_a_gpu_each_and_one_too_many_is_told_who_has_them(gpus):
    trainings = [claim_in_process(), claim_in_process()]
    try:
        assert sorted(training.stdout.readline() for training in trainings) == ["0\n", "1\n"]
        with pytest.raises(ValueError, match=f"of 3 only 1 are free .GPU 0: process ({trainings[0].pid}|{trainings[1].pid}) on .*compute.workers"):
            with module.claim_gpus("cuda", 2):
                raise AssertionError("claimed what others have")
        with module.claim_gpus("cuda") as environment:
            assert environment == {"CUDA_VISIBLE_DEVICES": "2"}
        trainings[0].kill()  # What a killed training had is free at once
        trainings[0].wait()
        with module.claim_gpus("cuda", 2) as environment:
            assert len(environment["CUDA_VISIBLE_DEVICES"].split(",")) == 2
    finally:
        for training in trainings:
            training.kill()
            training.communicate()


def test_only_gpus_that_the_environment_leaves_are_claimed(gpus, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5d1c")
    with module.claim_gpus("cuda") as environment:
        assert environment == {"CUDA_VISIBLE_DEVICES": "2"}
    with module.claim_gpus("cuda", 2) as environment:
        assert environment == {}, "all that are visible: nothing to change"
    with pytest.raises(ValueError, match="3 processes need a GPU each, and CUDA_VISIBLE_DEVICES has 2"):
        with module.claim_gpus("cuda", 3):
            pass
    for device in ("cpu", "mps", "cuda:1"):
        with module.claim_gpus(device, 8) as environment:
            assert environment == {}


def test_a_gpu_has_one_claim_under_any_number_and_can_be_shared_on_request(gpus, monkeypatch):
    "Slurm's control groups number the GPUs of each job from 0: what counts is the GPU's own id"
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    listing = gpus / "bin" / "nvidia-smi"

    def machine(uuid):
        listing.write_text(f"#!/bin/sh\necho '0, {uuid}'\n")
        listing.chmod(0o755)

    from concurrent.futures import ThreadPoolExecutor

    def claimed():
        with module.claim_gpus("cuda") as environment:
            return environment

    with ThreadPoolExecutor(1) as other:
        machine("GPU-a")
        with module.claim_gpus("cuda"):
            machine("GPU-b")
            assert other.submit(claimed).result() == {}
            machine("GPU-a")
            with pytest.raises(ValueError, match="of 1 only 0 are free .GPU 0: process"):
                other.submit(claimed).result()
            monkeypatch.setenv(module.SHARE_VARIABLE, "1")
            assert other.submit(claimed).result() == {}


@pytest.mark.parametrize("processes, seen, launched", [(1, "0", True), (2, "0,1", True), (3, "", True), (1, "", False)])
def test_a_training_runs_where_it_sees_its_own_gpus_alone(gpus, monkeypatch, processes, seen, launched):
    import torch

    from mednext_v2.core import Resources, write_csv
    from mednext_v2.training import run
    from mednext_v2.training.recipe import get_recipe

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3 if launched else 1)
    calls = []

    def end(**arguments):
        calls.append(None)
        write_csv(gpus / "history.csv", pd.DataFrame({"step": [1]}))

    import pandas as pd

    monkeypatch.setattr(run, "train_from_json", end)
    monkeypatch.setattr(module, "launch", lambda spec, number, variables: (end(), calls.append((number, variables.get("CUDA_VISIBLE_DEVICES", "")))))
    settings = run.TrainSettings(gpus / "data", gpus / "out", "unet", get_recipe("smoke"), gpus)
    run.train_in_processes(settings, Resources("cuda", processes=processes))
    assert calls == [None, (processes, seen)] if launched else [None]


def test_launch_passes_the_gpus_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
    script = tmp_path / "gpu.py"
    script.write_text("import os, pathlib\npathlib.Path(__file__).with_suffix('.txt').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n")
    launch(dict(function="runpy:run_path", arguments=dict(path_name=str(script))), variables={"CUDA_VISIBLE_DEVICES": "3"})
    assert (tmp_path / "gpu.txt").read_text() == "3"


# The cause, from what is known at the end


def told(seconds, **fields):
    return dict(pid=1, time=seconds, step=5, **fields)


@pytest.mark.parametrize(
    "reports, codes, code, words",
    [
        ({0: told(1, error="ConnectionError: gone"), 1: told(2)}, {0: 1, 1: -9}, 137, "rank 1 .* was killed by SIGKILL"),
        ({0: told(2, error="ConnectionError: gone"), 1: told(1, error="ValueError: bad")}, {0: 1, 1: 1}, 1, "rank 1 .*bad"),
        ({0: told(2, code=75), 1: told(1, error="ValueError: bad")}, {0: 75, 1: 1}, 1, "rank 1 .*: ValueError: bad"),
        ({0: told(1, code=75), 1: told(2, error="ConnectionError: gone")}, {0: 75, 1: 1}, 75, "has saved"),
        ({0: told(1, code=75), 1: told(1)}, {1: -15}, 75, "has saved"),
        ({0: told(1)}, {0: -11}, 139, "rank 0 .* was killed by SIGSEGV$"),
        ({0: told(1)}, {0: -15}, 1, "ended before anything was saved"),
        ({0: told(1, code=3)}, {0: 3}, 3, "ended with exit code 3"),
        ({}, {}, 1, "ended before anything was saved"),
        ({0: told(1, error="RuntimeError: CUDA out of memory. Tried")}, {0: 1}, 1, "smaller batch or patch"),
    ],
)
def test_verdict_names_the_cause_and_not_what_followed(reports, codes, code, words):
    ended = module.explain_end(1, reports, codes, module.memory_kills())
    assert ended.code == code and re.search(words, str(ended)), str(ended)
    assert module.explain_end(0, reports, codes, 0) is None


def test_verdict_leaves_out_ranks_that_were_ended_later():
    reports, codes = {0: told(1), 1: told(2), 2: told(3, code=75)}, {0: -9, 1: -9, 2: 75}
    assert "rank 1 (step 5) was killed" in str(module.explain_end(1, reports, codes, 0, first={1}))
    assert module.explain_end(1, reports, codes, 0, first={2}).code == SAVED
    assert "rank 3 was killed" in str(module.explain_end(1, reports, {3: -9}, 0, first={2})), "it never reported"


def test_the_kernels_own_count_turns_the_guess_into_a_finding(monkeypatch):
    monkeypatch.setattr(module, "memory_kills", lambda: 5)
    assert "out of memory: the kernel has killed 2 processes" in module.memory_note(3)
    assert module.memory_note(5).startswith("probably out of memory")


def test_room_in_control_groups_of_version_one_and_two(tmp_path):
    own = tmp_path / "own"
    own.write_text("5:cpu:/job\n4:memory:/job/step\n0::/\n")
    for place, most in (("memory/job/step", 10**19), ("memory/job", 1000)):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "memory.limit_in_bytes").write_text(f"{most}\n")
        (tmp_path / place / "memory.usage_in_bytes").write_text("600\n")
        (tmp_path / place / "memory.stat").write_text("cache 50\ninactive_file 1\ntotal_inactive_file 30\n")
    assert module.cgroup_free_memory(tmp_path, own) == 1000 - 600 + 30
    own.write_text("0::/\n")
    assert module.cgroup_free_memory(tmp_path, own) is None
    assert module.cgroup_free_memory(tmp_path, tmp_path / "absent") is None


# One line before anything starts


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ("[]", "must hold one JSON object"),
        ('{"function": "a:b"}', "must be"),
        ('{"function": "a:b", "arguments": {}, "more": 1}', "must be"),
        ('{"function": "a.b", "arguments": {}}', "'module:function', got 'a.b'"),
    ],
)
def test_a_description_that_cannot_be_run_is_refused(tmp_path, text, words):
    (tmp_path / "spec.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_spec(tmp_path / "spec.json")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(processes=0), "processes must be positive, got 0"),
        (dict(nodes=2), "2 nodes need a rendezvous like 'host:29500', got ''"),
        (dict(patience=-1), "patience must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        launch(dict(function="a:b", arguments={}), **options)


def test_the_command_line_ends_in_one_line_for_a_missing_file(capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["missing.json", "--processes", "1"])
    assert ended.value.code == 1 and re.fullmatch(r"launch: .*missing\.json.*\n", capsys.readouterr().err)


def test_several_machines_meet_at_the_rendezvous(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    line = module.launch_command(tmp_path / "spec.json", 4, 2, "node1:29500", tmp_path)
    from torch.distributed.run import parse_args

    options = parse_args(line[line.index("agent") + 1 :])
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ("2", "4", "c10d")
    assert (options.rdzv_endpoint, options.rdzv_id) == ("node1:29500", "77")
    assert (options.module, options.training_script) == (True, "mednext_v2.training.launch")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_launches_of_one_process_are_one_run_of_two(start, tmp_path):
    options = ["--processes", "1", "--nodes", "2", "--rendezvous", f"localhost:{free_port()}"]
    runs = [start(greet, *options, words=["one", "run"]) for _ in range(2)]
    assert [finish(run)[0] for run in runs] == [0, 0]
    assert [(tmp_path / f"said{r}").read_text() for r in (0, 1)] == ["one run 2"] * 2


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (1, False)])
def test_the_slurm_script_puts_a_preempted_job_back_and_no_other(tmp_path, code, requeued):
    tools = {
        "srun": f'#!/bin/bash\necho "$@" > "{tmp_path}/asked"\nexit {code}\n',
        "scontrol": f'#!/bin/bash\n[ "$1" = show ] && echo node1 && echo node2\n[ "$1" = requeue ] && echo "$2" > "{tmp_path}/requeued"\nexit 0\n',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = dict(SLURM_JOB_ID="1042", SLURM_NNODES="2", SLURM_JOB_NODELIST="node[1-2]", SLURM_GPUS_ON_NODE="4")
    env = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(HERE.parent / "conf/slurm/train.sbatch"), "spec.json"]
    assert subprocess.run(script, env=env).returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    asked = (tmp_path / "asked").read_text()
    assert "--kill-on-bad-exit=1" in asked and "--rendezvous node1:29542" in asked
    line = asked[asked.index("spec.json") :].split()
    monitored = dict(zip(line[1::2], line[2::2]))
    assert (monitored["--processes"], monitored["--nodes"]) == ("4", "2")


# Memory

STEP = Step("mednext_v2_tiny", (64, 64, 64), batch_size=4, overrides=(("width", 8),))
MEASURED = Forecast(resident=10**8, memory=1.5, speed=1e9)


@cache
def needed_by_hand(step: Step) -> float:
    from mednext_v2.network.scaling import estimate, get_arch

    cost = estimate(get_arch("tiny", width=8), step.patch, step.batch_size, step.precision, step.grad_checkpointing, 1, 3, True)
    return 1e8 + 1.1 * 1.5 * (cost.activation_bytes + cost.working_bytes)


def parse(text: str) -> dict:
    "The change that a suggestion proposes"
    changes = dict(part.split(" ", 1) for part in text.split(" (")[0].split(", "))
    if "patch" in changes:
        changes["patch"] = tuple(map(int, changes["patch"].split(" x ")))
    return changes | ({"batch_size": int(changes["batch_size"])} if "batch_size" in changes else {})


def test_what_fits_passes_and_what_does_not_is_refused_with_changes_that_fit():
    need, seconds = check_memory(STEP, available=10**12, measured=MEASURED)
    assert need == pytest.approx(needed_by_hand(STEP)) and seconds > 0
    room = int(need * 0.6)
    with pytest.raises(ValueError, match=f"needs about {need / 1e9:.2f} GB, but a process can have {room / 1e9:.2f} GB") as no:
        check_memory(STEP, available=room, measured=MEASURED)
    suggestions = [line.strip() for line in str(no.value).splitlines()[1:]]
    assert {name for text in suggestions for name in parse(text)} == {"grad_checkpointing", "batch_size", "patch", "precision"}
    for text in suggestions:
        changed = replace(STEP, **parse(text))
        assert needed_by_hand(changed) <= room, text
        assert f"{needed_by_hand(changed) / 1e9:.2f} GB" in text
    batch = next(parse(text)["batch_size"] for text in suggestions if text.startswith("batch_size"))
    assert batch == 2, "no smaller than it must be"


def test_processes_share_the_memory_of_a_machine():
    need = check_memory(STEP, available=10**12, measured=MEASURED)[0]
    check_memory(STEP, available=2 * need + 2, processes=2, measured=MEASURED)
    with pytest.raises(ValueError, match="needs about"):
        check_memory(STEP, available=2 * need - 2, processes=2, measured=MEASURED)


def test_changes_are_combined_when_none_is_enough_and_nothing_is_made_up():
    low = int(needed_by_hand(replace(STEP, batch_size=1, grad_checkpointing="block"))) - 1
    found = module.suggest_changes(MEASURED.needed, STEP, low)
    assert all(needed_by_hand(replace(STEP, **parse(text))) <= low for text in found)
    low = int(needed_by_hand(replace(STEP, batch_size=1, grad_checkpointing="block", patch=(32, 32, 16)))) + 1
    found = module.suggest_changes(MEASURED.needed, STEP, low)
    assert len(found) == 1 and set(parse(found[0])) == {"grad_checkpointing", "batch_size", "patch"}
    assert parse(found[0])["batch_size"] == 1 and needed_by_hand(replace(STEP, **parse(found[0]))) <= low
    with pytest.raises(ValueError, match="nothing but a smaller network, or more memory"):
        check_memory(STEP, available=10**8, measured=MEASURED)


@pytest.mark.parametrize("stride", [16, 32])
def test_smaller_patches_stay_multiples_and_keep_two_voxels_at_the_bottom(stride):
    patches = list(module.smaller_patches((4 * stride, 2 * stride, stride), stride))
    assert patches[-1] in [(2 * stride, stride, stride), (stride, 2 * stride, stride)]
    assert all(side % stride == 0 and side > 0 for patch in patches for side in patch)
    assert [sum(a) - sum(b) for a, b in zip(patches, patches[1:])] == [stride] * (len(patches) - 1)


def test_cost_of_a_network_without_a_formula_is_what_autograd_keeps():
    import torch

    step = Step("unet", (32, 32, 32), batch_size=2, overrides=(("filters", (4, 8, 8)),))
    kept, model = {}, step.create()
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(torch.randn(2, 1, 32, 32, 32))
    real = sum(size for place, size in kept.items() if place not in weights)
    assert outputs and step.cost().activation_bytes == pytest.approx(real, rel=0.02)
    assert replace(step, batch_size=4).cost().activation_bytes == pytest.approx(2 * real, rel=0.02)


def test_a_dry_step_measures_memory_and_time(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    step = Step("mednext_v2_tiny", (32, 32, 32), overrides=(("width", 8),))
    measured = module.forecast(step)
    assert 5e7 < measured.resident < 2e9 and 0.3 < measured.memory < 5
    assert 0.01 < measured.seconds(step) < 100
    assert measured.seconds(replace(step, batch_size=2)) == pytest.approx(2 * measured.seconds(step))


def test_only_devices_with_memory_of_their_own_are_asked_for_it(monkeypatch):
    import types

    import torch

    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(torch, kind, types.SimpleNamespace(mem_get_info=lambda device: (7, 9)))
    assert module.available_memory("cuda:1") == module.available_memory("xpu") == 7
    assert module.available_memory("mps") > 10**6 and module.available_memory("cpu") > 10**6
    assert [module.has_own_memory(name) for name in ("cpu", "cpu:0", "mps", "cuda", "cuda:1")] == [False, False, False, True, True]
