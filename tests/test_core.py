"""Atomic writes: what kill -9 leaves, and writers that meet."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from mednext_v2 import core
from mednext_v2.core import FolderKind, atomic_file, lock_handle, remove_leftover

PART = FolderKind("folder of the tests", ("part",))

FORK = multiprocessing.get_context("fork")


def atomic_folder(path: Path):
    return core.atomic_folder(path, PART)


def write_and_wait(path: Path, kind: str, inside, leave) -> None:
    "Hold an atomic write open until told to go on"
    with (atomic_file if kind == "file" else atomic_folder)(path) as temporary:
        (temporary if kind == "file" else temporary / "part").write_text("half")
        inside.set()
        leave.wait(60)


def start(path: Path, kind: str) -> tuple:
    inside, leave = FORK.Event(), FORK.Event()
    process = FORK.Process(target=write_and_wait, args=(path, kind, inside, leave))
    process.start()
    assert inside.wait(60)
    return process, leave


def write(path: Path, kind: str) -> None:
    with (atomic_file if kind == "file" else atomic_folder)(path) as temporary:
        (temporary if kind == "file" else temporary / "part").write_text("whole")


def content(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_next_write_removes_what_a_killed_one_left(tmp_path, kind):
    path = tmp_path / "scan.nii.gz"
    write(path, kind)
    for _ in range(2):
        process, _ = start(path, kind)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 2 and content(path) == "whole"
    write(path, kind)
    assert list(tmp_path.iterdir()) == [path] and content(path) == "whole"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_living_process_writes_stays(tmp_path, kind):
    path = tmp_path / "scan.nii.gz"
    dead, _ = start(path, kind)
    living, leave = start(path, kind)
    dead.kill()
    dead.join()
    write(path, kind)  # Removes the one, passes over the other
    assert len(list(tmp_path.iterdir())) == 2 and content(path) == "whole"
    leave.set()
    living.join(60)
    assert living.exitcode == 0 and content(path) == "half" and list(tmp_path.iterdir()) == [path]


def test_other_targets_and_links_are_not_touched(tmp_path):
    other = tmp_path / ".tmp-0-other.txt"
    other.write_text("another target's")
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / ".tmp-0-scan.txt").symlink_to(kept)
    write(tmp_path / "scan.txt", "file")
    assert other.exists() and kept.is_dir() and (tmp_path / "scan.txt").read_text() == "whole"


def test_without_locks_nothing_is_removed_and_writes_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "lock_handle", lambda handle, wait=False: False)
    (tmp_path / ".tmp-0-a.txt").write_text("unknown")
    write(tmp_path / "a.txt", "file")
    assert (tmp_path / ".tmp-0-a.txt").read_text() == "unknown" and (tmp_path / "a.txt").read_text() == "whole"


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    "Threads that write, beside one that removes whatever nobody locks"
    path, end, wrong = tmp_path / "a.txt", time.monotonic() + 2, []

    def writer(letter: str) -> None:
        while time.monotonic() < end:
            try:
                with atomic_file(path) as temporary:
                    temporary.write_text(letter * 1000)
                if len(set(path.read_text())) != 1:
                    wrong.append("torn")
            except OSError as error:
                wrong.append(error)

    def remover() -> None:
        while time.monotonic() < end:
            for number in range(6):
                remove_leftover(tmp_path / f".tmp-{number}-a.txt")

    threads = [threading.Thread(target=writer, args=(letter,)) for letter in "abcd"] + [threading.Thread(target=remover)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and list(tmp_path.iterdir()) == [path]


def test_error_in_the_block_leaves_the_old(tmp_path):
    path = tmp_path / "cases"
    write(path, "folder")
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        shutil.rmtree(temporary)  # Even if the block took it away
        raise RuntimeError
    assert content(path) == "whole" and list(tmp_path.iterdir()) == [path]


def test_lock_is_one_process_s(tmp_path):
    (tmp_path / "a").touch()
    handles = [os.open(tmp_path / "a", os.O_RDONLY) for _ in range(2)]
    assert lock_handle(handles[0]) and not lock_handle(handles[1])
    os.close(handles[0])
    assert lock_handle(handles[1])
    os.close(handles[1])
