"Intervals whose unit is a person: against other implementations, against known truth, and what must change nothing"

import ast
import importlib
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mednext_v2.core import read_json, root
from mednext_v2.evaluation.people_statistics import (
    Spread,
    backbone_means,
    backbone_tables,
    bootstrap_ends,
    coverage,
    effects_table,
    equivalence,
    fit_spread,
    group_difference,
    half_width,
    leave_one_out,
    line_over_backbones,
    logit,
    people_effect,
    people_needed,
    person_contrast,
    person_means,
    power,
    rank_correlation,
    reliability,
    simulate,
    slope,
    slope_interval,
    summarise_coverage,
    variance_parts,
)

BENCHMARKS = root() / "benchmarks"
ARMS = [(1, {"arm": "new"}), (-1, {"arm": "old"})]


def ledger(people: int = 8, seeds: int = 3, tasks: int = 2, gain: float = 0.05, shared: bool = True, seed: int = 0, noise: float = 0.03) -> pd.DataFrame:
    "Two arms, three cases a person, two classes"
    rng, rows = np.random.default_rng(seed), []
    for task in range(tasks):
        for person in range(people):
            for fold in range(seeds):
                for arm in ("old", "new"):
                    for label, group in (("liver", "organ"), ("lesion", "pathology")):
                        for case in range(3):
                            name = f"{person}" if shared else f"{task}-{person}"
                            value = 0.5 + gain * (arm == "new") + noise * rng.standard_normal()
                            rows.append(dict(task=f"t{task}", person=name, case=case, seed=fold, label=label, group=group, arm=arm, dsc=value, nsd=value))
    return pd.DataFrame(rows)


def differences(y: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame([dict(stratum=("t",), person=p, seed=s, value=v) for p, row in enumerate(y) for s, v in enumerate(row)])


def mean_squares(y: np.ndarray) -> tuple[float, float, float]:
    "Of a two-way layout without repeats, by least squares on dummy columns: sums of squares are what a factor adds to the fit"
    n, s = y.shape
    person, seed, values = np.repeat(np.eye(n), s, 0), np.tile(np.eye(s), (n, 1)), y.ravel()

    def left(columns: list[np.ndarray]) -> float:
        design = np.hstack([np.ones((n * s, 1)), *columns])
        return float(((values - design @ np.linalg.lstsq(design, values, rcond=None)[0]) ** 2).sum())

    whole = left([person, seed])
    return (left([seed]) - whole) / (n - 1), (left([person]) - whole) / (s - 1), whole / (n - 1) / (s - 1)


@pytest.mark.parametrize(("n", "s"), [(2, 2), (6, 3), (20, 5)])
def test_parts_are_the_mean_squares_of_a_regression_on_dummies(n, s):
    y = np.random.default_rng(n).normal(size=(n, s)) + np.arange(n)[:, None]
    parts, squares = variance_parts([y], [np.arange(n)], [1]), mean_squares(y)
    np.testing.assert_allclose([parts.people, parts.seeds, parts.interaction], np.array(squares) / (n * s))
    np.testing.assert_allclose([parts.people_df, parts.seeds_df], [n - 1, s - 1])


def test_the_unbiased_sum_is_the_variance_of_the_mean_of_nested_and_of_shared_people():
    for shared in (False, True):
        tables, who = simulate(Spread(0.5, 0.4, 1), 5, 3, 3, 40_000, np.random.default_rng(0), shared)
        parts = variance_parts(tables, who, [1 / 3] * 3)
        assert (parts.people + parts.seeds - parts.interaction).mean() == pytest.approx(parts.value.var(), rel=0.03)


def test_one_seed_is_the_t_interval_over_people_and_identical_people_leave_that_over_seeds():
    y = np.random.default_rng(1).normal(0.1, 1, (9, 1))
    found, known = people_effect(differences(y)), scipy.stats.ttest_1samp(y[:, 0], 0)
    np.testing.assert_allclose([found.low, found.high], known.confidence_interval())
    assert found.p == pytest.approx(known.pvalue, rel=1e-6)
    y = np.tile(np.random.default_rng(2).normal(1, 1, (1, 4)), (7, 1))
    found, known = people_effect(differences(y)), scipy.stats.ttest_1samp(y[0], 0)
    np.testing.assert_allclose([found.low, found.high], known.confidence_interval())
    assert found.p == pytest.approx(known.pvalue, rel=1e-6)


def test_people_nested_in_tasks_have_welchs_degrees_of_freedom():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (6, 1)), rng.normal(0, 3, (11, 1))
    parts = variance_parts([a, b], [np.arange(6), 6 + np.arange(11)], [1, -1])
    known = scipy.stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)
    assert parts.people_df == pytest.approx(known.df)
    np.testing.assert_allclose(parts.value + half_width(parts), known.confidence_interval().high)


