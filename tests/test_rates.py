"The choice of the learning rate: ties, divergence, gaps and the edge; and one search with real trainings"

import math
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from mednext_v2.core import read_json, root
from mednext_v2.data.preprocess import prepare_all
from mednext_v2.models.card import read_card
from mednext_v2.study import rates
from mednext_v2.study.paths import StudyPaths
from mednext_v2.study.rates import (
    TRIAL_COLUMNS,
    Trials,
    choose_rate,
    choose_rates,
    mean_trials,
    rate_table,
    run_trials,
    trial_recipe,
    use_chosen_rate,
    with_rate,
)
from mednext_v2.study.seeds import build_dataset
from mednext_v2.training.recipe import Recipe

NAN = math.nan


def trials(table: dict, backbone="unet", start="scratch") -> pd.DataFrame:
    "Dice by rate, one number a task"
    rows = [(backbone, start, lr, f"task{place}", dice) for lr, values in table.items() for place, dice in enumerate(values)]
    return pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))


def one(table: dict, **options) -> dict:
    return choose_rates(trials(table), **options).iloc[0].to_dict()


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ({1e-3: [0.5], 1e-2: [0.7], 3e-2: [0.6], 1e-1: [0.1]}, dict(lr=1e-2, tied=1, diverged=0, edge=False)),
        # The mean over tasks decides, not the best single one
        ({1e-3: [0.5, 0.5], 1e-2: [0.9, 0.0], 1e-1: [0.1, 0.1]}, dict(lr=1e-3, dice=0.5, edge=True)),
        # Within half a point: the smallest of the tied, also if a larger one is a little better
        ({1e-3: [0.5], 1e-2: [0.696], 3e-2: [0.7], 1e-1: [0.698]}, dict(lr=1e-2, tied=3, edge=False)),
        ({1e-3: [0.5], 1e-2: [0.694], 3e-2: [0.7], 1e-1: [0.5]}, dict(lr=3e-2, tied=1)),
        # Diverged on one task is out, although the other was best
        ({1e-3: [0.5, 0.5], 1e-2: [0.6, 0.6], 1e-1: [0.99, NAN]}, dict(lr=1e-2, diverged=1, edge=False)),
        ({1e-3: [0.5], 1e-2: [math.inf], 1e-1: [NAN]}, dict(lr=1e-3, diverged=2, edge=True)),
        # All fail alike: the smallest, and it is at the edge
        ({1e-3: [0.0], 1e-2: [0.0], 1e-1: [0.0]}, dict(lr=1e-3, tied=3, edge=True)),
        ({1e-2: [0.4]}, dict(lr=1e-2, edge=False)),
    ],
)
def test_the_rate_that_is_chosen(table, wanted):
    assert {key: one(table)[key] for key in wanted} == pytest.approx(wanted)
    backwards = trials(table).iloc[::-1]
    assert choose_rates(backwards).lr.iloc[0] == wanted["lr"], "the order of the trials does not matter"


def test_no_tie_without_a_tolerance():
    assert one({1e-3: [0.699], 1e-2: [0.7]}, tie=0)["lr"] == 1e-2


