"What the profiles plan: whether each claim has the arms it needs, and seven verdicts from the rows of the paper's own plan"

import copy

import numpy as np
import pandas as pd
import pytest

from mednext_v2.data.datasets import get_dataset
from mednext_v2.report import arms
from mednext_v2.report.arms import NEEDS, claim_gaps, planned_rows, read_planned
from mednext_v2.report.claims import CLAIMS, ledger
from mednext_v2.report.forecast import profile_params
from mednext_v2.training.recipe import Recipe
from mednext_v2.zoo.catalogue import load_zoo


def gaps(monkeypatch, change) -> dict[int, str]:
    "What the profile paper lacks after a change, by claim"
    values = copy.deepcopy(profile_params("paper"))
    change(values)
    monkeypatch.setattr(arms, "profile_params", lambda profile: values)
    monkeypatch.setattr(arms, "SAME_PEOPLE", (("cads", "acdc"),))
    found = claim_gaps("paper").missing
    return {int(claim): text for claim, text in found.items() if text}


def test_the_profile_paper_lacks_nothing_and_every_claim_is_asked_for():
    assert list(NEEDS) == [claim.number for claim in CLAIMS] == list(range(1, 8))
    lacking = claim_gaps("paper").missing
    assert not lacking.any()
    assert {claim: text for claim, text in claim_gaps("study").missing.items() if text} == {4: "2 released models, there are 0"}
    assert claim_gaps("mini").missing.astype(bool).any()


def put(path: str, value):
    "A change of one value of a profile"

    def change(values: dict) -> None:
        *parents, last = path.split(".")
        for name in parents:
            values = values[name]
        if value is None:
            del values[last]
        else:
            values[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "claims", "said"),
    [
        (put("seeds", [0]), {1, 2, 3, 4, 5, 6, 7}, "3 seeds, there are 1"),
        (put("seeds", [0, 0, 0]), {1, 2, 3, 4, 5, 6, 7}, "3 seeds"),
        (put("axes.backbones", ["mednext_v2_base", "unet", "resenc_l"]), {1, 2, 5}, "there are "),
        (put("axes.backbones", ["unet", "resenc_l", "segresnet", "swin_unetr"]), {1, 2, 4, 5}, ""),
        (put("axes.inits", ["scratch"]), {2, 4, 5}, "the start pretrained"),
        (put("axes.inits", ["cads"]), {1, 2, 5}, "the start scratch"),
        (put("axes.tasks", ["panther"]), {1, 2, 3, 4, 5, 6, 7}, "2 tasks, there are 1"),
        (put("axes.tasks", ["brainmetshare", "brats"]), {6, 7}, ""),
        (put("axes.tasks", ["panther", "ctspine1k"]), {6}, "2 tasks with pathology, there are 1"),
        (put("ablations.modality.tasks", ["panther", "skm_tea"]), {7}, "a task of CT in modality"),
        (put("axes.released", ["stunet_large"]), {4}, "7 released models, there are 1"),
        (put("axes.ablations", ["grn", "scaling", "modality"]), {3}, "the ablation grn_scaling"),
        (put("ablations.grn_scaling.seeds", [0, 1]), {3}, "3 seeds, there are 2"),
        (put("ablations.grn_scaling.variants.compound_without", None), {3}, "the variant compound_without"),
        (put("ablations.grn_scaling.variants.compound_without.overrides", {}), {3}, "GRN in compound_mean alone at compound scale"),
        (
            put("ablations.grn_scaling.variants.base_without.backbone", "mednext_v1_medium"),
            {3},
            "the same layout and recipe with and without GRN at base scale",
        ),
        (put("ablations.grn_scaling.variants.compound_mean.finetune", {}), {3}, "the same layout and recipe with and without GRN at compound scale"),
        (put("ablations.scaling.inits", ["scratch"]), {6}, "the start pretrained in scaling"),
        (put("ablations.modality.variants.mr_full", None), {7}, "the variant mr_full"),
        (put("ablations.modality.variants.mr_full", {"backbone": "mednext_v2_base"}), {7}, "a corpus of MR in mr_full, there is cads (CT)"),
        (put("ablations.modality.variants.ct_full.finetune", {"freeze": "encoder"}), {7}, "all weights fine-tuned in ct_full"),
    ],
)
def test_what_is_taken_away_is_missed_by_the_claims_that_need_it(monkeypatch, change, claims, said):
    found = gaps(monkeypatch, change)
    assert set(found) == claims and all(said in text for text in found.values()), found


