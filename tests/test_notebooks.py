"""Every chapter runs from top to bottom, and the tests in it hold: nbdev's own runner, a process of its own each."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path for path in (ROOT / "nbs").iterdir() if path.is_dir() and path.name not in ("pipeline", "paper"))
CHAPTERS = [*(path for folder in (ROOT / "nbs", *FOLDERS) for path in sorted(folder.glob("[0-9]*.ipynb"))), ROOT / "nbs/index.ipynb"]
RUN = """
import os, sys
from pathlib import Path
os.environ["IN_TEST"] = "1"
from nbdev.test import test_nb
path, root = map(Path, sys.argv[1:])
sys.exit(not test_nb(path, skip_flags=["slow", "gpu"], basepath=root)[0])
"""


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: str(path.relative_to(ROOT / "nbs").with_suffix("")))
def test_chapter(path):
    command = [sys.executable, "-c", RUN, str(path), str(ROOT)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    assert done.returncode == 0, f"{path.relative_to(ROOT)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
