"""Comparisons of methods over people and seeds against scipy, written-out loops and simulations whose truth is known"""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from mednext_v2.core import root
from mednext_v2.evaluation.comparisons import compare, compare_all, drawn_means, mean_interval, person_tables, rank_stability, scratch_predicts
from mednext_v2.evaluation.statistics import holm
from mednext_v2.report.tables import read_scores


def make_scores(seed=0, people=6, methods=("one", "two"), seeds=(0,), share_nan=0.1, cases=2) -> pd.DataFrame:
    "Two tasks of the same people, with several cases each"
    generator = np.random.default_rng(seed)
    rows = [
        dict(task=task, person=f"p{person}", case=f"{person}_{case}", label=label, backbone=method, init="scratch", seed=s, dsc=generator.uniform(0.2, 0.8))
        for task, labels in {"a": ("x", "y", "z"), "b": ("x",)}.items()
        for person in range(people)
        for case in range(cases)
        for label in labels
        for method in methods
        for s in seeds
    ]
    scores = pd.DataFrame(rows)
    scores.loc[generator.uniform(size=len(scores)) < share_nan, "dsc"] = np.nan
    return scores.assign(nsd=scores.dsc)


def one_task(values, **columns) -> pd.DataFrame:
    "A case a person, and one task"
    return pd.DataFrame(dict(task="a", case=[f"{i:03d}" for i in range(len(values))], label="x", dsc=values) | columns)


def by_hand(part: pd.DataFrame, people=None) -> float:
    "Cases within a person and class, then classes, people and tasks, written out"
    tasks = []
    for _, rows in part.dropna(subset=["dsc"]).groupby("task"):
        values = {who: np.mean([own.dsc.mean() for _, own in some.groupby("label")]) for who, some in rows.groupby("person")}
        tasks.append(np.mean([values[who] for who in people or values]))
    return float(np.mean(tasks))


def test_a_mean_is_over_cases_classes_people_and_tasks():
    scores = make_scores(methods=("one",))
    found = mean_interval(scores)
    assert found.value == pytest.approx(by_hand(scores)) and found.low < found.value < found.high
    assert mean_interval(scores, level=0.5).low > found.low
    assert np.isnan(mean_interval(scores[scores.person == "p0"])[1:]).all()


def test_deformations_of_a_person_are_no_people():
    "An interval over people is as wide with ten images of each as with one"
    level = np.random.default_rng(0).normal(0.6, 0.1, 8)
    one = one_task(level, person=[f"p{i}" for i in range(8)])
    ten = pd.concat([one.assign(case=one.case + f"_{i}") for i in range(10)])
    assert mean_interval(ten) == pytest.approx(mean_interval(one))
    assert np.ptp(mean_interval(ten.drop(columns="person"))) < 0.5 * np.ptp(mean_interval(ten))


def test_one_seed_and_one_task_is_a_paired_t_test():
    generator = np.random.default_rng(3)
    sides = {name: generator.normal(0.6 + shift, 0.1, 9) for name, shift in (("one", 0.05), ("two", 0))}
    scores = pd.concat([one_task(values, backbone=name) for name, values in sides.items()])
    found = compare(scores, {"backbone": "one"}, {"backbone": "two"})
    test = scipy.stats.ttest_rel(sides["one"], sides["two"])
    assert found["p"] == pytest.approx(test.pvalue, rel=1e-3)
    assert (found["low"], found["high"]) == pytest.approx(tuple(test.confidence_interval()), rel=1e-6)
    other = compare(scores, {"backbone": "two"}, {"backbone": "one"})
    assert (other["difference"], other["p"]) == pytest.approx((-found["difference"], found["p"]))
    assert found["people"] == 9 and found["a_better"] + found["b_better"] == 9


