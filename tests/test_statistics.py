"""Statistics against scipy, written-out loops and simulations whose truth is known"""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from mednext_v2.core import root
from mednext_v2.evaluation.statistics import (
    bootstrap,
    bootstrap_interval,
    compare,
    compare_all,
    holm,
    mean_interval,
    means,
    pair_cases,
    rank_stability,
    scratch_predicts,
    seed_spread,
    select_method,
    shared_draws,
)


def make_scores(seed=0, cases=6, methods=("one", "two"), seeds=(0,), share_nan=0.1, tasks=None) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    tasks = tasks or {"a": ("x", "y", "z"), "b": ("x",)}
    rows = [
        dict(task=task, case=f"{case}", label=label, backbone=method, init="scratch", seed=s, dsc=generator.uniform(), nsd=generator.uniform())
        for task, labels in tasks.items()
        for case in range(cases)
        for label in labels
        for method in methods
        for s in seeds
    ]
    scores = pd.DataFrame(rows)
    scores.loc[generator.uniform(size=len(scores)) < share_nan, ["dsc", "nsd"]] = np.nan
    return scores


def one_task(values, **columns) -> pd.DataFrame:
    return pd.DataFrame(dict(task="a", case=[f"{i:03d}" for i in range(len(values))], label="x", dsc=values) | columns)


# ---- Means


def looped(scores: pd.DataFrame, metric: str, order: tuple[str, ...]) -> float:
    "The mean over one column after the other, written out over dictionaries"
    level = {}
    for row in scores.to_dict("records"):
        level.setdefault(tuple(row[column] for column in order), []).append(row[metric])
    for _ in order:
        outer = {}
        for key, values in level.items():
            finite = [value for value in values if np.isfinite(value)]
            outer.setdefault(key[1:], []).append(sum(finite) / len(finite) if finite else np.nan)
        # The first step averages what shares all keys, each further one drops the first of them
        level = outer
    finite = [value for value in level[()] if np.isfinite(value)]
    return sum(finite) / len(finite)


@pytest.mark.parametrize("order", list(itertools.permutations(("case", "label", "task"))))
def test_means_follow_the_declared_order(order):
    scores = make_scores(seeds=(0,), share_nan=0.2)
    table = means(scores, ["backbone"], order=order)
    for row in table.itertuples():
        part = scores[scores.backbone == row.backbone]
        for metric in ("dsc", "nsd"):
            assert getattr(row, metric) == pytest.approx(looped(part, metric, order))


def test_means_equal_the_report_where_each_case_has_each_seed():
    from mednext_v2.report.tables import summary

    scores = make_scores(seeds=(0, 1), share_nan=0)
    found = summary(scores, ["backbone", "init"])
    table = means(scores, ["backbone", "init"])
    np.testing.assert_allclose(table[["dsc", "nsd"]], found[["dsc", "nsd"]])
    kept = means(scores, ["task", "backbone", "init"])
    np.testing.assert_allclose(kept.dsc, summary(scores, ["task", "backbone", "init"]).dsc)


def test_means_leave_out_what_is_never_there():
    scores = make_scores(share_nan=0)
    base = means(scores[scores.label != "z"])
    scores.loc[scores.label == "z", ["dsc", "nsd"]] = np.nan
    np.testing.assert_allclose(means(scores), base)
    scores[["dsc", "nsd"]] = np.nan
    assert means(scores).isna().all(axis=None)
    with pytest.raises(ValueError, match="need the column.s. centre; they have: task"):
        means(scores, ["centre"])


def test_committed_scores_can_be_read():
    scores = pd.read_csv(root() / "results/mini/scores.csv", dtype={"case": str})
    table = rank_stability(scores, n=50)
    assert table[[c for c in table if c.startswith("rank ")]].to_numpy().sum() == pytest.approx(len(table), abs=0.5)
    assert compare_all(scores, metric="nsd", against=table.loc[0, ["backbone", "init"]].to_dict()).p_holm.le(1).all()


# ---- Intervals


def test_bootstrap_equals_scipy_on_plain_numbers():
    values = np.random.default_rng(0).gamma(2, size=25)
    for method in ("percentile", "BCa"):
        found = bootstrap(one_task(values), n=999, seed=3, method=method)
        expected = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=999, method=method, random_state=np.random.default_rng(3), vectorized=False
        ).confidence_interval
        assert found == pytest.approx((values.mean(), *expected), rel=1e-9)