def test_every_backbone_and_start_has_its_own_choice():
    several = pd.concat(
        [trials({1e-3: [0.2], 1e-2: [0.5]}), trials({1e-3: [0.6], 1e-2: [0.3]}, start="corpus_ct"), trials({1e-2: [0.1], 3e-2: [0.9]}, "resenc_l")]
    )
    found = choose_rates(several)
    assert list(zip(found.backbone, found.start, found.lr)) == [("unet", "scratch", 1e-2), ("unet", "corpus_ct", 1e-3), ("resenc_l", "scratch", 3e-2)]
    recipe = Recipe(steps=10, lr=0.5)
    assert with_rate(recipe, found, "unet", "corpus_ct") == replace(recipe, lr=1e-3)
    with pytest.raises(ValueError, match="no learning rate was chosen for unet from corpus_mr"):
        with_rate(recipe, found, "unet", "corpus_mr")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (trials({1e-3: [NAN], 1e-2: [NAN]}), "unet from scratch diverged with every rate .0.001, 0.01.: try smaller ones"),
        (trials({1e-3: [0.1, 0.2], 1e-2: [0.3]}), "the rate 0.01 was not tried on task1"),
        (pd.concat([trials({1e-3: [0.1]})] * 2), "the rate 0.001 was tried twice on task0"),
        (trials({}), "there are no trials"),
        (trials({1e-3: [0.1]}).drop(columns="task"), "trials have no column task"),
    ],
)
def test_what_no_choice_can_be_made_from_is_refused(table, said):
    with pytest.raises(ValueError, match=said):
        choose_rates(table)


def test_the_table_marks_the_choice_and_names_divergence():
    shown = rate_table(trials({1e-3: [0.5, 0.7], 1e-2: [0.8, 0.6], 1e-1: [0.9, NAN]})).loc[("unet", "scratch")]
    assert shown.to_dict() == {"0.001": "0.600", "0.01": "0.700 *", "0.1": "diverged", "tied": 1, "at the edge": ""}
    assert mean_trials(trials({1e-1: [0.9, NAN]})).dice.isna().all()


def test_a_trial_is_the_study_s_recipe_made_shorter():
    whole = Recipe(steps=300, warmup=30, lr=1e-3, patch=(32, 32, 32), validate_every=50, keep="best", patience=3, snapshots=5)
    short = trial_recipe(whole, 0.1, 20)
    assert (short.steps, short.warmup, short.lr, short.validate_every, short.keep, short.patience, short.snapshots) == (20, 2, 0.1, 20, "last", 0, 0)
    assert replace(short, **{name: getattr(whole, name) for name in "steps warmup lr validate_every keep patience snapshots checkpoint_every".split()}) == whole
    assert trial_recipe(replace(whole, warmup=299), 0.1, 2).warmup == 1  # Below the steps


def test_what_is_tried_has_rates_that_differ_and_a_parent_only_if_pretrained(tmp_path):
    asked = Trials("toy", "unet", "scratch", ("brain_lesion_mr",), Recipe(steps=4), {}, steps=2)
    for changes in ({"rates": (0.1, 0.1)}, {"rates": ()}, {"tasks": ()}):
        with pytest.raises(ValueError, match="needs tasks, and rates that differ"):
            replace(asked, **changes)
    with pytest.raises(ValueError, match="unet: a start from scratch has a parent"):
        replace(asked, parent=tmp_path)
    assert replace(asked, start="corpus_ct", parent=tmp_path).run("brain_lesion_mr").init == "corpus_ct"


