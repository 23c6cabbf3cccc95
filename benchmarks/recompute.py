"""Effects of a study with their intervals, recomputed with pandas and scipy alone: nothing of this library is imported.

    python benchmarks/recompute.py ablations.csv --ablation scaling --plus compound --minus base
    python benchmarks/recompute.py scores.csv --column backbone --plus mednext_v2_base --minus unet --init scratch

A scores file has a row for each case and class: task, person, case, seed, label, group, dsc, the column of the two arms (`variant` if not
named), and what rows are filtered by (`ablation`, `init`, `split`, `scans`). Three effects are printed, each with its interval over people
and seeds: the difference of the two arms; the same at the level of two one-sided tests; and the difference of pathology less that of organs,
as logits. Sums go over pairs of tasks here, where the library's go over people.
"""

import argparse
import math

import pandas as pd
from scipy import stats

SUBTRACT = OVERLAP = 0.6  # λ and κ of the chapter on people_statistics
EPSILON = 0.01
Cells = dict[tuple, pd.DataFrame]  # By stratum: people down, seeds across


def differences(scores: pd.DataFrame, column: str, plus: str, minus: str, by: list[str], as_logit: bool) -> Cells:
    "Mean over cases, difference of arms class by class, mean over classes"
    keys = ["task", "person", "seed", "label"]
    keys += [name for name in by if name not in keys]
    arms = {arm: scores[scores[column] == arm] for arm in (plus, minus)}
    scored = [set(map(tuple, part.loc[part.dsc.notna(), [*keys, "case"]].to_numpy())) for part in arms.values()]
    both = scored[0] & scored[1]
    sides = []
    for part in arms.values():
        part = part[[row in both for row in map(tuple, part[[*keys, "case"]].to_numpy())]]
        mean = part.groupby(keys).dsc.mean()
        sides.append(mean.map(lambda s: math.log((s + EPSILON) / (1 - s + EPSILON))) if as_logit else mean)
    gain = (sides[0] - sides[1]).dropna().groupby([*by, "person", "seed"]).mean()
    found = {}
    for stratum, part in gain.groupby(level=by):
        found[stratum if isinstance(stratum, tuple) else (stratum,)] = part.droplevel(by).unstack("seed")
    seeds = sorted(set.intersection(*(set(table.columns) for table in found.values())))
    return {stratum: table[seeds].dropna() for stratum, table in found.items()}


def degrees_of_freedom(cells: Cells, weights: dict[tuple, float]) -> float:
    "Welch and Satterthwaite's, over groups of people who serve in the same strata"
    serves: dict = {}
    for stratum, table in cells.items():
        for person in table.index:
            serves.setdefault(person, []).append(stratum)
    groups: dict = {}
    for person, strata in serves.items():
        total = 0.0
        for stratum in strata:
            rows = cells[stratum].mean(axis=1)
            total += weights[stratum] * (rows[person] - rows.mean()) / math.sqrt(len(rows) * (len(rows) - 1))
        groups.setdefault(tuple(strata), []).append(total**2)
    whole = sum(map(sum, groups.values()))
    return whole**2 / sum(sum(group) ** 2 / max(len(group) - 1, 1) for group in groups.values())


def interval(cells: Cells, weights: dict[tuple, float], level: float) -> tuple[float, float, float]:
    "A weighted sum of means over people and seeds, and the ends of its interval"
    value = sum(weight * cells[stratum].to_numpy().mean() for stratum, weight in weights.items())
    across = pd.concat({stratum: cells[stratum].mean() * weight for stratum, weight in weights.items()}, axis=1).sum(axis=1)
    count = len(across)
    people = together = 0.0
    for one, first in cells.items():
        for other, second in cells.items():  # Covariance of two tasks' means, over the people of both
            shared = first.index.intersection(second.index)
            n, m = len(first), len(second)
            scale = weights[one] * weights[other] / math.sqrt(n * (n - 1) * m * (m - 1))
            rows = [table.mean(axis=1) - table.to_numpy().mean() for table in (first, second)]
            people += scale * float((rows[0][shared] * rows[1][shared]).sum())
            if count > 1:
                left = [table.sub(table.mean(axis=1), axis=0).sub(table.mean() - table.to_numpy().mean(), axis=1).loc[shared] for table in (first, second)]
                together += scale * float((left[0] * left[1]).to_numpy().sum()) / (count * (count - 1))
    t = stats.t.ppf((1 + level) / 2, degrees_of_freedom(cells, weights))
    if count == 1:
        half = t * math.sqrt(people)
    else:
        other, trained = stats.t.ppf((1 + level) / 2, count - 1), max(across.var() / count - SUBTRACT * together, 0)
        half = math.sqrt(t**2 * people + other**2 * trained - OVERLAP * t * other * people * trained / ((people + trained) or 1))
    return value, value - half, value + half


def recompute(scores: pd.DataFrame, column: str, plus: str, minus: str, level: float = 0.95) -> pd.DataFrame:  # effect, value, low, high
    "The three effects; the third only where both groups of classes are there"
    cells = differences(scores, column, plus, minus, ["task"], False)
    equal = dict.fromkeys(cells, 1 / len(cells))
    rows = [("difference", *interval(cells, equal, level)), ("two one-sided tests", *interval(cells, equal, 2 * level - 1))]
    if {"organ", "pathology"} <= set(scores.group):
        part = scores[scores.group.isin(["organ", "pathology"])]
        cells = differences(part, column, plus, minus, ["task", "group"], True)
        counts = pd.Series([group for _, group in cells]).value_counts()
        weights = {(task, group): (1 if group == "pathology" else -1) / counts[group] for task, group in cells}
        rows.append(("pathology less organs, logit", *interval(cells, weights, level)))
    return pd.DataFrame(rows, columns=["effect", "value", "low", "high"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", help="CSV file")
    parser.add_argument("--column", default="variant", help="column of the two arms")
    parser.add_argument("--plus", required=True)
    parser.add_argument("--minus", required=True)
    parser.add_argument("--level", type=float, default=0.95)
    for name in ("ablation", "init", "split", "scans"):
        parser.add_argument(f"--{name}", help=f"keep rows of this {name} only")
    options = parser.parse_args()
    scores = pd.read_csv(options.scores)
    for name in ("ablation", "init", "split", "scans"):
        if wanted := getattr(options, name):
            scores = scores[scores[name] == wanted]
    print(recompute(scores, options.column, options.plus, options.minus, options.level).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