def test_a_person_of_two_tasks_is_one_person():
    y = np.random.default_rng(4).normal(size=(8, 3))
    once = variance_parts([y], [np.arange(8)], [1])
    twice = variance_parts([y, y], [np.arange(8)] * 2, [0.5, 0.5])
    np.testing.assert_allclose(half_width(once), half_width(twice))
    apart = variance_parts([y, y], [np.arange(8), 8 + np.arange(8)], [0.5, 0.5])
    assert apart.people == pytest.approx(once.people / 2)
    assert apart.people_df == pytest.approx(2 * once.people_df)


def test_deformations_of_a_person_do_not_narrow_the_interval():
    table = ledger()
    copies = pd.concat([table, *(table.assign(case=table.case + 3 * more) for more in (1, 2, 3))])
    np.testing.assert_allclose(people_effect(person_contrast(table, ARMS)), people_effect(person_contrast(copies, ARMS)), atol=1e-12)


def test_a_class_that_one_arm_lacks_is_left_out_of_both():
    table = ledger(noise=0)
    table.loc[(table.arm == "new") & (table.label == "lesion") & (table.person == "0"), "dsc"] = np.nan
    table.loc[(table.arm == "old") & (table.label == "lesion") & (table.person == "0"), "dsc"] = 0.0
    assert person_contrast(table, ARMS).value.to_numpy() == pytest.approx(0.05)


def test_a_case_that_one_arm_was_not_scored_on_is_left_out_of_both():
    table = ledger(noise=0).assign(dsc=lambda t: t.dsc - 0.1 * t.case)  # Later cases are harder
    table.loc[(table.arm == "new") & (table.person == "0") & (table.case == 2), "dsc"] = np.nan
    assert person_contrast(table, ARMS).value.to_numpy() == pytest.approx(0.05)


def test_people_without_all_seeds_are_left_out_and_counted_so():
    pairs = person_contrast(ledger(), ARMS)
    short = pairs[~((pairs.person == "3") & (pairs.seed == 1))]
    assert people_effect(short).people == 7
    kept = pairs[pairs.person != "3"]
    np.testing.assert_allclose(people_effect(short), people_effect(kept))


