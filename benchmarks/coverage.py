"""Do the intervals over people and pretrainings hold the truth as often as they say?

    python benchmarks/coverage.py            (about ten minutes on one core)

Ledgers with a known truth are drawn in many designs; results/coverage.json holds, for each design and interval, the share of nominal 95 %
intervals that hold the truth and their mean width; the share of equivalence tests that succeed with the true difference at the margin, and
the false positives of a comparison without a difference. `verdicts` counts the words that the rules for the seven claims find in made-up
studies in which nothing is true, or everything. The chapters on people_statistics and rules show the summaries.
"""

import json
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np

from mednext_v2.evaluation.people_statistics import Spread, coverage, half_width, simulate, variance_parts
from mednext_v2.report.rules import VERDICTS, judge, make_study, read_rules

RESULTS = Path(__file__).resolve().parent / "results/coverage.json"
SPREADS = {"people": Spread(0.05, 0.005, 0.03), "all": Spread(0.03, 0.02, 0.05), "seeds": Spread(0.02, 0.03, 0.03), "noise": Spread(0.01, 0.01, 0.09)}
DRAWS, STUDIES = 4000, 200
NOISE = (0.02, 0.015, 0.03)  # Of each arm: people, seeds, the rest
NOTHING = {"modality": 0.01}  # The margin of claim 7: not negligible
EVERYTHING = dict(backbones=0.2, released=0.1, grn=0.1, scaling=0.1, pathology=0.1)


def count_verdicts() -> list[dict]:  # A row a claim, in percent
    "How often the rules say which word, where nothing is true and where everything is"
    rules, rows = read_rules(), []
    words = {}
    for name, gains in (("false", NOTHING), ("power", EVERYTHING)):
        ledgers = [judge(make_study(np.random.default_rng(seed), gains, noise=NOISE), "study", rules).verdict for seed in range(STUDIES)]
        words[name] = [Counter(ledger.iloc[claim] for ledger in ledgers) for claim in range(7)]
    for claim in range(7):
        share = {name: {word: 100 * words[name][claim][word] / STUDIES for word in VERDICTS} for name in words}
        nothing, everything = share["false"], share["power"]
        row = dict(claim=claim + 1, studies=STUDIES, false_supported=nothing["supported"], inconclusive_of_nothing=nothing["inconclusive"])
        rows.append(row | dict(power=everything["supported"], false_contradicted=everything["contradicted"]))
    return rows


def main() -> None:
    rows, errors = [], []
    designs = product(SPREADS.items(), (6, 10, 20), (3, 5), ((1, False), (4, True), (3, False)), (False, True))
    for index, ((name, spread), people, seeds, (tasks, shared), skewed) in enumerate(designs):
        design = dict(mostly=name, people=people, seeds=seeds, tasks=tasks, shared=shared, skewed=skewed)
        found = coverage(spread, people, seeds, tasks, DRAWS, index, shared, skewed)
        rows += [design | {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in found.to_dict("records")]
        tables, who = simulate(spread, people, seeds, tasks, DRAWS, np.random.default_rng(10_000 + index), shared, skewed)
        parts = variance_parts(tables, who, [1 / tasks] * tasks)
        positive = float((parts.value - half_width(parts) > 0).mean())
        margin = 0.05  # The true difference is the margin itself: equivalence would be wrong
        wrong = float((abs(parts.value + margin) + half_width(parts, 0.9) < margin).mean())
        errors.append(design | dict(false_positive=round(positive, 4), false_equivalence=round(wrong, 4)))
    text = json.dumps(dict(draws=DRAWS, verdicts=count_verdicts(), coverage=rows, errors=errors), indent=None, separators=(",", ":"))
    RESULTS.write_text(text.replace("},{", "},\n{") + "\n")


if __name__ == "__main__":
    main()