def test_compare_pairs_only_what_both_scored():
    scores = make_scores(share_nan=0)
    scores.loc[(scores.backbone == "one") & (scores.label == "x") & (scores.person == "p0"), "dsc"] = np.nan
    scores = scores[~((scores.backbone == "two") & (scores.person == "p1"))]
    found = compare(scores, {"backbone": "one"}, {"backbone": "two"})
    kept = scores[(scores.person != "p1") & ((scores.person != "p0") | (scores.label != "x"))]
    assert found["difference"] == pytest.approx(by_hand(kept[kept.backbone == "one"]) - by_hand(kept[kept.backbone == "two"]))
    assert found["people"] == 4  # Task b has lost two of six
    with pytest.raises(ValueError, match="no row of backbone three"):
        compare(scores, {"backbone": "three"}, {"backbone": "one"})
    with pytest.raises(ValueError, match="share no scored person"):
        compare(scores[(scores.backbone == "one") == (scores.task == "a")], {"backbone": "one"}, {"backbone": "two"})


def test_equal_methods_do_not_differ():
    scores = make_scores(methods=("one",), share_nan=0)
    twin = scores.assign(backbone="two", dsc=scores.dsc + 1e-15)
    found = compare(pd.concat([scores, twin]), {"backbone": "one"}, {"backbone": "two"})
    assert (found["p"], found["a_better"], found["b_better"]) == (1, 0, 0)


def test_no_more_false_alarms_than_promised():
    generator, alarms, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        sides = [one_task(generator.normal(size=8), backbone=name) for name in ("one", "two")]
        alarms += compare(pd.concat(sides), {"backbone": "one"}, {"backbone": "two"})["p"] < 0.05
    assert alarms / trials < 0.05 + 3.3 * np.sqrt(0.05 * 0.95 / trials)


def test_compare_all_counts_every_pair_once():
    scores = make_scores(methods=("one", "two", "three", "four"), share_nan=0, people=5)
    table = compare_all(scores, ["backbone"])
    assert {frozenset(pair) for pair in zip(table.a, table.b)} == set(map(frozenset, itertools.combinations(("one", "two", "three", "four"), 2)))
    np.testing.assert_allclose(table.p_holm, holm(table.p))
    against = compare_all(scores, ["backbone"], against={"backbone": "two"})
    assert against.a.tolist() == ["one", "three", "four"] and set(against.b) == {"two"}
    assert compare_all(scores[scores.backbone == "one"], ["backbone"]).empty


def test_draws_have_the_variance_of_a_mean():
    scores = make_scores(methods=("one",), share_nan=0, people=8, seeds=(0, 1, 2), cases=1)
    scores = scores[scores.task == "a"].assign(dsc=lambda rows: rows.dsc + 0.1 * rows.seed)
    names, tables, people = person_tables(scores, ["backbone"], "dsc")
    whole, drawn = drawn_means(tables, people, 20000)
    table = tables[0][0]
    assert whole[0] == pytest.approx(by_hand(scores)) == pytest.approx(table.mean()) and names == ["one"]
    over_people, over_seeds = table.mean(1).var(ddof=1) / 8, table.mean(0).var(ddof=1) / 3
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    both = (rest**2).sum() / (8 * 3 * 7 * 2)
    assert drawn.var() == pytest.approx(over_people + over_seeds + both, rel=0.06)


def test_ranks_equal_a_loop_over_draws():
    scores = make_scores(methods=("one", "two", "three"), share_nan=0, people=5)
    found = rank_stability(scores, ["backbone"], n=4000).set_index("backbone")
    generator, counts = np.random.default_rng(9), pd.DataFrame(0.0, found.index, [1, 2, 3])
    assert found.dsc.to_dict() == pytest.approx({name: by_hand(part) for name, part in scores.groupby("backbone")})
    for _ in range(400):
        who = [f"p{i}" for i in generator.integers(0, 5, 4)]  # Four of five, of both tasks
        drawn = pd.Series({name: by_hand(part, who) for name, part in scores.groupby("backbone")}).rank(ascending=False, method="min")
        for name, rank in drawn.items():
            counts.loc[name, int(rank)] += 1 / 400
    np.testing.assert_allclose(found[["rank 1", "rank 2", "rank 3"]], counts, atol=0.09)