STRENGTH = {
    "mednext_v2_wide": 0.12,
    "mednext_v2_base": 0.10,
    "mednext_v1_large": 0.08,
    "resenc_l": 0.06,
    "stunet_base": 0.05,
    "swin_unetr": 0.02,
    "segresnet": 0.01,
}


def test_rows_of_the_plan_of_paper_give_seven_verdicts():
    "Scores that agree with all claims are put into the planned rows: no rule of the ledger lacks anything"
    generator, tables = np.random.default_rng(0), planned_rows("paper", people=6, labels=2)
    for name, table in tables.items():
        level = 0.5 + table.backbone.map(STRENGTH).fillna(0) * (name == "scores") + 0.05 * (table.init != "scratch") - 0.15 * table.init.isin(list(load_zoo()))
        if "variant" in table:
            big = table.variant.isin(["compound", "compound_without", "compound_mean"])
            level += 0.06 * big + 0.08 * big * (table.group == "pathology") + 0.05 * table.variant.isin(["mean", "compound_mean", "base_mean"])
        table["dsc"] = table["nsd"] = (level + 0.003 * generator.normal(size=len(table))).clip(0, 1)
    tables["corpora"] = pd.DataFrame([dict(variant=arm, person=f"{arm}{person}") for arm in ("ct_full", "mr_full") for person in range(80)])
    held = ledger(tables, "paper").set_index("claim")
    assert held.verdict.to_dict() == dict.fromkeys(range(1, 8), "reproduced"), held[["of", "effect", "low", "high", "reason"]]
    assert (held.seeds >= 3).all() and (held.tasks >= 2).all()
    tables["scores"] = tables["scores"][~tables["scores"].init.isin(list(load_zoo()))]
    assert ledger(tables, "paper").verdict[3] == "not tested"


def test_the_rows_are_those_of_the_plan():
    planned, rows = read_planned("paper"), planned_rows("paper", people=2, validation=0, labels=1)
    plan, scores = planned.plan, rows["scores"]
    groups = [len(set(get_dataset(task).groups.values())) for task in plan.tasks]
    assert len(scores) == (len(plan.backbones) * len(plan.inits) + len(plan.released)) * 2 * len(plan.seeds) * sum(groups)
    assert set(scores.seed) == {0, 1, 2} and set(scores.init) == {*plan.inits, *plan.released}
    arms_of = rows["ablations"].groupby("ablation").variant.unique().map(set).to_dict()
    assert arms_of == {name: set(found) for name, found in planned.variants.items()}
    assert set(rows["ablations"].query("variant.str.startswith('mr_')", engine="python").init) == {"acdc"}
    assert not scores.duplicated(["backbone", "init", "task", "case", "label", "seed"]).any()


def test_the_recipe_of_paper_is_what_is_known_of_it():
    values = profile_params("paper")
    pretrain, finetune = (Recipe(**values["recipes"][name]) for name in ("pretrain", "finetune"))
    assert pretrain.patch == finetune.patch == (128, 128, 128), "192³ is context scaling, in fine-tuning alone"
    assert (pretrain.steps, pretrain.warmup) == (1500 * 250, 0) and (finetune.steps, finetune.warmup, finetune.lr) == (300 * 250, 50 * 250, 1e-3)
    planned = read_planned("paper")
    large = {(name, key) for name, found in planned.variants.items() for key, one in found.items() if one.finetune.get("patch") == (192, 192, 192)}
    assert large == {("scaling", "context"), ("scaling", "compound"), ("grn_scaling", "compound_without"), ("grn_scaling", "compound_mean")}
    assert not any(one.pretrain.get("patch") for found in planned.variants.values() for one in found.values())
    assert finetune.optimizer == "adamw" and not finetune.freeze
    assert len(planned.plan.backbones) == 8 and len(planned.plan.released) == 7 and len(planned.plan.seeds) == 3
