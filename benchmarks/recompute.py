"""Effects of a study with their intervals, recomputed with pandas and scipy alone: nothing of this library is imported.

    python benchmarks/recompute.py results/study
    python benchmarks/recompute.py ablations.csv --ablation scaling --plus compound --minus base
    python benchmarks/recompute.py scores.csv --column backbone --plus mednext_v2_base --minus unet --init scratch

Of a folder of results, the effects of claims 3, 6 and 7 are recomputed from its ablations.csv and compared with its claims/claims.csv; the exit code is 1
if one differs. Of a file, three effects of two arms are printed: their difference, the same at the level of two one-sided tests, and the difference
of pathology less that of organs, as logits. Several names on a side are averaged. A file has a row for each case and class: task, person, case,
seed, label, group, dsc, the column of the arms (`variant` if not named), and what rows are filtered by (`ablation`, `init`, `split`, `scans`).
All intervals are over people and seeds. Sums go over pairs of tasks here, where the library's go over people.
"""

import argparse
import math
import sys
from pathlib import Path

import pandas as pd
import yaml
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
INTERACTION_SHARE, OVERLAP_SHARE = 0.6, 0.8  # λ and κ of the chapter on people_statistics
EPSILON = 0.01
Cells = dict[tuple, pd.DataFrame]  # By stratum: people down, seeds across


def differences(scores: pd.DataFrame, column: str, plus: list[str], minus: list[str], by: list[str], as_logit: bool) -> Cells:
    "Mean over cases, mean of arms less mean of others class by class, mean over classes"
    keys = ["task", "person", "seed", "label"]
    keys += [name for name in by if name not in keys]
    arms = [(name, 1 / len(plus)) for name in plus] + [(name, -1 / len(minus)) for name in minus]
    parts = [scores[(scores[column] == name) & scores.dsc.notna()] for name, _ in arms]
    both = set.intersection(*(set(map(tuple, part[[*keys, "case"]].to_numpy())) for part in parts))
    gain = 0
    for part, (_, weight) in zip(parts, arms):
        part = part[[row in both for row in map(tuple, part[[*keys, "case"]].to_numpy())]]
        mean = part.groupby(keys).dsc.mean()
        gain = gain + weight * (mean.map(lambda s: math.log((s + EPSILON) / (1 - s + EPSILON))) if as_logit else mean)
    gain = gain.dropna().groupby([*by, "person", "seed"]).mean()
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
        other, trained = stats.t.ppf((1 + level) / 2, count - 1), max(across.var() / count - INTERACTION_SHARE * together, 0)
        half = math.sqrt(t**2 * people + other**2 * trained - OVERLAP_SHARE * t * other * people * trained / ((people + trained) or 1))
    return value, value - half, value + half


def groups_apart(scores: pd.DataFrame, column: str, plus: list[str], minus: list[str], level: float, as_logit: bool) -> tuple[float, float, float]:
    "The difference of pathology less that of organs; tasks weigh equally within a group"
    part = scores[scores.group.isin(["organ", "pathology"])]
    cells = differences(part, column, plus, minus, ["task", "group"], as_logit)
    counts = pd.Series([group for _, group in cells]).value_counts()
    return interval(cells, {(task, group): (1 if group == "pathology" else -1) / counts[group] for task, group in cells}, level)


def arms_apart(scores: pd.DataFrame, column: str, plus: list[str], minus: list[str], level: float) -> tuple[float, float, float]:
    cells = differences(scores, column, plus, minus, ["task"], False)
    return interval(cells, dict.fromkeys(cells, 1 / len(cells)), level)


def recompute(scores: pd.DataFrame, column: str, plus: list[str], minus: list[str], level: float = 0.95) -> pd.DataFrame:  # effect, value, low, high
    "The three effects; the third only where both groups of classes are there"
    sides = column, plus, minus
    rows = [("difference", *arms_apart(scores, *sides, level)), ("two one-sided tests", *arms_apart(scores, *sides, 2 * level - 1))]
    if {"organ", "pathology"} <= set(scores.group):
        rows.append(("pathology less organs, logit", *groups_apart(scores, *sides, level, True)))
    return pd.DataFrame(rows, columns=["effect", "value", "low", "high"])