def test_a_search_from_scratch_and_pretrained_that_is_not_trained_twice(tmp_path, monkeypatch):
    build_dataset("brain_lesion_mr", None, tmp_path / "raw", (2, 1, 1))
    prepare_all(("brain_lesion_mr",), tmp_path / "raw", tmp_path / "prepared")
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "data").mkdir()
    shutil.copy(root() / "data/datasets.yaml", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(steps=8, warmup=2, batch_size=1, patch=(16, 16, 16), augment="none", foreground=1.0)
    small = {"filters": (2, 4, 8)}
    scratch = Trials("toy", "unet", "scratch", ("brain_lesion_mr",), recipe, small, steps=3, rates=(1e-2, 1e30))
    found = run_trials([scratch], tmp_path / "prepared", tmp_path / "out")
    assert found.lr.tolist() == [1e-2, 1e30] and found.dice.between(0, 1).tolist() == [True, False] and math.isnan(found.dice[1])
    chosen = choose_rates(found)
    assert (chosen.lr[0], chosen.diverged[0]) == (1e-2, 1)
    place = tmp_path / "out/unet"
    assert "learning rate of" in read_json(place / "scratch-1e+30/curves/brain_lesion_mr/diverged.json")["because"]

    assert not list((tmp_path / "scratch").glob("*")), "no checkpoints are left, of the one that diverged neither"
    parent = place / "scratch-0.01/models/brain_lesion_mr"
    assert read_card(parent).recipe["steps"] == 3
    tuned = replace(scratch, start="corpus_ct", parent=parent, rates=(1e-3,))
    both = run_trials([scratch, tuned], tmp_path / "prepared", tmp_path / "out")
    assert both.start.tolist() == ["scratch", "scratch", "corpus_ct"]
    assert read_card(place / "corpus_ct-0.001/models/brain_lesion_mr").parent == read_card(parent).sha256

    monkeypatch.setattr(rates, "train_one", lambda *given, **options: pytest.fail("it was trained again"))
    pd.testing.assert_frame_equal(run_trials([scratch, tuned], tmp_path / "prepared", tmp_path / "out"), both)
    with pytest.raises(pytest.fail.Exception, match="trained again"):  # Another recipe is another trial, diverged or not
        run_trials([replace(scratch, steps=2, rates=(1e30,))], tmp_path / "prepared", tmp_path / "out")


def test_the_stage_chooses_and_trainings_take_its_choice(tmp_path, monkeypatch):
    import yaml

    from mednext_v2.core import read_yaml
    from mednext_v2.stages import compose_params

    for name in ("conf", "data"):
        (tmp_path / name).mkdir()
    shutil.copy(root() / "data/datasets.yaml", tmp_path / "data")
    shutil.copytree(root() / "conf", tmp_path / "conf", dirs_exist_ok=True)
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    compose_params("smoke")
    paths, recipe = StudyPaths("smoke"), Recipe(steps=9, lr=0.5)
    assert choose_rate("smoke", "finetune", "scratch", "unet").empty
    assert use_chosen_rate(recipe, "smoke", "finetune", "scratch", "unet") == recipe  # Nothing was tried

    values = read_yaml(tmp_path / "params.yaml")
    values["rates"] = dict(pretrain=[1e-3, 1e-2], finetune=[1e-3, 1e-2], pretrain_steps=3, finetune_steps=4, tasks=["brain_lesion_mr", "abdomen_ct"])
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    asked = {}

    def run_trials(several, data, out, workers, resources):
        asked["trials"] = several
        return pd.DataFrame([(one.backbone, one.start, lr, task, lr) for one in several for lr in one.rates for task in one.tasks], columns=TRIAL_COLUMNS)

    monkeypatch.setattr(rates, "run_trials", run_trials)
    assert choose_rate("smoke", "finetune", "scratch", "unet").lr.tolist() == [1e-2]
    (trials,) = asked["trials"]
    assert (trials.start, trials.tasks, trials.steps, trials.parent) == ("scratch", ("brain_lesion_mr", "abdomen_ct"), 4, None)
    assert use_chosen_rate(recipe, "smoke", "finetune", "scratch", "unet").lr == 1e-2
    with pytest.raises(FileNotFoundError):
        use_chosen_rate(recipe, "smoke", "pretrain", "corpus_ct", "unet")
    choose_rate("smoke", "pretrain", "corpus_ct", "unet")
    assert (asked["trials"][0].start, asked["trials"][0].tasks, asked["trials"][0].steps) == ("pretrain", ("corpus_ct",), 3)
    assert use_chosen_rate(recipe, "smoke", "pretrain", "corpus_ct", "unet").lr == 1e-2
    choose_rate("smoke", "finetune", "corpus_ct", "unet")
    assert asked["trials"][0].parent == paths.pretrained("corpus_ct", "unet") and asked["trials"][0].start == "corpus_ct"
    assert len(pd.read_csv(paths.rates("finetune", "corpus_ct", "unet") / "trials.csv")) == 4
