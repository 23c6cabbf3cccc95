"""Every chapter runs from top to bottom, and the tests in it hold (nbdev's own runner)."""

import os
from pathlib import Path

import pytest

os.environ["IN_TEST"] = "1"
from nbdev.test import test_nb as run_notebook  # noqa: E402

run_notebook.__test__ = False
ROOT = Path(__file__).parents[1]
CHAPTERS = [*sorted((ROOT / "nbs").glob("[0-9]*.ipynb")), ROOT / "nbs/index.ipynb"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    passed, _ = run_notebook(path, skip_flags=["slow", "gpu"], basepath=ROOT)
    assert passed, f"nbs/{path.name}: see the traceback above"
