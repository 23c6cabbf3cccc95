"""How often do the rules for the seven claims say a wrong word, and how often do they find what is there?

    python benchmarks/verdict_rates.py            (a quarter of an hour on one core; --resume goes on with one that was ended)

Studies whose truth is known are made up: eight test people, three validation people, three pretrainings, four tasks. Each truth is one under which
some word is wrong, placed where it is likeliest: no effect, one of two effects, a difference as large as the margin, opposite ones in CT and MR
tasks, backbones that hardly differ. The key `verdicts` of results/coverage.json holds a row for each truth and word: how many percent of studies
got it. Where `wrong` is empty, the claim is true, and the rate is that of support. The chapter on rules shows the table.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd

from coverage import RESULTS, save
from mednext_v2.report.rules import BACKBONES, RULES, VERDICTS, make_study, read_rules, verdict

STUDIES = 200
USUAL, CALM = (0.02, 0.015, 0.03), (0.004, 0.003, 0.006)  # Of each arm: people, seeds, the rest
Made = Callable[[np.random.Generator], dict[str, pd.DataFrame]]


def study(noise: tuple = USUAL, **gains: float) -> Made:
    return lambda rng: make_study(rng, gains, noise=noise, cases=1)


def backbones(noise: tuple, correlation: float, spread: float) -> Made:
    "Strengths of a normal distribution, correlated as ranks"

    def make(rng: np.random.Generator) -> dict[str, pd.DataFrame]:
        rho, (x, other) = 2 * np.sin(np.pi * correlation / 6), rng.standard_normal((2, len(BACKBONES)))
        strengths = np.clip(spread * np.array([x, rho * x + np.sqrt(1 - rho**2) * other]), -0.35, 0.35)
        return make_study(rng, noise=noise, strengths=strengths.tolist(), cases=1)

    return make


def of_routine(noise: tuple, **levels: float) -> Made:
    "Backbones of given levels, both from scratch and pretrained; 0 if not given"
    strengths = [levels.get(name, 0.0) for name in BACKBONES]
    return lambda rng: make_study(rng, noise=noise, strengths=(strengths, strengths), cases=1)


def one_released_is_equal(rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    tables = make_study(rng, noise=USUAL, cases=1)
    worse = tables["scores"].init.isin(["stunet_base", "suprem_swinunetr"])
    return tables | {"scores": tables["scores"].assign(dsc=tables["scores"].dsc - 0.1 * worse)}


WRONG = ("supported", "contradicted")
THREE = dict(mednext_v2_base=0.01, unet=0.01)  # Three of the four routine ones lose by a point
HALF = dict(mednext_v2_base=0.2, unet=0.2, resenc_l=0.2)
TRUTHS: list[tuple[int, str, tuple, Made, tuple[str, ...]]] = [
    (1, "no backbone differs", USUAL, study(), WRONG[:1]),
    (1, "the best beats half of the routine ones by 20 points, and is equal to the others", USUAL, of_routine(USUAL, **HALF), WRONG[:1]),
    (1, "the best beats three of four routine ones by one point, which matters just", USUAL, of_routine(USUAL, **THREE), WRONG[1:]),
    (1, "the best beats three of four routine ones by one point, which matters just", CALM, of_routine(CALM, **THREE), WRONG[1:]),
    (2, "ranks are independent, standard deviation of backbones 3 points", USUAL, backbones(USUAL, 0, 0.03), WRONG[:1]),
    (2, "ranks are independent, 10 points", USUAL, backbones(USUAL, 0, 0.1), WRONG[:1]),
    (2, "a rank correlation of 0.7, 10 points", USUAL, backbones(USUAL, 0.7, 0.1), WRONG[1:]),
    *((2, f"strength is carried over whole, best less worst {d} points", USUAL, study(backbones=d / 100), WRONG[1:]) for d in (1, 2, 3, 5, 10)),
    (3, "neither GRN nor scaling does anything", USUAL, study(), WRONG),
    (3, "scaling gives 10 points, GRN nothing", USUAL, study(scaling=0.1), WRONG),
    (4, "ours is equal to each released model", USUAL, study(), WRONG),
    (4, "ours is equal to one released model, and 10 points better than the others", USUAL, one_released_is_equal, WRONG[:1]),
    (5, "strength from scratch says nothing, standard deviation of backbones 3 points", USUAL, backbones(USUAL, 0, 0.03), WRONG),
    (5, "strength from scratch says nothing, 10 points", USUAL, backbones(USUAL, 0, 0.1), WRONG),
    (5, "strength is carried over whole, best less worst 1 point", USUAL, study(backbones=0.01), WRONG[1:]),
    (6, "pathology and organs gain 5 points alike", USUAL, study(scaling=0.05), WRONG),
    (7, "the difference is the margin, in all tasks", USUAL, study(modality=0.01), WRONG),
    (7, "the difference is the margin, in all tasks", CALM, study(CALM, modality=0.01), WRONG),
    (7, "a point better in CT tasks, a point worse in MR tasks", CALM, study(CALM, crossed=0.01), WRONG),
    (7, "two points better in CT tasks, two points worse in MR tasks", CALM, study(CALM, crossed=0.02), WRONG[:1]),
    (1, "best less worst 20 points", USUAL, study(backbones=0.2), ()),
    *((2, f"best less worst {d} points", USUAL, study(backbones=d / 100), ()) for d in (5, 10, 20)),
    *((3, f"GRN and scaling give {d} points each", USUAL, study(grn=d / 100, scaling=d / 100), ()) for d in (5, 10)),
    (4, "10 points better than each released model", USUAL, study(released=0.1), ()),
    *((5, f"best less worst {d} points", USUAL, study(backbones=d / 100), ()) for d in (5, 10, 20)),
    *((6, f"pathology gains {d} points more", USUAL, study(pathology=d / 100), ()) for d in (5, 10)),
    *((7, "no difference", noise, study(noise), ()) for noise in (USUAL, CALM)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep the truths that the file has from as many studies; only if no code has changed")
    rules, rows = read_rules(), []
    kept = json.loads(RESULTS.read_text())["verdicts"] if parser.parse_args().resume else []
    for claim, truth, noise, make, wrong in TRUTHS:
        about = dict(claim=claim, truth=truth, spread=", ".join(f"{100 * one:g}" for one in noise), studies=STUDIES)
        known = [row for row in kept if all(row[name] == value for name, value in about.items()) and row["wrong"] in (wrong or ("",))]
        if len(known) == max(len(wrong), 1):
            rows += known
            continue
        found = Counter(verdict(RULES[claim](make(np.random.default_rng(seed)), "study", rules), "study", rules)[0] for seed in range(STUDIES))
        assert not found[VERDICTS[4]], (claim, truth, found)
        rows += [about | dict(wrong=word, rate=100 * found[word or "supported"] / STUDIES) for word in wrong or ("",)]
        print(claim, truth, dict(found), flush=True)
        save(verdicts=[*rows, *(row for row in kept if row not in rows)] if kept else rows)
    save(verdicts=rows)


if __name__ == "__main__":
    main()