def test_a_clear_order_is_stable_and_lower_can_be_better():
    scores = pd.concat([one_task(np.linspace(0.5, 0.6, 6) + shift, backbone=name) for name, shift in (("best", 0.3), ("mid", 0.1), ("low", 0))])
    table = rank_stability(scores, ["backbone"], n=100)
    assert table.backbone.tolist() == ["best", "mid", "low"] and table.kendall_tau.eq(1).all()
    assert rank_stability(scores, ["backbone"], higher=False, n=10).backbone.tolist() == ["low", "mid", "best"]
    with pytest.raises(ValueError, match="lacks people or seeds"):
        rank_stability(scores[~((scores.backbone == "mid") & (scores.case == "000"))], ["backbone"])
    twins = pd.concat([one_task(np.linspace(0.5, 0.6, 6), backbone=name) for name in ("a", "b")])
    assert rank_stability(twins, ["backbone"], n=20)["rank 1"].eq(1).all()


def both_starts(backbones=5, people=6, noise=0.01, seed=0):
    generator = np.random.default_rng(seed)
    skill = np.linspace(0.3, 0.7, backbones)
    parts = [
        one_task(skill[at] + shift + noise * generator.normal(size=people), backbone=f"net{at}", init=init)
        for at in range(backbones)
        for init, shift in (("scratch", 0), ("corpus", 0.1))
    ]
    return pd.concat(parts, ignore_index=True)


def test_correlation_over_backbones_is_that_of_the_means():
    scores = both_starts(noise=0.2)
    points, found = scratch_predicts(scores, n=300)
    assert dict(zip(points.backbone, points.scratch)) == pytest.approx(scores[scores.init == "scratch"].groupby("backbone").dsc.mean().to_dict())
    found = found.set_index("coefficient")
    assert found.value["Pearson"] == pytest.approx(scipy.stats.pearsonr(points.scratch, points.pretrained).statistic)
    assert found.value["Spearman"] == pytest.approx(scipy.stats.spearmanr(points.scratch, points.pretrained).statistic)
    less = [scipy.stats.pearsonr(points.scratch.drop(i), points.pretrained.drop(i)).statistic for i in range(5)]
    assert (found.least_without_one["Pearson"], found.most_without_one["Pearson"]) == pytest.approx((min(less), max(less)))
    assert (found.low <= found.value).all() and (found.value <= found.high).all()


def test_an_interval_over_backbones_stays_wide_with_many_people():
    "The choice of five backbones is uncertain however well each is measured"
    scores = both_starts(people=200, noise=0.3)
    scores["dsc"] += (scores.init != "scratch") * scores.backbone.map({"net0": 0.3, "net1": -0.2, "net2": 0.1, "net3": 0, "net4": -0.1})
    _, found = scratch_predicts(scores, n=500)
    assert (found.high - found.low > 0.5).all()


def test_two_backbones_tell_nothing():
    _, found = scratch_predicts(both_starts(backbones=2), n=20)
    assert found[["value", "low", "high"]].isna().all().all()


def test_correlation_needs_both_starts_of_every_backbone():
    scores = both_starts()
    with pytest.raises(ValueError, match="name the pretraining that is meant: there is none"):
        scratch_predicts(scores[scores.init == "scratch"])
    with pytest.raises(ValueError, match="every backbone needs the same people from scratch and after corpus: net1"):
        scratch_predicts(scores[~((scores.backbone == "net1") & (scores.init == "corpus"))])


def test_committed_scores_can_be_read():
    scores = read_scores("mini")
    table = rank_stability(scores, n=50)
    assert table[[c for c in table if c.startswith("rank ")]].to_numpy().sum() == pytest.approx(len(table), abs=0.5)
    assert compare_all(scores, metric="nsd", against=table.loc[0, ["backbone", "init"]].to_dict()).p_holm.dropna().le(1).all()


def test_deformed_scans_of_one_person_have_no_interval():
    assert root().is_dir() and np.isnan(mean_interval(read_scores("mini").query("task == 'abdomen_ct' and backbone == 'unet' and init == 'scratch'")).low)
