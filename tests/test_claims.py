"The ledger: each rule on made-up tables where the answer is known, and the words that follow from it"

import json
import re

import numpy as np
import pandas as pd
import pytest

from mednext_v2.core import root
from mednext_v2.report.analysis import effects, group_gains, power_law, scaling_law
from mednext_v2.report.claims import CLAIMS, MARGIN, MIN_EVIDENCE, VERDICTS, Evidence, format_ledger, ledger, verdict
from mednext_v2.report.power import paired_differences, variance_components
from mednext_v2.report.tables import published, read_table, select_rows

TASKS = {"abdomen_ct": ("liver", "organ"), "liver_lesion_ct": ("lesion", "pathology"), "brain_mr": ("frontal", "organ")}


def table(levels: dict, noise: float = 0.005, seeds: int = 3, cases: int = 5, **columns) -> pd.DataFrame:
    "Scores at a level for each (method, init) and group"
    rng, rows = np.random.default_rng(1), []
    for (method, init), level in levels.items():
        for task, (label, group) in TASKS.items():
            for case in range(cases):
                for seed in range(seeds):
                    value = (level if isinstance(level, float) else level[group]) + 0.02 * case + noise * rng.standard_normal()
                    rows.append(dict(method=method, init=init, task=task, case=str(case), label=label, group=group, seed=seed, dsc=value, nsd=value))
    return pd.DataFrame(rows).assign(**columns)


def tables(scores: dict | None = None, ablations: list | None = None, **options) -> dict:
    empty = pd.DataFrame(columns=["ablation", "variant", "init", "task", "case", "label", "group", "seed", "dsc", "nsd"])
    some = {("unet", "scratch"): 0.5, ("unet", "corpus_ct"): 0.5} if scores is None else scores
    parts = [table(levels, **options).rename(columns={"method": "variant"}).assign(ablation=name) for name, levels in ablations or []]
    return {"scores": table(some, **options).rename(columns={"method": "backbone"}), "ablations": pd.concat(parts, ignore_index=True) if parts else empty}


def word(number: int, *args, profile: str = "study", **options) -> str:
    return verdict(CLAIMS[number - 1].rule(tables(*args, **options)), profile)


FOUR = {"mednext_v2_tiny": 0.6, "resenc_l": 0.56, "stunet_base": 0.54, "unet": 0.5}
SAME = {(name, init): level for name, level in FOUR.items() for init in ("scratch", "corpus_ct")}
CROSSED = {(name, init): level if init == "scratch" else 1.1 - level for name, level in FOUR.items() for init in ("scratch", "corpus_ct")}
EQUAL = {(name, init): 0.5 for name in FOUR for init in ("scratch", "corpus_ct")}
YES, NO, NOT = VERDICTS[1:]


@pytest.mark.parametrize(
    ("number", "scores", "expected"),
    [
        (1, SAME, YES),
        (1, EQUAL, NO),
        (1, {("unet", "scratch"): 0.5}, NOT),
        (2, SAME, YES),
        (2, CROSSED, NO),
        (2, {key: level for key, level in SAME.items() if key[0] in ("unet", "resenc_l")}, NOT),
        (5, SAME, YES),
        (5, CROSSED, NO),
        (5, {("unet", "scratch"): 0.5, ("resenc_l", "scratch"): 0.6}, NOT),
        (4, SAME, NOT),
    ],
)
def test_rules_of_backbones(number, scores, expected):
    assert word(number, scores) == expected


GRN = ("grn", {("without", "corpus_ct"): 0.5, ("mean", "corpus_ct"): 0.55})
STEP = ("scaling", {("base", "corpus_ct"): 0.5, ("compound", "corpus_ct"): 0.55})


def test_representation_needs_both_parts():
    assert word(3, None, [GRN, STEP]) == YES
    worse = ("scaling", {("base", "corpus_ct"): 0.5, ("compound", "corpus_ct"): 0.5})
    assert word(3, None, [GRN, worse]) == NO
    assert word(3, None, [GRN]) == NOT
    scratch = ("scaling", {("base", "scratch"): 0.5, ("compound", "scratch"): 0.55})
    assert word(3, None, [GRN, scratch]) == NOT, "what was trained from scratch says nothing of a representation"


@pytest.mark.parametrize(("organ", "sick", "expected"), [(0.5, 0.6, YES), (0.6, 0.5, NO), (0.55, 0.55, NO)])
def test_pathology_must_gain_more_than_organs(organ, sick, expected):
    levels = {("base", "corpus_ct"): 0.5, ("compound", "corpus_ct"): {"organ": organ, "pathology": sick}}
    assert word(6, None, [("scaling", levels)]) == expected


@pytest.mark.parametrize(("mr", "noise", "expected"), [(0.5, 0.002, YES), (0.53, 0.002, NO), (0.5, 0.1, NO)])
def test_negligible_means_an_interval_within_the_margin(mr, noise, expected):
    levels = {("ct_full", "corpus_ct"): 0.5, ("mr_full", "corpus_mr"): mr}
    assert word(7, None, [("modality", levels)], noise=noise) == expected
    assert MARGIN == 0.01


def test_released_models_are_compared_by_their_names_in_the_zoo(monkeypatch):
    from mednext_v2.zoo.catalogue import load_zoo

    other = next(iter(load_zoo()))
    scores = {("mednext_v2_tiny", "corpus_ct"): 0.6, ("mednext_v2_tiny", "scratch"): 0.5, ("resenc_l", other): 0.55}
    assert word(4, scores) == YES
    assert word(4, scores | {("resenc_l", other): 0.65}) == NO