def test_bootstrap_of_a_function_equals_that_of_the_metric():
    scores = make_scores(methods=("one",), share_nan=0.15)
    by_name = bootstrap(scores, "dsc", n=150, seed=1)
    by_rows = bootstrap(scores, lambda rows: means(rows, metrics=["dsc"]).dsc.item(), n=150, seed=1)
    assert by_rows == pytest.approx(by_name, rel=1e-9)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_intervals_hold_the_truth_as_often_as_they_say(method):
    # Cases of two classes that depend on each other: drawing rows instead of cases would be far too narrow
    generator, hits, trials, level = np.random.default_rng(5), 0, 100, 0.9
    for trial in range(trials):
        case = generator.normal(0.6, 0.1, 40)
        noise = generator.normal(0, 0.01, (2, 40))
        scores = pd.concat([one_task(case + noise[i]).assign(label=str(i)) for i in range(2)])
        found = bootstrap(scores, n=200, level=level, seed=trial, method=method)
        hits += found.low <= 0.6 <= found.high
    error = 3.3 * np.sqrt(level * (1 - level) / trials)  # One of a thousand runs lies outside by chance
    assert level - error - 0.02 <= hits / trials <= level + error  # 40 cases: slightly too narrow is known


def test_no_interval_from_one_case_and_none_of_width_from_equal_ones():
    assert np.isnan(bootstrap(one_task([0.5]))[1:]).all() and bootstrap(one_task([0.5])).value == 0.5
    assert bootstrap(one_task([0.25] * 5), n=50) == (0.25, 0.25, 0.25)
    assert np.isnan(bootstrap(one_task([np.nan] * 5), n=50)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(level=95), "needs 0 < level < 1 and n >= 1, got 95"),
        (dict(level=0.0), "needs 0 < level < 1"),
        (dict(n=0), "needs 0 < level < 1 and n >= 1, got 0.95 and 0"),
        (dict(method="bogus"), "method"),
        (dict(cluster="centre"), "scores need the column.s. centre"),
        (dict(statistic="speed"), "scores need the column.s. speed"),
    ],
)
def test_bad_settings_of_the_bootstrap_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(one_task([0.1, 0.2, 0.4]), **options)


def test_bootstrap_is_repeatable_and_depends_on_the_seed():
    scores = make_scores()
    assert bootstrap(scores, n=100) == bootstrap(scores.sample(frac=1, random_state=0), n=100)
    assert bootstrap(scores, n=100) != bootstrap(scores, n=100, seed=1)


def test_bootstrap_agrees_with_the_interval_of_the_report():
    values = np.random.default_rng(2).uniform(size=60)
    found = bootstrap(one_task(values), n=2000, method="percentile")
    assert found[1:] == pytest.approx(bootstrap_interval(values, repeats=4000), abs=6e-3)


# ---- Comparisons


def test_holm_equals_the_definition():
    generator = np.random.default_rng(0)
    for size in (1, 2, 7):
        p = generator.uniform(0, 0.2, size)
        order = np.argsort(p)
        expected = np.empty(size)
        for place, at in enumerate(order):
            expected[at] = min(1, max((size - k) * p[order[k]] for k in range(place + 1)))
        np.testing.assert_allclose(holm(p), expected)
    np.testing.assert_allclose(holm([0.01, 0.02, 0.03, 0.005]), [0.03, 0.04, 0.04, 0.02])  # By hand
    np.testing.assert_equal(holm([0.01, np.nan, 0.03]), [0.02, np.nan, 0.03])


def test_holm_keeps_the_share_of_false_alarms():
    generator = np.random.default_rng(0)
    alarms = np.mean([holm(generator.uniform(size=10)).min() < 0.05 for _ in range(2000)])
    assert alarms < 0.05 + 3.3 * np.sqrt(0.05 * 0.95 / 2000)


