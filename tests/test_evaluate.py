"Scores of validation, test and real scans by person; an evaluation that was killed goes on where it was"

import shutil
import signal
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from kill_toys import SERVER
from mednext_v2.core import root
from mednext_v2.data.datasets import get_dataset, list_cases, read_case
from mednext_v2.data.preprocess import Prepared, prepare_all
from mednext_v2.evaluation.metrics import score_case
from mednext_v2.scoring import evaluate
from mednext_v2.scoring.evaluate import SCORE_COLUMNS, evaluate_one, evaluate_runs, held_out
from mednext_v2.study.people import build_people
from mednext_v2.study.runs import TrainingRun, train_runs
from mednext_v2.study.seeds import build_dataset
from mednext_v2.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
RECIPE = Recipe(steps=2, batch_size=1, patch=(32, 32, 32), lr=1e-2, warmup=1, augment="light", checkpoint_every=2)
SMALL = {"filters": (2, 4, 8)}
BLEED = "people_bleed_ct"
RUNS = [TrainingRun("toy", "unet", "scratch", BLEED, seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A project with raw and prepared data and two models"
    folder = tmp_path_factory.mktemp("project")
    (folder / "dvc.yaml").write_text("stages: {}\n")
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data/datasets.yaml", folder / "data")
    build_people(BLEED, root() / "data/seeds/people", folder / "raw", images=(1, 1, 1, 1), counts=(1, 1, 1, 8))
    for image in (folder / "raw").glob("*/images*/*"):
        label = image.parents[1] / image.parent.name.replace("images", "labels") / image.name.replace("_0000", "")
        if "Ts" in image.parent.name and not any(name in image.name for name in chosen_tests(folder)):
            image.unlink(), label.unlink()
        else:
            crop(image, label)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_all((BLEED,), folder / "raw", folder / "prepared")
        train_runs(RUNS, RECIPE, SMALL, folder / "prepared", folder / "models", folder / "curves")
    return folder


def chosen_tests(folder) -> list[str]:
    "The test person without a bleed, and one with"
    table = pd.read_csv(folder / "raw" / get_dataset(BLEED).folder / "provenance.csv").query("split == 'test'")
    healthy = table.how.str.contains("no haemorrhage")
    assert healthy.sum() == 1
    return [table.case[healthy].iloc[0], table.case[~healthy].iloc[0]]


def crop(*paths: Path) -> None:
    "A box about the bleed, or the middle of what is labelled, is enough"
    labels = np.asarray(nibabel.load(paths[1]).dataobj)
    middle = np.argwhere(labels == (4 if 4 in labels else labels.max())).mean(0).round().astype(int)
    box = tuple(slice(first, first + 32) for first in np.clip(middle - 16, 0, np.array(labels.shape) - 32))
    for path in paths:
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[box], image.affine), path)


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    yield place
    for path in [place / "out", *place.glob("scratch/evaluate-*")]:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def whole(place):
    "Scores of both models, the table's bytes and the label maps"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        scores = evaluate_runs(RUNS, **places(place) | {"out": place / "whole"})
    return scores, place / "whole"


def first(scores: pd.DataFrame) -> pd.DataFrame:
    "Those of the first model"
    return scores[scores.seed == RUNS[0].seed].reset_index(drop=True)


def places(folder) -> dict:
    return dict(models=folder / "models", data=folder / "prepared", raw=folder / "raw", out=folder / "out", overlap=0.25)


def test_rows_say_whose_scan_which_split_and_what_it_is(here, whole):
    scores, out = first(whole[0]), whole[1]
    assert list(scores) == SCORE_COLUMNS and whole[0].seed.nunique() == 2
    healthy, bleeding = chosen_tests(here)
    real = scores[scores.scans == "real"]
    assert set(real.label) == {"bone", "haemorrhage"} and set(real.person) == {"ctH"} and set(real.split) == {"test"}
    made = scores[scores.scans != "real"]
    assert set(made.scans) == {"synthetic"} and made.groupby("split").person.nunique().to_dict() == {"test": 2, "validation": 1}
    assert set(made.case[made.split == "test"]) == {healthy, bleeding} and (made.person == made.case.str.extract(r"_(hd\d\d)_")[0]).all()
    assert made.groupby("case").label.nunique().eq(4).all() and not scores.duplicated(["case", "label"]).any()
    kept = {path.name.removesuffix(".nii.gz") for path in (out / "predictions" / RUNS[0].name).glob("*.nii.gz")}
    assert kept == {healthy, bleeding, f"{BLEED}_ctH"}  # Of validation cases no label map is kept
    assert not list(here.glob("scratch/evaluate-*"))
    pd.testing.assert_frame_equal(whole[0], pd.read_csv(out / "scores.csv"), check_dtype=False)


def test_ablations_score_tests_and_real_scans_alone(here, whole):
    alone = evaluate_one(here / "models" / RUNS[0].name, here / "prepared", here / "raw", here / "out", RUNS[0], 0.25)
    assert set(alone.split) == {"test"} and set(alone.scans) == {"synthetic", "real"}
    both = first(whole[0])
    pd.testing.assert_frame_equal(alone[SCORE_COLUMNS].reset_index(drop=True), both[both.split == "test"].reset_index(drop=True), rtol=1e-5)
    for splits, found in ((("val",), {"validation"}), (("test", "val"), {"validation", "test"})):
        assert set(held_out(Prepared(here / "prepared" / BLEED), here / "raw", splits)[1].split) == found
    for wrong, word in ((("train",), "got train"), ((), "got none"), (("val", "real"), "got real")):
        with pytest.raises(ValueError, match=f"splits must be some of val, test, {word}"):
            held_out(Prepared(here / "prepared" / BLEED), here / "raw", wrong)


