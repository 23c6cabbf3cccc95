"The folders that the code names are those that dvc.yaml hands from stage to stage, and git keeps what it should"

import re
import subprocess
from pathlib import Path

import pytest

from mednext_v2.core import read_yaml, root
from mednext_v2.study.paths import StudyPaths, scratch

ROOT = Path(__file__).parents[1]
STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]
PATHS = StudyPaths("mini")
CSVS = ("scores.csv", "ablations.csv", "models.csv", "features.csv", "rates.csv", "people.csv", "corpora.csv")
TABLES = ("digests.json", *CSVS, *(f"{name}.json" for name in CSVS), "metrics.json")
OUTS = {
    "suite": [PATHS.raw, PATHS.runs("suite")],
    "prepare": [PATHS.prepared, PATHS.runs("prepare")],
    "rates_pretrain": [PATHS.rates("pretrain", "CORPUS", "BACKBONE")],
    "rates_scratch": [PATHS.rates("finetune", "scratch", "BACKBONE")],
    "rates_finetune": [PATHS.rates("finetune", "CORPUS", "BACKBONE")],
    "pretrain": [PATHS.models("pretrain", "CORPUS", "BACKBONE"), PATHS.curves("pretrain", "CORPUS", "BACKBONE")],
    "scratch": [PATHS.models("finetune", "scratch", "BACKBONE"), PATHS.curves("finetune", "scratch", "BACKBONE")],
    "finetune": [PATHS.models("finetune", "CORPUS", "BACKBONE"), PATHS.curves("finetune", "CORPUS", "BACKBONE")],
    "released": [PATHS.models("released", "MODEL"), PATHS.evaluated("MODEL"), PATHS.runs("released", "MODEL")],
    "evaluate": [PATHS.evaluated("INIT", "BACKBONE")],
    "ablate": [PATHS.models("ablate", "ABLATION"), PATHS.runs("ablate", "ABLATION")],
    "features": [PATHS.runs("features")],
    "collect": [*(PATHS.results / name for name in TABLES), PATHS.runs("collect")],
    "paper": [PATHS.page("ITEM"), PATHS.runs("paper", "ITEM")],
    "qualitative": [PATHS.page("qualitative"), PATHS.runs("paper", "qualitative")],
    "weights": [PATHS.results / "weights", PATHS.runs("weights")],
    "architecture": [PATHS.page("architecture"), PATHS.runs("paper", "architecture")],
}


def paths_in(stage: str, kind: str) -> set[str]:
    "Outputs or dependencies of a stage for the profile mini, each axis by its name in capitals"
    texts = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in STAGES[stage][kind]]
    return {re.sub(r"\$\{item\.(\w+)\}", lambda match: "mini" if match[1] == "profile" else match[1].upper(), text) for text in texts}


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_of_a_stage_are_where_the_code_says(stage):
    assert paths_in(stage, "outs") == {path.relative_to(root()).as_posix() for path in OUTS[stage]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_what_an_earlier_one_wrote(stage):
    earlier, written = list(STAGES)[: list(STAGES).index(stage)], set()
    for name in earlier:
        written |= paths_in(name, "outs")
    for path in paths_in(stage, "deps"):
        if re.match(r"(data/(raw|prepared)|models|runs|results)/", path):
            path = re.sub(r"/(INIT|CORPUS)\b", "/(scratch|INIT|CORPUS|MODEL)", path).replace("ablate/grn", "ablate/ABLATION")
            assert any(re.match(path, out) or path.startswith(f"{out}/") for out in written), f"{stage} reads {path}, which no stage before it writes"


@pytest.mark.parametrize("profile, kept", [("smoke", False), ("mini", True), ("study", True)])
def test_git_keeps_results_and_no_more(profile, kept):
    paths = StudyPaths(profile)
    ignored = [paths.raw, paths.prepared, paths.models("pretrain"), paths.runs("evaluate"), scratch("folds")]
    asked = [*ignored, paths.results / "scores.csv", paths.page("claims") / "claims.csv"]
    names = [path.relative_to(root()).as_posix() + ("" if path.suffix else "/") for path in asked]
    done = subprocess.run(["git", "check-ignore", "--no-index", *names], cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) == set(names[: len(ignored)] if kept else names)


def test_only_the_chapter_of_paths_spells_them_out():
    spelled = re.compile(r'root\(\)\s*/\s*f?\\?"(data/raw|data/prepared|models|runs|results|scratch)\b')
    chapters = [path for path in (ROOT / "nbs").rglob("*.ipynb") if path.name != "25_paths.ipynb"]
    assert [path.name for path in chapters if spelled.search(path.read_text(encoding="utf-8"))] == []


def test_paths_follow_the_project_and_the_profile(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    paths = StudyPaths("paper")
    assert paths.parent("scratch", "unet") is None
    assert paths.parent("corpus_ct", "unet") == tmp_path / "models/paper/pretrain/corpus_ct/unet/corpus_ct-s0"
    assert paths.parent("corpus_ct", "unet", seed=2) == tmp_path / "models/paper/pretrain/corpus_ct/unet/corpus_ct-s2"
    assert not list(tmp_path.glob("*/"))
