"The ledger: what the rules say, what the paper reports, and how it is shown; and the analyses that pages rest on"

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mednext_v2.core import root, write_csv
from mednext_v2.report import claims
from mednext_v2.report.analysis import effects, group_gains, power_law, scaling_law
from mednext_v2.report.claims import CLAIMS, equivalence_power, format_ledger, ledger, ledger_markdown
from mednext_v2.report.power import paired_differences, variance_components
from mednext_v2.report.rules import LEDGER_COLUMNS, VERDICTS, judge, make_study, rules_hash
from mednext_v2.report.tables import published, read_table, select_rows

TRUE = dict(backbones=0.2, released=0.1, grn=0.08, scaling=0.08, pathology=0.08)
CALM = (0.002, 0.001, 0.005)
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


def of_study(name: str = "study", **options) -> pd.DataFrame:
    return ledger(make_study(np.random.default_rng(0), TRUE, noise=CALM, **options), name)


@pytest.fixture(scope="module")
def held() -> pd.DataFrame:
    return of_study()


def test_the_ledger_is_what_judge_says_with_what_the_paper_reports(held):
    made = make_study(np.random.default_rng(0), TRUE, noise=CALM)
    pd.testing.assert_frame_equal(held[LEDGER_COLUMNS], judge(made, "study"))
    more = set(held) - set(LEDGER_COLUMNS)
    assert more == {"reported", "profile", "rules", "notebook", "command"} and set(held.rules) == {rules_hash()}
    assert held.verdict.tolist() == ["supported"] * 7


def test_one_seed_is_never_judged_as_in_mini():
    assert set(of_study(seeds=1).verdict) == {"not tested"}
    assert set(of_study("smoke").verdict) == {"not tested"}
    assert set(ledger({}, "study").verdict) == {"not tested"}


def test_reported_figures_are_those_of_the_csv_and_nothing_else(held):
    known = {f"{value:.2f}" for value in published().value.dropna()}
    for text in held.reported:
        figures = re.findall(r"\d+\.\d+", text)
        assert set(figures) <= known and (figures or text == "not available")


def test_every_claim_names_a_notebook_that_is_there():
    assert [claim.number for claim in CLAIMS] == list(range(1, 8))
    for claim in CLAIMS:
        assert (root(__file__) / "nbs/paper" / f"{claim.notebook}.ipynb").is_file()


def test_what_is_shown_says_not_available_why_not_tested_and_no_verdict_is_typed(held):
    shown = format_ledger(held)
    effects_shown = shown["found here (interval)"].tolist()
    assert effects_shown[0] == "4 (4 to 4)" and effects_shown[1] == "1.00 (1.00 to 1.00)" and effects_shown[2].startswith("8.0 (7.")
    empty = format_ledger(ledger({}, "study"))
    assert set(empty["found here (interval)"]) == {"not available"} and set(empty.verdict) == {
        "<b>not tested</b>: no scores",
        "<b>not tested</b>: no ablations",
    }
    assert empty["people, seeds, tasks, backbones"][0] == "0, 0, 0, 0"
    source = json.loads((root(__file__) / "nbs/paper/claims.ipynb").read_text())
    text = "".join("".join(cell["source"]) for cell in source["cells"])
    assert not [word for word in VERDICTS if word in text]


def test_the_ledger_in_markdown_and_that_of_other_columns(held, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "StudyPaths", lambda profile: SimpleNamespace(results=tmp_path, page=lambda name: tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"run `make repro PROFILE=study`"):
        ledger_markdown("study")
    write_csv(tmp_path / "claims/claims.csv", held.assign(of="a | b"))
    lines = ledger_markdown("study").splitlines()
    assert len(lines) == 2 + 7 + 2 and all(line.startswith("| ") for line in lines[:9]) and "**supported**" in lines[2] and "a \\| b" in lines[2]
    assert lines[-1].startswith(f"Rules `{rules_hash()}`") and "numbers of an unknown commit" in lines[-1]
    write_csv(tmp_path / "claims/claims.csv", held.drop(columns="reason"))
    assert ledger_markdown("study").startswith("The ledger that is committed for this profile was made by earlier rules")


def test_the_line_on_rules_says_whether_they_were_first(monkeypatch):
    made = {"commit": "a" * 40, "uncommitted": ["x"]}
    monkeypatch.setattr(claims, "read_provenance", lambda path: made)
    for first, words in ((True, "before the numbers were made"), (False, "not before the numbers: so"), (None, "it cannot be told whether before the numbers")):
        known = {"rules": "r" * 16, "sealed": "b" * 40, "date": "2026-12-01", "why": "so" if first is False else ""}
        asked = []
        monkeypatch.setattr(claims, "made_after", lambda *words: asked.append(words) or (first, known))
        text = claims.describe_making("study")
        assert words in text and "committed on 2026-12-01 (`bbbbbbbbbbbb`)" in text and "commit `aaaaaaaaaaaa`" in text and asked == [("a" * 40, ("x",))]


def test_power_of_equivalence_is_of_the_spread_that_was_found():
    calm = equivalence_power(make_study(np.random.default_rng(0), noise=CALM), "study", 500)
    usual = equivalence_power(make_study(np.random.default_rng(0), noise=(0.02, 0.015, 0.03)), "study", 500)
    assert calm.tasks.tolist() == usual.tasks.tolist() == ["CT", "MR"] and (calm.people == 8).all() and (calm.seeds == 3).all()
    assert (calm.power > 0.9).all() and (usual.power < 0.1).all()
    assert (calm.margin_80 < 0.01).all() and (usual.margin_80 > 0.01).all()
    np.testing.assert_allclose(usual.noise_allowed, 0.01 / usual.margin_80)
    assert equivalence_power(make_study(np.random.default_rng(0), people=1), "study", 50).empty and equivalence_power({}, "study").empty


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
