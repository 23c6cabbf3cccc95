"The tables that pages and claims read: headline means, rows that others trained, people, corpora by person, rates"

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from mednext_v2.core import read_csv, root, write_csv
from mednext_v2.data.preprocess import Prepared, prepare_all
from mednext_v2.report import collect as collected
from mednext_v2.report.collect import collect, corpora_table, headline_rows, with_shared
from mednext_v2.scoring.ablations import MODEL_COLUMNS, Ablation, Variant, limit_cases
from mednext_v2.scoring.evaluate import SCORE_COLUMNS
from mednext_v2.study.people import build_people, people_table
from mednext_v2.study.plan import StudyPlan
from mednext_v2.study.rates import TRIAL_COLUMNS
from mednext_v2.study.seeds import build_dataset

ROOT = Path(__file__).parents[1]
PLAN = StudyPlan("toy", ("people_ct",), ("unet",), ("scratch", "people_ct"), ("brain_mr",), (0,), further=("corpus_ct",), ablations=("modality",))
NAMES = ("people_ct", "corpus_ct", "brain_mr")


def rows(*changes, **same) -> pd.DataFrame:
    about = dict(
        profile="toy", task="t", case="c", person="p", scans="synthetic", split="test", label="a", group="organ", backbone="unet", init="scratch", seed=0
    )
    return pd.DataFrame([about | dict(dsc=0.5, nsd=0.5) | same | change for change in changes]).reindex(columns=SCORE_COLUMNS)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project with raw and prepared data of people, of deformed seeds, and a corpus of both"
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data/datasets.yaml", folder / "data")
    raw, seeds = folder / "data/raw/toy", root() / "data/seeds"
    build_people("people_ct", seeds / "people", raw, images=(2, 1, 1, 1), counts=(2, 1, 1, 1))
    build_dataset("corpus_ct", seeds, raw, (2, 1, 0))
    build_dataset("brain_mr", seeds, raw, (1, 1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_all(NAMES, raw, folder / "data/prepared/toy")
    return folder


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


def test_headline_is_of_test_people_and_real_scans_count_where_there_is_nothing_else(tmp_path):
    table = pd.concat([
        rows(dict(case="c1", person="p1"), dict(case="c2", person="p2", dsc=0.7)),
        rows(dict(case="v", person="v"), split="validation", dsc=0.1), rows(dict(case="r", person="ctH"), scans="real", dsc=0.2),
        rows(dict(case="c", person="q"), task="u", scans="real", dsc=0.9), rows(dict(case="c", person="q"), task="d", scans="deformed", dsc=0.3),
    ])  # fmt: skip
    kept = headline_rows(table)
    assert sorted(zip(kept.task, kept.scans, kept.dsc)) == [("d", "deformed", 0.3), ("t", "synthetic", 0.5), ("t", "synthetic", 0.7), ("u", "real", 0.9)]
    write_csv(tmp_path / "in/unet/scores.csv", table)
    found = collect(tmp_path / "in", tmp_path / "out")
    assert len(found) == len(table) and list(read_csv(tmp_path / "out/scores.csv")) == SCORE_COLUMNS
    assert json.loads((tmp_path / "out/metrics.json").read_text())["unet"]["scratch"]["dsc"] == pytest.approx((0.6 + 0.9 + 0.3) / 3)


def test_corpora_by_person_and_with_fewer_cases(here, monkeypatch):
    variants = dict(ct=Variant(), few=Variant(corpus_cases=2), one=Variant(corpus_cases=3), seeds=Variant(corpus="corpus_ct"))
    monkeypatch.setattr(collected, "read_ablation", lambda profile, name: (SimpleNamespace(variants=variants), PLAN))
    table = corpora_table(PLAN)
    assert list(table) == ["variant", "person"] and not table.duplicated().any()
    people = {name: sorted(part.person) for name, part in table.groupby("variant")}
    prepared = Prepared(here / "data/prepared/toy/people_ct")
    all_of_them = sorted({case.split("_")[2] for case in prepared.ids("train")})
    assert len(all_of_them) == 2 and people == {"ct": all_of_them, "few": all_of_them[:1], "one": all_of_them, "seeds": ["ctA", "ctH"]}
    trained = Prepared(limit_cases(prepared.folder, 2, here / "few/people_ct")).ids("train")  # What the variant is trained on
    assert {case.split("_")[2] for case in trained} == set(people["few"])
    validated = {case.split("_")[2] for case in prepared.ids("val")}
    assert not validated & set(table.person)
    none = StudyPlan("toy", ("people_ct",), ("unet",), ("scratch",), ("brain_mr",), (0,))
    assert list(corpora_table(none)) == ["variant", "person"] and corpora_table(none).empty


def test_people_of_every_data_set_from_raw_and_prepared_alike(here):
    raw, prepared = here / "data/raw/toy", here / "data/prepared/toy"
    table = people_table(NAMES, raw, prepared)
    pd.testing.assert_frame_equal(table, people_table(NAMES, raw))
    found = table.set_index(["task", "split"])
    assert found.loc[("people_ct", "train"), ["people", "images", "as_mapped", "deformations", "synthetic"]].tolist() == [2, 4, 2, 2, 4]
    assert found.loc[("brain_mr", "test"), ["people", "images", "as_mapped", "deformations", "synthetic", "scans"]].tolist() == [1, 2, 1, 1, 0, "deformed"]
    assert found.loc[("brain_mr", "train"), "people"] == 1 and found.loc[("corpus_ct", "train"), "people"] == 2


def test_people_of_real_data_are_counted_without_their_raw_files(here, tmp_path):
    table = people_table(["brain_mr"], tmp_path / "nothing", here / "data/prepared/toy").set_index("split")
    assert set(table.scans) == {"real"} and table.images.to_dict() == {"train": 1, "val": 1, "test": 2} and table.without_finding.isna().all()


def test_all_tables_are_written_with_rows_that_others_trained(here, tmp_path, monkeypatch):
    described = Ablation("modality", dict(full=Variant("unet", trained_by="main"), frozen=Variant("unet")), ("brain_mr",), ("pretrained",), (0,))
    monkeypatch.setattr(collected, "read_ablation", lambda profile, name: (described, PLAN))
    model = dict.fromkeys(MODEL_COLUMNS, 1) | dict(ablation="", variant="", backbone="unet", init="people_ct", task="brain_mr", seed=0, role="finetune")
    monkeypatch.setattr(collected, "main_models", lambda *rest: [model, model | dict(task="people_ct", init="scratch", role="pretrain")])
    monkeypatch.setattr(collected, "write_result", lambda path, table: write_csv(path, table))
    tuned = dict(task="brain_mr", init="people_ct")
    main = rows(tuned, tuned | dict(case="v", split="validation"), dict(task="brain_mr"))
    own = rows(tuned | dict(dsc=0.4)).assign(ablation="modality", variant="frozen")
    runs = here / "runs/toy"
    write_csv(runs / "evaluate/one/scores.csv", main)
    write_csv(runs / "ablate/modality/scores.csv", own[["ablation", "variant", *SCORE_COLUMNS]])
    write_csv(runs / "ablate/modality/models.csv", pd.DataFrame([model | dict(ablation="modality", variant="frozen")])[MODEL_COLUMNS])
    trials = pd.DataFrame([("unet", "scratch", 0.01, "people_ct", 0.4), ("unet", "scratch", 0.003, "people_ct", 0.5)], columns=list(TRIAL_COLUMNS))
    for place in ("pretrain/people_ct-unet", "finetune/scratch-unet"):
        write_csv(runs / "rates" / place / "trials.csv", trials)
    tables = collected.collect_tables("toy", PLAN)
    assert set(tables) == {"ablations", "models", "features", "rates", "people", "corpora"}
    for name, table in tables.items():
        assert list(read_csv(here / f"results/toy/{name}.csv")) == list(table), name
    found = tables["ablations"]
    assert list(found) == ["ablation", "variant", *SCORE_COLUMNS]
    assert dict(zip(found.variant, found.dsc)) == {"frozen": 0.4, "full": 0.5} and len(found) == 2 and set(found.split) == {"test"}
    models = tables["models"]
    assert [(row.ablation or "", row.variant or "", row.role) for row in models.fillna("").itertuples()] == [
        ("", "", "finetune"), ("", "", "pretrain"), ("modality", "frozen", "finetune"), ("modality", "full", "finetune"),
    ]  # fmt: skip
    assert len(tables["rates"]) == 4 and tables["features"].empty and set(tables["corpora"].variant) == {"full", "frozen"}
    shutil.rmtree(runs)


def test_an_ablation_whose_rows_nobody_made_is_named(monkeypatch):
    described = Ablation("modality", dict(full=Variant("unet", trained_by="main")), ("brain_mr",), ("pretrained",), (0,))
    monkeypatch.setattr(collected, "read_ablation", lambda profile, name: (described, PLAN))
    nothing = rows(dict(task="brain_mr"))
    with pytest.raises(ValueError, match="ablation modality, full: main has no rows for it"):
        with_shared(PLAN, nothing, nothing.assign(ablation="x", variant="y"))
