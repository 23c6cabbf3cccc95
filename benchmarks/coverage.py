"""Do the intervals over people and pretrainings hold the truth as often as they say?

    python benchmarks/coverage.py            (about ten minutes on one core)

Ledgers with a known truth are drawn in many designs; results/coverage.json holds, for each design and interval, the share of nominal 95 %
intervals that hold the truth and their mean width; the share of equivalence tests that succeed with the true difference at the margin, and
the false positives of a comparison without a difference. Beside it, `interval_constants.py` and `verdict_rates.py` write further parts of the
same file. The chapters on people_statistics and rules show the summaries.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np

from mednext_v2.evaluation.people_statistics import Spread, coverage, half_width, simulate, variance_parts

RESULTS = Path(__file__).resolve().parent / "results/coverage.json"
SPREADS = {"people": Spread(0.05, 0.005, 0.03), "all": Spread(0.03, 0.02, 0.05), "seeds": Spread(0.02, 0.03, 0.03), "noise": Spread(0.01, 0.01, 0.09)}
DRAWS = 4000


def save(**parts: list | int) -> None:
    "Put parts into results/coverage.json; the others stay"
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    text = json.dumps(found | parts, indent=None, separators=(",", ":"))
    RESULTS.write_text(text.replace("},{", "},\n{") + "\n")


def designs() -> product:  # (name, spread), people, seeds, (tasks, whether they share their people), whether skewed
    return product(SPREADS.items(), (6, 10, 20), (3, 5), ((1, False), (4, True), (3, False)), (False, True))


def main() -> None:
    rows, errors = [], []
    for index, ((name, spread), people, seeds, (tasks, shared), skewed) in enumerate(designs()):
        design = dict(mostly=name, people=people, seeds=seeds, tasks=tasks, shared=shared, skewed=skewed)
        found = coverage(spread, people, seeds, tasks, DRAWS, index, shared, skewed)
        rows += [design | {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in found.to_dict("records")]
        tables, who = simulate(spread, people, seeds, tasks, DRAWS, np.random.default_rng(10_000 + index), shared, skewed)
        parts = variance_parts(tables, who, [1 / tasks] * tasks)
        positive = float((parts.value - half_width(parts) > 0).mean())
        margin = 0.05  # The true difference is the margin itself: equivalence would be wrong
        wrong = float((abs(parts.value + margin) + half_width(parts, 0.9) < margin).mean())
        errors.append(design | dict(false_positive=round(positive, 4), false_equivalence=round(wrong, 4)))
    save(draws=DRAWS, coverage=rows, errors=errors)


if __name__ == "__main__":
    main()