@given(st.floats(-0.2, 0.2), st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_what_both_arms_gain_changes_nothing_and_swapped_arms_turn_the_sign(more, seed):
    table = ledger(4, 3, 2, seed=seed)
    before = people_effect(person_contrast(table, ARMS))
    after = people_effect(person_contrast(table.assign(dsc=table.dsc + more), ARMS))
    np.testing.assert_allclose(before, after, atol=1e-7)
    turned = people_effect(person_contrast(table, [(weight, {"arm": "old" if arm["arm"] == "new" else "new"}) for weight, arm in ARMS]))
    np.testing.assert_allclose([turned.value, turned.low, turned.high, turned.p], [-before.value, -before.high, -before.low, before.p], atol=1e-7)


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_order_of_rows_and_names_change_nothing_and_scale_scales(seed):
    rng = np.random.default_rng(seed)
    pairs = differences(rng.normal(size=(6, 3)))
    before = people_effect(pairs)
    names = dict(zip(range(6), rng.permutation(list("abcdef"))))
    after = people_effect(pairs.sample(frac=1, random_state=seed).assign(person=lambda t: t.person.map(names), value=lambda t: 3 * t.value))
    np.testing.assert_allclose(np.array(after[:3]), 3 * np.array(before[:3]))
    assert after.p == pytest.approx(before.p, abs=1e-9)
    assert people_effect(pairs, level=0.9).high < before.high


def test_the_p_value_is_that_of_the_interval_which_touches_zero():
    found = people_effect(person_contrast(ledger(noise=0.2), ARMS))
    touching = people_effect(person_contrast(ledger(noise=0.2), ARMS), level=1 - found.p)
    assert min(abs(touching.low), abs(touching.high)) < 1e-7


def test_empty_single_and_bad_input():
    assert np.isnan(people_effect(differences(np.ones((1, 3)))).low)
    assert np.isnan(people_effect(differences(np.ones((1, 3))).iloc[:0]).value)
    with pytest.raises(ValueError, match="a level lies between 0 and 1, got 95"):
        people_effect(differences(np.ones((3, 3))), level=95)
    with pytest.raises(ValueError, match=r"scores need the column\(s\) person"):
        person_means(ledger().drop(columns="person"))
    with pytest.raises(ValueError, match="no row of arm newer"):
        person_contrast(ledger(), [(1, {"arm": "newer"}), (-1, {"arm": "old"})])
    with pytest.raises(ValueError, match="a stratum of one person"):
        variance_parts([np.ones((1, 3))], [np.zeros(1, int)], [1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        logit(np.array([1.2]))
    with pytest.raises(ValueError, match="a margin is positive"):
        equivalence(differences(np.ones((3, 3))), 0)
    same = people_effect(differences(np.full((4, 3), 0.25)))
    assert same[:3] == (0.25, 0.25, 0.25) and same.p < 1e-6


def test_coverage_where_the_rivals_fail_and_where_nothing_is_hard():
    for spread, people, tasks in ((Spread(0.03, 0.02, 0.05), 6, 4), (Spread(0.02, 0.03, 0.03), 12, 1), (Spread(0.05, 0.005, 0.03), 20, 1)):
        found = coverage(spread, people, 3, tasks, 4000, seed=7, shared=tasks > 1).set_index("interval").coverage
        assert 0.93 <= found["chosen"] <= 0.98, (spread, found.to_dict())
    hard = coverage(Spread(0.02, 0.03, 0.03), 12, 3, 1, 2000).set_index("interval").coverage
    assert hard["people alone"] < 0.7 and hard["Satterthwaite"] < 0.93 and hard["bootstrap"] < 0.93


def test_committed_coverage_is_that_of_the_code_and_lies_where_the_chapter_says():
    found = read_json(root() / "benchmarks/results/coverage.json")
    table = pd.DataFrame(found["coverage"])
    summary = summarise_coverage(table).set_index("interval")
    assert summary.loc["chosen", "least"] > 0.93 and summary.loc["chosen", "most"] < 0.98 and summary.loc["chosen", "inside"] > 0.9
    assert summary.inside.idxmax() == "chosen"
    errors = pd.DataFrame(found["errors"])
    assert errors.false_equivalence.mean() < 0.05 and errors.false_positive.mean() < 0.03
    assert errors.false_equivalence.max() < 0.065 and errors.false_positive.max() < 0.06
    row = table[table.interval == "chosen"].iloc[0]
    again = coverage(Spread(0.05, 0.005, 0.03), int(row.people), int(row.seeds), int(row.tasks), found["draws"], 0, bool(row.shared), bool(row.skewed))
    assert again[again.interval == "chosen"].coverage.item() == pytest.approx(row.coverage, abs=2e-4)


def test_bootstrap_ends_are_those_of_an_explicit_loop():
    y = np.random.default_rng(5).normal(size=(12, 3))
    low, high = bootstrap_ends([y[None]], [np.arange(12)], np.random.default_rng(0), 4000)[:, 0]
    rng = np.random.default_rng(1)
    means = [y[rng.integers(0, 12, 12)][:, rng.integers(0, 3, 2)].mean() for _ in range(4000)]
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975]), atol=0.05)


