"Numbers in the README and in the prose of the paper's notebooks: each is a name, or is counted here anew"

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from mednext_v2.data.datasets import get_dataset
from mednext_v2.models.registry import BACKBONES
from mednext_v2.network.scaling import build_mednext, count_parameters
from mednext_v2.report.claims import CLAIMS, ledger_markdown
from mednext_v2.report.forecast import profile_params
from mednext_v2.report.speed import block_ranges, block_runs, read_benchmark, speed_sentence
from mednext_v2.report.tables import published
from mednext_v2.study.schedule import Schedule, forecast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WORDS = dict(zip("one two three four five six seven eight nine ten".split(), range(1, 11))) | {"twenty": 20}
NAMES = (
    r"MedNeXt-v[12]|MedNeXtv[12]|mednext_v2|\bv[12]\b|\b3D\b|arXiv:[\d.]+|Roy et al\., \d{4}|Python 3\.\d+|HDF5|Apache-2\.0|A100|H100"
    r"|ResEnc-L|100 − DSC|95 % (bootstrap )?interval"
)


def prose(text: str) -> str:
    "Text without code, outputs, tables, targets of links and names that have a digit"
    text = re.sub(r"```.*?```|^    .*?$|^\|.*?$", "", text, flags=re.S | re.M)
    return re.sub(NAMES, "", re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|<!--.*?-->", "", text))


def wide() -> int:
    with torch.device("meta"):
        return count_parameters(build_mednext("wide", 1, 3))


def hours(profile: str) -> float:
    "Of training, two side by side"
    return pd.read_csv(ROOT / "results" / profile / "models.csv").seconds.sum() / 2 / 3600


def repro_stages() -> list:
    return json.loads((ROOT / "benchmarks/results/repro.json").read_text())["stages"]


FACTS = {  # What the README says, and what it is
    r"\(([\d,]+) parameters\)": lambda: f"{wide():,}",
    r"\b(\d+) steps show that": lambda: re.search(r"--recipe-set steps=(\d+)", README)[1],
    r"scans at (\d+) mm": lambda: f"{get_dataset('abdomen_ct').spacing[0]:g}",
    r"a step of Base on (\d+)³": lambda: str(read_benchmark("gpu_trial")["case"]["side"]),
    r"made on (\d+),000 scans": lambda: re.search(r"CADS \((\d+)k CT\)", " ".join(published().query("backbone == 'mednext_v2_base'").pretraining))[1],
    r"\bOne registry holds (\d+) networks": lambda: str(len(BACKBONES)),
}
COUNTED = {  # The same for numbers in words
    r"on (\w+) real scans": lambda: len(list((ROOT / "data/seeds").glob("*_label.nii.gz"))),
    r"deformed into (\w+) tasks": lambda: len(profile_params("mini")["axes"]["tasks"]),
    r"(\w+) networks of equal arithmetic": lambda: len(profile_params("study")["axes"]["backbones"]),
    r"on (\w+) tasks made from": lambda: len(profile_params("study")["axes"]["tasks"]),
    r"the heads of (\w+) people": lambda: sum(profile_params("study")["people"]["counts"]),
    r"(\w+) whole trainings of every arm": lambda: len(profile_params("study")["seeds"]),
    r"about (\w+) hours on two cores": lambda: round(forecast(Schedule()).hours["all"]),
    r"takes about (\w+) minutes in a fresh clone": lambda: int(sum(seconds for *_, seconds in repro_stages()) / 60),
    r"own settings, (\w+) folds": lambda: len(profile_params("paper")["axes"]["folds"]),
    r"folds and (\w+) public pretrained": lambda: len(profile_params("paper")["axes"]["released"]),
    r"the paper's (\w+) claims": lambda: len(CLAIMS),
}


@pytest.mark.parametrize("pattern", FACTS)
def test_a_number_of_the_readme_is_what_it_counts(pattern):
    assert set(re.findall(pattern, prose(README))) == {FACTS[pattern]()}


@pytest.mark.parametrize("pattern", COUNTED)
def test_a_number_in_words_is_what_it_counts(pattern):
    found = re.findall(pattern, prose(README))
    assert found and {WORDS[word.lower()] for word in found} == {COUNTED[pattern]()}


def test_the_readme_has_no_other_number():
    kept = re.sub(r"(?m)^Rules `.*$", "", README)  # Hashes and dates, below the ledger
    text = prose(kept.replace(speed_sentence(block_ranges(block_runs())), ""))  # tests/test_speed.py
    for pattern in FACTS:
        text = re.sub(pattern, "", text)
    assert not re.findall(r".{0,30}\d.{0,30}", text)


def test_the_ledger_of_the_readme_is_that_of_the_committed_results():
    assert ledger_markdown("mini").split("\n\n")[0] in README  # The line on the rules needs the history


def test_the_time_that_the_readme_names_is_that_of_the_committed_run():
    "Trainings, two side by side, are a third of it or more"
    assert 0.33 < hours("mini") / (sum(seconds for *_, seconds in repro_stages()) / 3600) < 1


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/paper").glob("*.ipynb")), ids=lambda path: path.stem)
def test_prose_beside_a_figure_holds_no_number(path):
    cells = json.loads(path.read_text())["cells"]
    text = prose("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"))
    assert not re.findall(r".{0,30}\d.{0,30}", text)
