"""What a kill, a second run or a wrong folder may not do."""

import errno
import os
import subprocess
import sys

import pytest
from mednext_v2 import core
from mednext_v2.core import NEW, Kind, atomic_files, atomic_folder, check_output, held
from mednext_v2.prepare import remove_others
from mednext_v2.weights import MODEL_FOLDER

HOLD = """
import sys, time
from mednext_v2.core import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", [NEW, MODEL_FOLDER, Kind("part", ("a",), ("b",))])
def test_a_folder_that_is_not_ours_a_link_and_a_file_are_refused(tmp_path, kind):
    place = tmp_path / "models"
    (place / "spleen").mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    (tmp_path / "file").write_text("a file")
    for wrong, message in (("models", "spleen.*will not be replaced"), ("link", "is a link"), ("file", "is a file"), ("file/below", "is a file")):
        with pytest.raises(FileExistsError, match=message):
            check_output(tmp_path / wrong, kind)
        with pytest.raises(FileExistsError, match=message), atomic_folder(tmp_path / wrong, kind):
            pytest.fail("nothing may be written before the check")
    assert (place / "spleen").is_dir() and (tmp_path / "file").read_text() == "a file"


def test_a_rename_that_fails_leaves_the_older_folder(tmp_path, monkeypatch):
    part, path, real = Kind("part", ("a",)), tmp_path / "out", os.replace
    path.mkdir()
    (path / "a").write_text("old")

    def fails(old, new):
        if ".tmp-" in str(old):
            raise OSError(errno.EIO, "broken")
        real(old, new)

    monkeypatch.setattr(core.os, "replace", fails)
    with pytest.raises(OSError, match="broken"), atomic_folder(path, part) as temporary:
        (temporary / "a").write_text("new")
    assert (path / "a").read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_second_is_told_who_holds_a_folder_and_a_dead_one_holds_nothing(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {first.pid} on "), held(tmp_path):
        pass
    first.kill()
    first.wait()
    with held(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_files_that_belong_together_appear_together(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(core.os, "fsync", full)
    with pytest.raises(OSError, match="No space"), atomic_files(*paths, instead=paths[:1]) as new:
        for path in new:
            path.write_text("new")
    assert [path.read_text() for path in paths] == ["old", "old"] and len(list(tmp_path.iterdir())) == 2


def test_a_living_neighbour_and_foreign_folders_stay_in_prepared_cases(tmp_path):
    for name in ("a.0123456789abcdef", "b.0123456789abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "case.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    with atomic_folder(tmp_path / "c.0123456789abcdef") as living:
        remove_others(tmp_path, {"a.0123456789abcdef"})
        assert living.is_dir()
        assert {path.name for path in tmp_path.iterdir()} == {"a.0123456789abcdef", "mine", living.name}
