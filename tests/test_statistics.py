"""Statistics against scipy, written-out loops and simulations whose truth is known"""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from mednext_v2.evaluation.statistics import bootstrap, holm, means


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


def test_means_leave_out_what_is_never_there():
    scores = make_scores(share_nan=0)
    base = means(scores[scores.label != "z"])
    scores.loc[scores.label == "z", ["dsc", "nsd"]] = np.nan
    np.testing.assert_allclose(means(scores), base)
    scores[["dsc", "nsd"]] = np.nan
    assert means(scores).isna().all(axis=None)
    with pytest.raises(ValueError, match="need the column.s. centre; they have: task"):
        means(scores, ["centre"])


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