def test_a_person_without_a_finding_counts_as_zero_where_one_is_invented_and_is_left_out_where_none_is(here, whole):
    dataset, (healthy, bleeding) = get_dataset(BLEED), chosen_tests(here)
    cases = {case.id: read_case(dataset, case) for case in list_cases(dataset, here / "raw")}
    scan, value = cases[healthy], dataset.labels["haemorrhage"]
    assert value not in scan.label and value in cases[bleeding].label

    def bleed(guess):
        table = score_case(guess, scan.label, dataset.spacing, dataset).set_index("label")
        assert (table.dsc.drop("haemorrhage") > 0.9).all()
        return table.loc["haemorrhage"]

    right = bleed(scan.label)
    assert np.isnan(right.dsc) and np.isnan(right.nsd) and np.isnan(right.lesion_f1) and right.n_voxels == right.n_predicted == 0
    wrong = scan.label.copy()
    wrong[tuple(np.argwhere(scan.label == dataset.labels["brain"])[500])] = value
    assert bleed(wrong).dsc == bleed(wrong).nsd == 0 and bleed(wrong).n_fp == 1
    scores = first(whole[0]).query("label == 'haemorrhage'").set_index("case")
    row = scores.loc[healthy]
    assert row.n_voxels == 0 and (np.isnan(row.dsc) if row.n_predicted == 0 else row.dsc == 0)
    assert scores.loc[bleeding].dsc >= 0


def test_a_case_without_an_origin_is_refused(here, tmp_path):
    raw = shutil.copytree(here / "raw", tmp_path / "raw")
    file = raw / get_dataset(BLEED).folder / "provenance.csv"
    table = pd.read_csv(file)
    healthy = chosen_tests(here)[0]
    table[table.case != healthy].to_csv(file, index=False)
    with pytest.raises(ValueError, match=f"provenance.csv does not say whose scan {healthy} is: build the data set anew"):
        held_out(Prepared(here / "prepared" / BLEED), raw)


def test_deformed_seeds_and_other_data_are_called_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    build_dataset("brain_lesion_mr", root() / "data/seeds", tmp_path / "raw", (2, 1, 1))
    prepare_all(("brain_lesion_mr",), tmp_path / "raw", tmp_path / "prepared")
    prepared = Prepared(tmp_path / "prepared/brain_lesion_mr")
    cases, about, labelled = held_out(prepared, tmp_path / "raw", ("val", "test"))
    assert about.scans.tolist() == ["deformed"] * 2 and about.person.tolist() == ["mrP", "mrQ"] and not labelled
    (tmp_path / "raw" / get_dataset("brain_lesion_mr").folder / "provenance.csv").unlink()
    about = held_out(prepared, tmp_path / "raw", ("val", "test"))[1]
    assert about.scans.tolist() == ["real"] * 2 and about.person.tolist() == about.index.tolist() == [case.id for case in cases]


def evaluate_until_killed(folder: Path) -> None:
    "Dies while the second run is being scored"
    import os

    scored, real = [], evaluate.score_cases

    def score(*arguments, **options):
        scored.append(arguments)
        if len(scored) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    os.chdir(folder)
    evaluate.score_cases = score
    evaluate_runs(RUNS, **places(folder))


def test_an_evaluation_that_was_killed_does_again_only_what_was_not_done(here, whole, monkeypatch):
    def maps(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.nii.gz")}

    process = SERVER.Process(target=evaluate_until_killed, args=(here,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (here / "out/scores.csv").exists()
    shutil.rmtree(here / "out", ignore_errors=True)  # As DVC does before a stage runs
    done, real = Counter(), evaluate.predict_cases

    def predict(model, *rest, **options):
        done[model.name] += 1
        return real(model, *rest, **options)

    monkeypatch.setattr(evaluate, "predict_cases", predict)
    again = evaluate_runs(RUNS, **places(here))
    assert set(done) == {RUNS[1].name}
    pd.testing.assert_frame_equal(again, whole[0], check_exact=True)
    assert (here / "out/scores.csv").read_bytes() == (whole[1] / "scores.csv").read_bytes()
    assert maps(here / "out") == maps(whole[1]) and not list(here.glob("scratch/evaluate-*"))


def test_what_was_kept_serves_no_other_model_data_options_or_code(here, tmp_path, monkeypatch):
    def key(model=here / "models" / RUNS[0].name, data=here / "prepared", raw=here / "raw", run=RUNS[0], options=(0.25, "cpu", 1), splits=("val", "test")):
        return evaluate.evaluation_folder(model, data, raw, run, *options, splits=splits)

    assert key() == key()
    raw = shutil.copytree(here / "raw", tmp_path / "raw")
    assert key(raw=raw) == key()  # The same bytes elsewhere
    label = next((raw / get_dataset(BLEED).folder / "labelsReal").iterdir())
    shutil.copy(label.parents[1] / "imagesReal" / label.name.replace(".nii", "_0000.nii"), label)
    keys = {key(), key(model=here / "models" / RUNS[1].name), key(raw=raw), key(run=RUNS[1]), key(options=(0.5, "cpu", 1)), key(splits=("test",))}
    monkeypatch.setattr(evaluate, "code_digest", lambda parts: "changed")
    assert len(keys | {key()}) == 7
