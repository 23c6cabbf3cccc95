"""Where the two constants of the interval over people and seeds come from.

    python benchmarks/interval_constants.py            (a minute on one core)

Every pair of λ and κ on a grid is tried on simulated ledgers with a known truth. First over the plane of shares: 15 mixtures of the variances of
people, of seeds and of what is left, 6, 12 and 36 people, 3 to 5 seeds. No design there may be covered by less than 92.5 %. Then in the 144 designs
of coverage.py, with other draws: of the pairs that are left, the one with most designs between 93 and 97 % is taken. The key `constants` of
results/coverage.json holds the numbers of each pair; the chapter on people_statistics shows the best.
"""

from itertools import product

import numpy as np
import scipy.special

from coverage import designs, save
from mednext_v2.evaluation.people_statistics import Parts, Spread, simulate, variance_parts

GRID = [round(0.2 * step, 1) for step in range(6)]
PAIRS = list(product(GRID, GRID))
SHARES = [(a / 4, b / 4, (4 - a - b) / 4) for a in range(5) for b in range(5 - a)]
FIRST_SEED = 20_000  # Other draws than those that coverage.py counts


def half_widths(parts: Parts, share: float, overlap: float) -> np.ndarray:
    "As `half_width`, with other constants"
    t, other = scipy.special.stdtrit(parts.people_df, 0.975), scipy.special.stdtrit(parts.seeds_df, 0.975)
    seeds = np.maximum(parts.seeds - share * parts.interaction, 0)
    both = np.divide(parts.people * seeds, parts.people + seeds, out=np.zeros_like(seeds), where=parts.people + seeds > 0)
    return np.sqrt(t**2 * parts.people + other**2 * seeds - overlap * t * other * both)


def coverages(drawn: tuple[list[np.ndarray], list[np.ndarray]]) -> tuple[list[float], list[float]]:  # And mean widths, a pair each
    tables, who = drawn
    parts = variance_parts(tables, who, [1 / len(tables)] * len(tables))
    halves = [half_widths(parts, *pair) for pair in PAIRS]
    return [float((abs(parts.value) <= half).mean()) for half in halves], [float(half.mean()) for half in halves]


def main() -> None:
    plane = [
        coverages(simulate(Spread(*np.sqrt(shares)), people, seeds, 1, 4000, np.random.default_rng(index)))
        for index, (shares, people, seeds) in enumerate(product(SHARES, (6, 12, 36), (3, 4, 5)))
    ]
    studies = [
        coverages(simulate(spread, people, seeds, tasks, 2000, np.random.default_rng(FIRST_SEED + index), shared, skewed))
        for index, ((_, spread), people, seeds, (tasks, shared), skewed) in enumerate(designs())
    ]
    least = np.min([found for found, _ in plane], axis=0)
    found, width = (np.array(part) for part in zip(*studies))
    width = width / width.mean(axis=1, keepdims=True)
    rows = []
    for index, (share, overlap) in enumerate(PAIRS):
        one = found[:, index]
        numbers = dict(plane=least[index], least=one.min(), mean=one.mean(), most=one.max(), inside=((one >= 0.93) & (one <= 0.97)).mean())
        numbers |= dict(width=width[:, index].mean())
        rows.append({"lambda": share, "kappa": overlap} | {name: round(float(value), 4) for name, value in numbers.items()})
    save(constants=rows)


if __name__ == "__main__":
    main()