def test_equivalence_is_two_t_tests_where_there_is_one_seed():
    y = np.random.default_rng(6).normal(0, 0.01, (12, 1))
    for margin in (0.003, 0.01):
        above, below = (
            scipy.stats.ttest_1samp(y[:, 0], -margin, alternative="greater").pvalue,
            scipy.stats.ttest_1samp(y[:, 0], margin, alternative="less").pvalue,
        )
        assert equivalence(differences(y), margin)[1] == (max(above, below) < 0.05)
    assert equivalence(differences(y + 0.1), 0.01)[1:] == (False, True)


def test_families_are_corrected():
    pairs = {str(k): person_contrast(ledger(gain=0.01, noise=0.1, seed=k), ARMS) for k in range(4)}
    table = effects_table(pairs)
    assert table.p_holm.min() == pytest.approx(min(4 * table.p.min(), 1))
    assert (table.p_holm >= table.p).all()


def test_power_of_one_seed_is_that_of_a_t_test_and_needs_fewer_people_for_more():
    sd, effect, n = 1.0, 0.8, 12
    known = scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, n - 1), n - 1, effect / sd * np.sqrt(n))
    assert power(Spread(0, 0, sd), effect, n, seeds=1, draws=20_000) == pytest.approx(known, abs=0.015)
    needed = people_needed(Spread(0.03, 0.005, 0.02), 0.03, draws=1000)
    assert needed and power(Spread(0.03, 0.005, 0.02), 0.03, needed, draws=1000) >= 0.8 > power(Spread(0.03, 0.005, 0.02), 0.03, needed - 1, draws=1000)
    assert people_needed(Spread(0.01, 0.05, 0.01), 0.02, most=50, draws=300, equivalent=True) is None


def test_group_difference_is_the_difference_of_its_two_groups():
    table = ledger(noise=0.02)
    table.loc[(table.arm == "new") & (table.group == "pathology"), "dsc"] += 0.04
    found = group_difference(table, ARMS)
    sides = [people_effect(person_contrast(table[table.group == group], ARMS)).value for group in ("pathology", "organ")]
    assert found.value == pytest.approx(sides[0] - sides[1]) and found.low < 0.04 < found.high and found.people == 8
    # What moves a person's organs and pathology alike in both arms' difference cancels
    lift = table.person.map(lambda person: 0.05 * int(person)) * (table.arm == "new")
    lifted = group_difference(table.assign(dsc=table.dsc + lift), ARMS)
    np.testing.assert_allclose(lifted[:3], found[:3], atol=1e-9)
    assert group_difference(table[table.group == "organ"], ARMS) is None


def test_the_scale_can_decide_a_difference_of_differences():
    table = ledger(noise=0.0, gain=0)
    organ, new = table.group == "organ", table.arm == "new"
    table["dsc"] = np.where(organ, np.where(new, 0.95, 0.9), np.where(new, 0.36, 0.3))
    assert group_difference(table, ARMS).value == pytest.approx(0.01)
    assert group_difference(table, ARMS, epsilon=0.01).value < -0.3


def test_over_backbones_as_scipy_has_it():
    rng = np.random.default_rng(8)
    x = rng.normal(size=9)
    y = x + 0.5 * rng.normal(size=9)
    known = scipy.stats.linregress(x, y)
    half = scipy.stats.t.ppf(0.975, 7) * known.stderr
    np.testing.assert_allclose([slope(x, y), *slope_interval(x, y)], [known.slope, known.slope - half, known.slope + half])
    assert float(rank_correlation(x, y)) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    left = [scipy.stats.spearmanr(np.delete(x, k), np.delete(y, k)).statistic for k in range(9)]
    np.testing.assert_allclose(leave_one_out(x, y, rank_correlation), left)
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5.0))) and np.isnan(slope(np.ones(5), np.arange(5.0)))
    with pytest.raises(ValueError, match="needs five backbones or more that differ in x"):
        line_over_backbones(axis(np.ones(6)), axis(np.arange(6.0)))
    with pytest.raises(ValueError, match="got 4 and 4"):
        line_over_backbones(axis(np.arange(4.0)), axis(np.arange(4.0)))