def test_compare_equals_scipy_over_cases():
    scores = make_scores(cases=15, share_nan=0.2, seeds=(0, 1))
    found = compare(scores, {"backbone": "one"}, {"backbone": "two"})
    differences, tasks = [], {}
    for (task, _), part in scores.groupby(["task", "case"]):
        rows = part.groupby(["backbone", "label"]).dsc.mean().unstack(0).dropna()
        if len(rows):
            differences.append((rows.one - rows.two).mean())
            if len(rows):
                tasks.setdefault(task, []).append(rows.one.mean() - rows.two.mean())
    assert found["n"] == len(differences)
    assert found["p"] == pytest.approx(scipy.stats.wilcoxon(differences).pvalue)
    assert found["difference"] == pytest.approx(np.mean([np.mean(values) for values in tasks.values()]))
    assert found["a_better"] + found["b_better"] == found["n"]
    other = compare(scores, {"backbone": "two"}, {"backbone": "one"})
    assert (other["difference"], other["p"]) == pytest.approx((-found["difference"], found["p"]))


def test_compare_pairs_only_what_both_scored():
    scores = make_scores(share_nan=0)
    scores.loc[(scores.backbone == "one") & (scores.label == "x") & (scores.case == "0"), "dsc"] = np.nan
    scores = scores[~((scores.backbone == "two") & (scores.case == "1"))]
    pairs = pair_cases(scores, {"backbone": "one"}, {"backbone": "two"})
    assert len(pairs) == 12 - 2 - 1  # Case 1 of both tasks, and case 0 of the task whose only class is lost
    with pytest.raises(ValueError, match="no row of backbone three"):
        select_method(scores, {"backbone": "three"})
    with pytest.raises(ValueError, match="share no scored case"):
        pair_cases(scores[(scores.backbone == "one") == (scores.task == "a")], {"backbone": "one"}, {"backbone": "two"})


def test_equal_methods_do_not_differ():
    scores = make_scores(methods=("one",), share_nan=0)
    twin = scores.assign(backbone="two", dsc=scores.dsc + 1e-15)
    found = compare(pd.concat([scores, twin]), {"backbone": "one"}, {"backbone": "two"})
    assert (found["p"], found["a_better"], found["b_better"]) == (1, 0, 0)


def test_wilcoxon_raises_as_many_false_alarms_as_it_says():
    generator, alarms, trials = np.random.default_rng(0), 0, 100
    for _ in range(trials):
        sides = [one_task(generator.normal(size=20), backbone=name) for name in ("one", "two")]
        pairs = pair_cases(pd.concat(sides), {"backbone": "one"}, {"backbone": "two"})
        alarms += scipy.stats.wilcoxon(pairs.a - pairs.b).pvalue < 0.05
    assert alarms / trials < 0.05 + 3.3 * np.sqrt(0.05 * 0.95 / trials)


def test_compare_all_counts_every_pair_once():
    scores = make_scores(methods=("one", "two", "three", "four"), share_nan=0, cases=5)
    table = compare_all(scores, ["backbone"])
    assert {frozenset(pair) for pair in zip(table.a, table.b)} == set(map(frozenset, itertools.combinations(("one", "two", "three", "four"), 2)))
    np.testing.assert_allclose(table.p_holm, holm(table.p))
    against = compare_all(scores, ["backbone"], against={"backbone": "two"})
    assert against.a.tolist() == ["one", "three", "four"] and set(against.b) == {"two"}
    assert compare_all(scores[scores.backbone == "one"], ["backbone"]).empty


# ---- Ranks and seeds


def test_ranks_equal_a_loop_over_draws():
    scores = make_scores(methods=("one", "two", "three"), share_nan=0, cases=5)
    found = rank_stability(scores, ["backbone"], n=3000).set_index("backbone")
    generator, counts, taus = np.random.default_rng(9), pd.DataFrame(0.0, found.index, [1, 2, 3]), []
    whole = means(scores, ["backbone"], ["dsc"]).set_index("backbone").dsc
    by_case = dict(list(scores.groupby(["task", "case"])))
    for _ in range(150):
        rows = []
        for task, part in scores.groupby("task"):
            for turn, case in enumerate(generator.choice(part.case.unique(), 5)):
                rows.append(by_case[task, case].assign(case=str(turn)))
        drawn = means(pd.concat(rows), ["backbone"], ["dsc"]).set_index("backbone").dsc
        for method, rank in drawn.rank(ascending=False).items():
            counts.loc[method, int(rank)] += 1 / 150
        taus.append(scipy.stats.kendalltau(whole, drawn[whole.index]).statistic)
    np.testing.assert_allclose(found[["rank 1", "rank 2", "rank 3"]], counts, atol=0.12)
    assert found.kendall_tau.iloc[0] == pytest.approx(np.mean(taus), abs=0.1)