@pytest.mark.parametrize("short", MIN_EVIDENCE)
def test_too_few_of_anything_is_not_judged(short):
    found = Evidence(0.1, 0.05, 0.2, **(MIN_EVIDENCE | {short: MIN_EVIDENCE[short] - 1}))
    assert verdict(found, "study") == NOT and verdict(Evidence(0.1, 0.05, 0.2, **MIN_EVIDENCE), "study") == YES


def test_reproduced_is_kept_for_the_paper_and_smoke_is_never_judged():
    assert word(5, SAME, profile="paper") == "reproduced"
    for profile in ("mini", "study"):
        assert "reproduced" not in set(ledger(tables(SAME, [GRN, STEP]), profile).verdict)
    assert set(ledger(tables(SAME, [GRN, STEP]), "smoke").verdict) == {NOT}


def test_reported_figures_are_those_of_the_csv_and_nothing_else():
    known = {f"{value:.2f}" for value in published().value.dropna()}
    for text in ledger(tables(SAME), "study").reported:
        figures = re.findall(r"\d+\.\d+", text)
        assert set(figures) <= known and (figures or text == "not available")


def test_every_claim_names_a_notebook_that_is_there():
    assert [claim.number for claim in CLAIMS] == list(range(1, 8))
    for claim in CLAIMS:
        assert (root(__file__) / "nbs/paper" / f"{claim.notebook}.ipynb").is_file()
        assert claim.rule.__doc__.startswith(f"{claim.number}. ")


def test_what_is_shown_says_not_available_and_no_verdict_is_typed():
    shown = format_ledger(ledger(tables(SAME), "study"))
    assert "not available" in set(shown["found here (95 % interval)"]) and all(cell.startswith("<b>") for cell in shown.verdict)
    source = json.loads((root(__file__) / "nbs/paper/claims.ipynb").read_text())
    text = "".join("".join(cell["source"]) for cell in source["cells"])
    assert not [word for word in VERDICTS if word in text]


# ---- what the rules rest on


def test_effects_are_differences_over_shared_cases_with_seeds_averaged():
    some = tables(None, [("grn", {("without", "scratch"): 0.5, ("mean", "scratch"): 0.56})], noise=0.01)["ablations"]
    row = effects(some, "without").query("metric == 'dsc'").iloc[0]
    wide = some.pivot_table("dsc", ["task", "case"], "variant")
    assert row.difference == pytest.approx((wide["mean"] - wide["without"]).mean()) and row.low < row.difference < row.high
    assert (row.people, row.seeds, row.tasks) == (5, 3, 3)
    assert effects(some.iloc[:0], "without").empty


def test_gains_by_group_do_not_mix_groups():
    levels = {("base", "scratch"): 0.5, ("compound", "scratch"): {"organ": 0.51, "pathology": 0.6}}
    some = tables(None, [("scaling", levels)], noise=0.001)["ablations"]
    found = group_gains(some, {"variant": "compound"}, {"variant": "base"}).set_index("group")
    assert found.gain.round(2).to_dict() == {"organ": 0.01, "pathology": 0.1, "difference": 0.09}
    assert found.people.to_dict() == {"organ": 5, "pathology": 5, "difference": 5}
    organs = some[some.group == "organ"]
    assert np.isnan(group_gains(organs, {"variant": "compound"}, {"variant": "base"}).set_index("group").gain["pathology"])


def test_a_power_law_is_found_again_and_few_sizes_give_none():
    x = np.array([1.0, 2, 4, 8, 16])
    assert power_law(x, 0.3 * x**-0.25) == pytest.approx(0.25)
    names = [f"size{at}" for at in range(5)]
    levels = {(name, "scratch"): float(1 - 0.5 * cost**-0.2) for name, cost in zip(names, x)}
    some = table(levels, noise=0.0).rename(columns={"method": "variant"})
    some["dsc"] -= 0.02 * some.case.astype(int)
    models = pd.DataFrame({"variant": names, "role": "finetune", "flops": x})
    found = scaling_law(some, models, n=50)
    assert found["exponent"] == pytest.approx(0.2) and found["sizes"] == 5
    assert np.isnan(scaling_law(some[some.variant < "size3"], models, n=50)["exponent"])


def test_spreads_do_not_count_differences_between_tasks():
    rng = np.random.default_rng(0)
    rows = [
        dict(task=task, case=f"{task}{case}", label="a", seed=seed, variant=variant, dsc=0.5 + (variant == "x") * (shift + 0.03 * rng.standard_normal()))
        for task, shift in (("one", 0.0), ("two", 0.3))
        for case in range(60)
        for seed in range(3)
        for variant in ("x", "y")
    ]
    found = variance_components(paired_differences(pd.DataFrame(rows), {"variant": "x"}, {"variant": "y"}))
    assert found.person < 0.015 and found.rest == pytest.approx(0.03, rel=0.2) and found.seed < 0.01


def test_rows_are_selected_by_text_and_mistakes_are_named():
    some = pd.DataFrame({"backbone": ["unet", "resenc_l"], "seed": [0, 1]})
    assert select_rows(some, [("seed", "1")]).backbone.tolist() == ["resenc_l"]
    with pytest.raises(ValueError, match="no column 'net'; there are: backbone, seed"):
        select_rows(some, [("net", "unet")])
    with pytest.raises(ValueError, match="no backbone is 'vnet'; there are: resenc_l, unet"):
        select_rows(some, [("backbone", "vnet")])
    with pytest.raises(ValueError, match="no table is called 'score'; there are: scores, ablations"):
        read_table("mini", "score")


def test_unsourced_costs_are_refused(tmp_path):
    from mednext_v2.report.forecast import published_compute

    path = tmp_path / "costs.csv"
    path.write_text("model,a100_hours,source\nA,3,\n")
    with pytest.raises(ValueError, match="line 2 has no source"):
        published_compute(path)
    assert published_compute().source.str.len().gt(10).all()