def axis(levels: np.ndarray, noise: float = 0.0, people: int = 10, seed: int = 0) -> tuple:
    "Levels as tables of two tasks of the same people, three seeds"
    rng = np.random.default_rng(seed)
    return [levels[:, None, None] + noise * rng.normal(size=(len(levels), people, 3)) for _ in range(2)], [np.arange(people)] * 2


def test_without_noise_the_bootstrap_is_that_over_backbones_and_a_slope_takes_the_wider():
    rng = np.random.default_rng(11)
    x = rng.normal(size=8)
    y = x + rng.normal(size=8)
    found = line_over_backbones(axis(x), axis(y), n=4000)
    which = rng.integers(0, 8, (4000, 8))
    known = np.nanquantile([scipy.stats.spearmanr(x[row], y[row]).statistic if len(set(row)) > 1 else np.nan for row in which], [0.025, 0.975])
    np.testing.assert_allclose([found.low, found.high], known, atol=0.12)
    assert found.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic) and found.reliable == pytest.approx((1, 1)) and found.backbones == 8
    line, (low, high) = line_over_backbones(axis(x), axis(y), slope), slope_interval(x, y)
    assert line.low <= low and line.high >= high
    again = [line_over_backbones(axis(x, 0.3), axis(y, 0.3), seed=1)[:3] for _ in range(2)]
    assert again[0] == again[1]


def test_people_are_drawn_for_all_backbones_and_tasks_alike():
    level = np.linspace(0, 1, 8)[:, None, None]
    hard = 5 * np.random.default_rng(10).normal(size=(1, 10, 1))  # People differ far more than backbones do
    side = [level + hard + np.zeros((8, 10, 3)), level - hard + np.zeros((8, 10, 3))], [np.arange(10)] * 2
    found = line_over_backbones(side, side)
    assert (found.low, found.high) == pytest.approx((1, 1))
    noise = line_over_backbones(axis(np.arange(8) * 1e-9, 1.0, seed=1), axis(np.arange(8) * 1e-9, 1.0, seed=2))
    assert noise.low < 0 < noise.high and max(noise.reliable) < 0.7


def test_reliability_is_an_intraclass_correlation_of_means():
    "Against scipy-free algebra for one seed (the F test of a two-way layout: 1 - 1 / F), and on average the share of variance that was put in"
    y = np.random.default_rng(12).normal(size=(8, 6, 1)) + np.linspace(0, 2, 8)[:, None, None]
    rows, columns = y[..., 0].mean(1), y[..., 0].mean(0)
    left = y[..., 0] - rows[:, None] - columns + y.mean()
    f = 6 * rows.var(ddof=1) / ((left**2).sum() / (7 * 5))
    assert reliability([y], [np.arange(6)]) == pytest.approx(1 - 1 / f)
    rng, found = np.random.default_rng(13), []
    for _ in range(300):
        table = (
            rng.normal(size=(8, 1, 1))
            + rng.normal(size=(8, 3, 1))
            + rng.normal(size=(8, 1, 3))
            + 3 * rng.normal(size=(8, 3, 3))
            + 9 * rng.normal(size=(1, 3, 1))
        )
        found.append(reliability([table], [np.arange(3)]))
    assert np.median(found) == pytest.approx(1 / (1 + 1 / 3 + 1 / 3 + 9 / 9), abs=0.12)
    assert np.isnan(reliability([y[:, :1]], [np.arange(1)])) and np.isnan(reliability([np.ones((8, 3, 3))], [np.arange(3)]))