def test_a_clear_order_is_stable_and_lower_can_be_better():
    base = np.random.default_rng(0).uniform(size=12)
    scores = pd.concat(one_task(base + i, backbone=name) for i, name in enumerate(("low", "middle", "high")))
    table = rank_stability(scores, ["backbone"], n=200)
    assert table.backbone.tolist() == ["high", "middle", "low"] and table["rank"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(table[["rank 1", "rank 2", "rank 3"]], np.eye(3))
    assert (table.kendall_tau == 1).all()
    assert rank_stability(scores, ["backbone"], higher=False, n=50).backbone.tolist() == ["low", "middle", "high"]
    with pytest.raises(ValueError, match="high lacks cases that others have"):
        rank_stability(scores[~((scores.backbone == "high") & (scores.case == "003"))], ["backbone"])


def test_twins_share_the_first_rank():
    values = np.random.default_rng(0).uniform(size=12)
    table = rank_stability(pd.concat(one_task(values, backbone=name) for name in "ab"), ["backbone"], n=100)
    assert table["rank"].tolist() == [1, 1] and table["rank 1"].tolist() == [1, 1]


def test_seed_spread_is_that_of_single_seeds():
    scores = make_scores(seeds=(0, 1, 2), share_nan=0.1)
    found = seed_spread(scores).set_index("backbone")
    for name, part in scores.groupby("backbone"):
        single = [looped(part[part.seed == s], "dsc", ("case", "label", "task")) for s in (0, 1, 2)]
        assert found.loc[name, ["mean", "sd", "low", "high"]].tolist() == pytest.approx([np.mean(single), np.std(single, ddof=1), min(single), max(single)])
    assert (found.seeds == 3).all()
    assert np.isnan(seed_spread(scores[scores.seed == 0]).sd).all()


def both_starts(backbones=4, cases=6, noise=0.01, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        dict(
            task=task,
            case=f"{task}{case}",
            label="x",
            backbone=f"b{index}",
            init=init,
            seed=0,
            dsc=0.3 + 0.08 * index + 0.1 * (init != "scratch") + noise * rng.normal(),
        )
        for task in "pq"
        for case in range(cases)
        for index in range(backbones)
        for init in ("scratch", "corpus")
    ]
    return pd.DataFrame(rows)


def test_correlation_over_backbones_is_that_of_the_means():
    scores = both_starts(noise=0.1)
    points, found = scratch_predicts(scores, n=200)
    wanted = scores.groupby(["backbone", "init", "task"]).dsc.mean().groupby(["backbone", "init"]).mean().unstack()
    np.testing.assert_allclose(points.set_index("backbone")[["scratch", "pretrained"]], wanted[["scratch", "corpus"]])
    by_name = found.set_index("coefficient")
    for name in ("pearsonr", "spearmanr", "kendalltau"):
        value = getattr(scipy.stats, name)(points.scratch, points.pretrained).statistic
        row = by_name.loc[{"pearsonr": "Pearson", "spearmanr": "Spearman", "kendalltau": "Kendall"}[name]]
        assert row.value == pytest.approx(value) and row.low <= row.high and row.backbones == 4
    without = [points.drop(at)[["scratch", "pretrained"]].corr().iloc[0, 1] for at in range(4)]
    assert by_name.least_without_one["Pearson"] == pytest.approx(min(without))
    assert by_name.most_without_one["Pearson"] == pytest.approx(max(without))


def test_interval_of_a_correlation_narrows_with_cases():
    wide, narrow = (scratch_predicts(both_starts(cases=cases, noise=0.15), n=300)[1] for cases in (4, 200))
    assert (narrow.high - narrow.low)[0] < (wide.high - wide.low)[0]


def test_two_backbones_tell_nothing():
    _, found = scratch_predicts(both_starts(backbones=2), n=20)
    assert found[["value", "low", "high", "least_without_one"]].isna().all().all()


def test_correlation_needs_both_starts_of_every_backbone():
    scores = both_starts()
    with pytest.raises(ValueError, match="needs the same cases from scratch and after corpus"):
        scratch_predicts(scores[(scores.backbone != "b1") | (scores.init == "scratch")])
    with pytest.raises(ValueError, match="name the pretraining that is meant: corpus, more"):
        scratch_predicts(pd.concat([scores, scores[scores.init == "corpus"].assign(init="more")]))
    with pytest.raises(ValueError, match="there is none"):
        scratch_predicts(scores[scores.init == "scratch"])


# ---- Several seeds


def crossed(generator, difference=0.0, cases=12, seeds=3, of_case=0.05, of_seed=0.05, rest=0.02):
    "Two methods with effects of cases, which they share, and of seeds, which they do not"
    case = generator.normal(0.6, of_case, cases)
    return pd.concat(
        one_task(case + shift + generator.normal(0, of_seed) + generator.normal(0, rest, cases), backbone=name, seed=seed)
        for name, shift in {"old": 0.0, "new": difference}.items()
        for seed in range(seeds)
    )


def test_intervals_over_seeds_hold_the_truth_where_those_over_cases_do_not():
    generator, hits, narrow = np.random.default_rng(0), [], []
    for _ in range(150):
        scores = crossed(generator, difference=0.1)
        found = compare(scores, {"backbone": "new"}, {"backbone": "old"})
        hits.append(found["low"] < 0.1 < found["high"])
        averaged = scores.groupby(["task", "case", "label", "backbone"], as_index=False).dsc.mean()
        found = compare(averaged, {"backbone": "new"}, {"backbone": "old"})
        narrow.append(found["low"] < 0.1 < found["high"])
    # Percentiles of three seeds a side stay somewhat short of 95 %: few seeds have no tails
    assert np.mean(hits) > 0.8 and np.mean(narrow) < 0.6


@pytest.mark.parametrize("share_nan", [0, 0.2])
def test_draws_of_seeds_have_the_variance_of_a_mean(share_nan):
    scores = make_scores(methods=("one",), seeds=(0, 1, 2), cases=40, share_nan=share_nan, tasks={"a": ("x",)})
    scores["dsc"] += 0.3 * scores.seed  # Far more than cases give
    found, single = mean_interval(scores), means(scores, ["seed"], ["dsc"]).dsc
    error = single.std(ddof=1) / np.sqrt(3)
    assert found.value == pytest.approx(means(scores, [], ["dsc"]).dsc[0], abs=0.01)
    # Two of three seeds, drawn with replacement, give few values: their range and spread are known
    assert found.low == pytest.approx(single.min(), abs=0.15) and found.high == pytest.approx(single.max(), abs=0.15)
    _, drawn = shared_draws([scores], "dsc", 4000, 0)
    assert drawn.std() == pytest.approx(error, rel=0.1)


def test_a_difference_over_seeds_equals_a_loop_over_draws():
    scores = make_scores(seeds=(0, 1, 2), share_nan=0, cases=5)
    one, other = {"backbone": "one"}, {"backbone": "two"}
    found, generator, drawn = compare(scores, one, other), np.random.default_rng(5), []
    sides = [select_method(scores, method).groupby(["task", "case", "seed"]).dsc.mean() for method in (one, other)]
    for _ in range(1500):
        by_task = []
        for task in ("a", "b"):
            cases = generator.integers(5, size=5)
            a, b = (side[task].unstack().to_numpy()[cases][:, generator.integers(3, size=2)] for side in sides)
            by_task.append(a.mean() - b.mean())
        drawn.append(np.mean(by_task))
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    assert found["difference"] == pytest.approx(pair_cases(scores, one, other).groupby("task")[["a", "b"]].mean().mean().diff().b * -1)


def test_one_seed_changes_nothing_and_seeds_may_differ_in_number():
    scores = make_scores(seeds=(0,))
    plain = scores.drop(columns="seed")
    assert compare(scores, {"backbone": "one"}, {"backbone": "two"}) == compare(plain, {"backbone": "one"}, {"backbone": "two"})
    assert mean_interval(scores[scores.backbone == "one"]) == mean_interval(plain[plain.backbone == "one"])
    more = pd.concat([scores, make_scores(seed=1, methods=("one",), seeds=(1, 2))])
    assert np.isfinite(compare(more, {"backbone": "one"}, {"backbone": "two"})["low"])