def claims(table: pd.DataFrame, scans: str, modality: dict[str, str], level: float = 0.95) -> pd.DataFrame:  # claim, of, value, low, high
    "The effects of claims 3, 6 and 7 that can be computed from ablations"
    table = table[(table.split == "test") & (table.scans == scans) & (table.init != "scratch")]
    rows, four = [], table[table.ablation == "grn_scaling"]
    for name, plus, minus in (
        ("GRN", ["base_mean", "compound_mean"], ["base_without", "compound_without"]),
        ("scaling", ["compound_without", "compound_mean"], ["base_without", "base_mean"]),
    ):
        if {*plus, *minus} <= set(four.variant):
            rows.append((3, f"the weaker main effect, {name}", *arms_apart(four, "variant", plus, minus, level)))
    scaled = table[(table.ablation == "scaling") & table.variant.isin(["base", "compound"])]
    if scaled.variant.nunique() == 2 and {"organ", "pathology"} <= set(scaled.group):
        rows.append((6, "gain of pathology less gain of organs, DSC", *groups_apart(scaled, "variant", ["compound"], ["base"], level, False)))
        rows.append((6, f"the same as logits, ε {EPSILON}", *groups_apart(scaled, "variant", ["compound"], ["base"], level, True)))
    trained = table[(table.ablation == "modality") & table.variant.isin(["ct_full", "mr_full"])]
    for name in ("CT", "MR"):
        part = trained[trained.task.map(modality) == name]
        if part.variant.nunique() == 2:
            rows.append((7, f"CT- less MR-pretrained, {name} tasks", *arms_apart(part, "variant", ["ct_full"], ["mr_full"], 2 * level - 1)))
    return pd.DataFrame(rows, columns=["claim", "of", "value", "low", "high"])


def compare(folder: Path) -> int:
    "Print a folder's effects beside those of its ledger; 1 if one differs, 0 if none does"
    rules = yaml.safe_load((ROOT / "conf/rules.yaml").read_text())
    modality = {name: entry["modality"] for name, entry in yaml.safe_load((ROOT / "data/datasets.yaml").read_text()).items()}
    table = pd.read_csv(folder / "ablations.csv")
    found = claims(table, rules["scans"][table.profile.iloc[0] if "profile" in table else folder.name], modality, rules["level"])
    file = folder / "claims/claims.csv"
    ledger = pd.read_csv(file)[["claim", "of", "effect", "low", "high"]] if file.is_file() else pd.DataFrame(columns=["claim", "of", "effect", "low", "high"])
    both = found.merge(ledger, on=["claim", "of"], how="left", suffixes=("", " (ledger)")).rename(columns={"effect": "value (ledger)"})
    differ = [abs(both[name] - both[f"{name} (ledger)"].astype(float)) > 1e-6 for name in ("value", "low", "high")]
    both["differs"] = pd.concat(differ, axis=1).any(axis=1)
    print(both.round(4).to_string(index=False))
    return int(both.differs.any())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, help="folder of results, or a CSV file")
    parser.add_argument("--column", default="variant", help="column of the arms")
    parser.add_argument("--plus", nargs="+")
    parser.add_argument("--minus", nargs="+")
    parser.add_argument("--level", type=float, default=0.95)
    for name in ("ablation", "init", "split", "scans"):
        parser.add_argument(f"--{name}", help=f"keep rows of this {name} only")
    options = parser.parse_args()
    if options.scores.is_dir():
        sys.exit(compare(options.scores))
    if not options.plus or not options.minus:
        parser.error("a file needs --plus and --minus")
    scores = pd.read_csv(options.scores)
    for name in ("ablation", "init", "split", "scans"):
        if wanted := getattr(options, name):
            scores = scores[scores[name] == wanted]
    print(recompute(scores, options.column, options.plus, options.minus, options.level).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
