"How long the study takes: counts of trainings by hand, time in proportion, and the most steps that fit"

import json
from pathlib import Path

import pytest

from mednext_v2.study.budget import FAMILIES
from mednext_v2.study.schedule import (
    ARMS,
    CORES,
    HOURS,
    OWN_SECONDS,
    RESERVE,
    SCAN_SECONDS,
    TRIAL_SCANS,
    Arm,
    Schedule,
    forecast,
    largest_schedule,
    list_trainings,
    measured_seconds,
    relative_cost,
)

ONE = dict.fromkeys(FAMILIES, 0.1)


def test_hours_of_a_small_schedule_by_hand():
    small = Schedule(pretrain=100, finetune=50, trial=20, pretrain_trial=30, backbones=("unet",), seeds=2, tasks=3, trial_tasks=1, arms=(), cases=4, checked=0)
    table = forecast(small, {"unet": 0.1})
    rates = 4 * (30 * 0.1 + OWN_SECONDS + TRIAL_SCANS * SCAN_SECONDS) + 8 * (20 * 0.1 + OWN_SECONDS + TRIAL_SCANS * SCAN_SECONDS)
    tuned = 6 * (50 * 0.1 + OWN_SECONDS + 4 * SCAN_SECONDS)
    wanted = {"rates": rates, "pretrain": 2 * (10 + OWN_SECONDS), "scratch": tuned, "finetune": tuned}
    wanted["all"] = sum(wanted.values())
    assert {stage: value * 3600 * CORES for stage, value in table.hours.items()} == pytest.approx(wanted)
    assert table.trainings.to_dict() == {"rates": 12, "pretrain": 2, "scratch": 6, "finetune": 6, "all": 26}
    assert table.steps["all"] == 4 * 30 + 8 * 20 + 200 + 2 * 300


def test_an_arm_costs_what_its_flops_say_and_pretrains_only_if_asked():
    plain = Schedule(arms=())
    for arm, runs in ((Arm("a", "b", tasks=2), 6), (Arm("a", "b", tasks=2, pretrains=0.5), 9)):
        listed = list_trainings(Schedule(arms=(arm,))).query("stage == 'ablate a'")
        assert listed.runs.sum() == runs and listed.factor.eq(1).all()
    wide = Arm("a", "wide", overrides=(("width", 14),), patch=(48, 48, 48), pretrains=1)
    listed = list_trainings(Schedule(arms=(wide,))).query("stage == 'ablate a'")
    assert listed.steps.tolist() == [plain.pretrain, plain.finetune]
    assert listed.factor.tolist() == [relative_cost("mednext_v2_base", (("width", 14),)), relative_cost("mednext_v2_base", (("width", 14),), (48, 48, 48))]
    assert 3 < listed.factor.iloc[0] < 4 and 3.3 < listed.factor.iloc[1] / listed.factor.iloc[0] < 3.6


def test_the_largest_schedule_fits_and_no_larger_one_does():
    found = largest_schedule(Schedule(), 3, ONE)
    allowed = 3 * (1 - RESERVE)
    assert forecast(found, ONE).hours["all"] <= allowed < forecast(found.scaled(1.2), ONE).hours["all"]
    assert all(getattr(found, name) % 10 == 0 for name in ("pretrain", "finetune", "trial", "pretrain_trial"))
    slow = largest_schedule(Schedule(), 3, {name: 3 * value for name, value in ONE.items()})
    assert slow.finetune < found.finetune < largest_schedule(Schedule(), 9, ONE).finetune
    with pytest.raises(ValueError, match="even ten steps a training take more than 0.08 hours: leave out"):
        largest_schedule(Schedule(), 0.1, ONE)


def test_a_backbone_whose_step_was_not_measured_is_named():
    with pytest.raises(ValueError, match="how long a step of unet takes is not known"):
        forecast(Schedule(), {name: value for name, value in ONE.items() if name != "unet"})


def test_the_measured_times_are_those_of_the_families_and_the_study_fits_into_its_hours(monkeypatch, tmp_path):
    seconds = measured_seconds()
    assert set(seconds) == set(FAMILIES) and all(0.02 < value < 2 for value in seconds.values())
    table = forecast(largest_schedule(Schedule()))
    assert table.hours["all"] <= HOURS * (1 - RESERVE) and {f"ablate {arm.ablation}" for arm in ARMS} <= set(table.index)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "benchmarks/results/budget.json").write_text(json.dumps({"beside": {"result": {"unet": {"step": 1}}}}))
    monkeypatch.setattr("mednext_v2.study.schedule.root", lambda: Path(tmp_path))
    with pytest.raises(ValueError, match="has no mednext_v1_large, .*: run `python benchmarks/budget.py`"):
        measured_seconds()
    with pytest.raises(ValueError, match="has no alone: run"):
        measured_seconds("alone")


def test_the_schedule_is_what_the_profile_study_trains():
    from mednext_v2.report import forecast as planned

    values, schedule = planned.profile_params("study"), Schedule()
    steps = {f"{stage}": values["recipes"][stage]["steps"] for stage in ("pretrain", "finetune")}
    assert steps == {"pretrain": schedule.pretrain, "finetune": schedule.finetune}
    assert (values["rates"]["pretrain_steps"], values["rates"]["finetune_steps"]) == (schedule.pretrain_trial, schedule.trial)
    assert set(values["axes"]["backbones"]) == set(schedule.backbones) and len(values["seeds"]) == schedule.seeds
    listed = planned.list_trainings("study").assign(steps=lambda table: [recipe["steps"] for recipe in table.recipe])
    mine, theirs = (table.groupby(["stage", "backbone", "steps"]).runs.sum() for table in (list_trainings(schedule), listed))
    assert mine.to_dict() == theirs.to_dict()


def test_backbones_of_the_profile_study_are_those_of_the_budget():
    import yaml

    from mednext_v2.core import root
    from mednext_v2.study.budget import profile_backbones

    found = yaml.safe_load((root() / "conf/profile/study.yaml").read_text())["backbones"]
    assert found == yaml.safe_load(profile_backbones())["backbones"]