def test_tables_of_backbones_hold_what_all_of_them_have_with_every_seed():
    table = ledger(noise=0.1).rename(columns={"arm": "backbone"})
    gone = (table.backbone == "new") & (table.person == "3") & (table.seed == 1) & (table.task == "t0")
    names, tables, people = backbone_tables(table[~gone])
    assert names == ["new", "old"] and [one.shape for one in tables] == [(2, 7, 3), (2, 8, 3)] and [len(who) for who in people] == [7, 8]
    known = table[(table.backbone == "old") & (table.task == "t1") & (table.person == "2") & (table.seed == 1)].groupby("label").dsc.mean().mean()
    assert tables[1][1, 2, 1] == pytest.approx(known)
    assert backbone_tables(table.assign(dsc=table.dsc.mask(table.backbone == "old")))[0] == []
    apart = table.assign(seed=table.seed + 10 * (table.task == "t1"))  # No seed in both tasks
    assert backbone_tables(apart) == ([], [], [])
    assert backbone_means(apart).empty


def test_the_spread_that_was_put_in_is_found():
    rng, found = np.random.default_rng(14), []
    for _ in range(60):
        tables, _ = simulate(Spread(0.03, 0.02, 0.05), 12, 5, 2, 1, rng)
        pairs = [differences(one[0]).assign(stratum=lambda t, task=task: [(task,)] * len(t)) for task, one in enumerate(tables)]
        found.append(np.square(fit_spread(pd.concat(pairs))))
    np.testing.assert_allclose(np.sqrt(np.mean(found, axis=0)), (0.03, 0.02, 0.05), rtol=0.25)
    with pytest.raises(ValueError, match="two people or more in each stratum"):
        fit_spread(differences(np.ones((1, 3))))


def test_means_of_backbones_are_over_what_all_of_them_have():
    table = pd.concat([ledger(noise=0).rename(columns={"arm": "backbone"})])
    table.loc[(table.backbone == "old") & (table.person == "1"), "dsc"] = np.nan
    table.loc[(table.backbone == "new") & (table.person == "1"), "dsc"] = 0.0
    found = backbone_means(table)
    assert found.to_dict() == pytest.approx({"new": 0.55, "old": 0.5})


def test_an_interval_takes_less_than_a_fifth_of_a_second():
    pairs = person_contrast(ledger(20, 3, 6), ARMS)
    people_effect(pairs)
    start = time.process_time()
    people_effect(pairs)
    assert time.process_time() - start < 0.2


# ---------------------------------------------------------------- an implementation that shares nothing


SERVES = {"t0": "01234567", "t1": "0123", "t2": "456789"}  # Some people in two tasks, some in one


def partly_shared(seeds: int) -> pd.DataFrame:
    table = pd.concat([ledger(10, seeds, 3, noise=0.06, seed=seeds)])
    table = table[[person in SERVES[task] for task, person in zip(table.task, table.person)]]
    table.loc[(table.task == "t1") & (table.label == "lesion") & (table.arm == "new") & (table.case == 1), "dsc"] = np.nan
    table.loc[(table.task == "t2") & (table.label == "lesion") & (table.arm == "old") & (table.person == "9"), "dsc"] = np.nan
    return table


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_pandas_and_scipy_alone_find_the_same_three_effects(seeds, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    table = partly_shared(seeds)
    found = importlib.import_module("recompute").recompute(table, "arm", ["new"], ["old"]).set_index("effect")
    pairs = person_contrast(table, ARMS)
    known = [people_effect(pairs)[:3], equivalence(pairs, 0.01)[0][:3], group_difference(table, ARMS, epsilon=0.01)[:3]]
    np.testing.assert_allclose(found.to_numpy(float), known, atol=1e-9)


def test_the_independent_script_imports_no_library_code_and_runs(tmp_path):
    script = BENCHMARKS / "recompute.py"
    nodes = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name for node in nodes for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])}
    assert names == {"argparse", "math", "pandas", "pathlib", "scipy", "sys", "yaml"}
    partly_shared(3).to_csv(tmp_path / "scores.csv", index=False)
    command = [sys.executable, script, tmp_path / "scores.csv", "--column", "arm", "--plus", "new", "--minus", "old"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "two one-sided tests" in done.stdout and len(done.stdout.splitlines()) == 4
