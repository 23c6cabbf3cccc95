"Commands in forked processes, which can be killed where a file or a folder gets its name"

import json
import multiprocessing
import os
import time
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path

# Whatever a command imports is imported once, before the forks: unused here
# ruff: noqa: F401
import accelerate
import matplotlib.figure
import monai.losses
import pytest
import torch
import torch._dynamo

from mednext_v2 import cli, finetuning
from mednext_v2.data import preprocess
from mednext_v2.evaluation import metrics
from mednext_v2.intake import check, convert
from mednext_v2.study import seeds
from mednext_v2.training import trainer
from mednext_v2.zoo import importers

if find_spec("dvclive"):
    import dvclive

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])
VOLATILE = ("seconds", "peak_bytes")  # Of a report


def watch(root: Path, at) -> None:
    "From now on every name that is given below a folder is told to `at(name)`, before it is given and, as `name + '!'`, after"

    def watched(real):
        def call(source, target, *given, **more):
            place = Path(os.fspath(target)).absolute()
            inside = place.is_relative_to(root)
            name = place.relative_to(root).as_posix() if inside else ""
            if inside:
                at(name)
            real(source, target, *given, **more)
            if inside:
                at(name + "!")

        return call

    for name in ("replace", "rename", "link"):
        setattr(os, name, watched(getattr(os, name)))


class Nth:
    "Ends the process at the n-th commit, before or after it"

    def __init__(self, number: int, after: bool):
        self.left, self.after = number, after

    def __call__(self, name: str) -> None:
        self.left -= name.endswith("!") == self.after
        if self.left == 0:
            os._exit(9)


class New:
    "Ends the process at the first commit of a name that no process before it was ended at"

    def __init__(self, list_: Path, after: bool):
        self.list, self.after = list_, after

    def __call__(self, name: str) -> None:
        known = self.list.read_text().splitlines() if self.list.exists() else []
        if name.endswith("!") == self.after and name not in known:
            self.list.write_text("\n".join([*known, name]))
            os._exit(9)


class Meet:
    "Waits at the first commit until a file is there, so that another process finds this one at work"

    def __init__(self, here: Path, go: Path):
        self.here, self.go = here, go

    def __call__(self, name: str) -> None:
        self.here.touch()
        end = time.monotonic() + 60
        while not self.go.exists() and time.monotonic() < end:
            time.sleep(0.01)


def _command(line: list[str], log: Path, root: Path, at) -> None:
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # Of what reads ahead: quick to start
    if at is not None:
        watch(root, at)
    cli.main(line)


def start(line: list, log: Path, root: Path, at=None):
    "A command in a process of its own"
    with pytest.MonkeyPatch.context() as patch:  # The server that is forked from finds this module
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    process = SERVER.Process(target=_command, args=([str(word) for word in line], log, root, at))
    process.start()
    return process


def ended(process) -> int:
    "Exit code"
    process.join(120)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def tree(root: Path, without: tuple[str, ...] = ()) -> dict[str, object]:
    "What lies below a folder, without what differs each time"

    def content(path: Path):
        if path.suffix == ".json" and not path.name.startswith(".") and isinstance(value := json.loads(path.read_text()), dict):
            return {name: one for name, one in value.items() if name not in VOLATILE}
        return path.read_bytes()

    paths = [path for path in sorted(root.rglob("*")) if not path.relative_to(root).as_posix().startswith(without or ("\0",))]
    return {path.relative_to(root).as_posix(): content(path) if path.is_file() else None for path in paths}
