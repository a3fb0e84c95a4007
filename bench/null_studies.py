"""How often a study without any true difference calls a win or a loss, and how often it finds one that is there.

    python bench/null_studies.py --studies 2000 --json bench/results/null-studies.json

Quality falls by c per squared step of x3.16 from the best rate; a run on validation rows sees it with noise v, the
figure of a final run has the noise of its seed, and is one of so many rows.  Every arm is the same in law, but for
`effect`, which all arms but the first have.  Grids grow by `decide`, figures go through `summarise`: what a user's
study does with its records.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import product
from pathlib import Path

import numpy as np

from undula.study.outcome import FINAL, ChosenRate, Outcome
from undula.study.rates import decide
from undula.study.statistics import LOSS, WIN, Rule
from undula.study.summary import summarise
from undula.study.table import Summary

GRID, FACTOR, EXTEND, BEST, ROWS = (1e-3, 3.16e-3, 1e-2), 10**0.5, 3, 3.16e-3, 600
RULE = Rule(resamples=200)  # of Friedman's test alone, which decides nothing here
SHAPES = {  # name: (arms beside the baseline, data sets, seeds)
    "1 arm, 6 seeds": (1, 1, 6),
    "1 arm, 10 seeds": (1, 1, 10),
    "6 arms, 13 seeds": (6, 1, 13),
    "6 arms, 3 sets, 4 seeds": (6, 3, 4),
    "27 arms, 3 sets, 4 seeds": (27, 3, 4),
}
LAWS = {"c = v = 0.02": (0.02, 0.02), "c = 0.01, v = 0.015": (0.01, 0.015)}


def true(lr: float, c: float) -> float:
    """What a rate is worth."""
    return -c * (math.log(lr / BEST) / math.log(FACTOR)) ** 2


def choice(draw: np.random.Generator, c: float, v: float) -> tuple[float, bool, dict[float, float | None]]:
    """A whole sweep: rates are tried until `decide` has chosen."""
    scores: dict[float, float | None] = {}
    while True:
        found = decide(GRID, scores, FACTOR, EXTEND, True)
        if found.chosen is not None:
            return found.chosen, found.bracketed, scores
        scores |= {lr: 0.6 + true(lr, c) + v * draw.normal() for lr in found.more}


def study(
    draw: np.random.Generator, arms: int, sets: int, seeds: int, c: float, v: float, own: bool, effect: float = 0.0
) -> Summary:
    """A study's summary.  `own`: each seed sweeps for itself; else one sweep serves all seeds of an arm."""
    runs, rates = [], []
    for arm, data in product(range(arms + 1), range(sets)):
        labels = f"arm {arm:02}", "m", f"set {data}", "as written"  # arm, model, data, budget
        shared = None if own else choice(draw, c, v)
        for seed in range(1, seeds + 1):
            lr, bracketed, scores = shared or choice(draw, c, v)
            value = 0.6 + true(lr, c) + 0.01 * draw.normal() + effect * (arm > 0)
            runs.append(Outcome(*labels, FINAL, lr, seed, "accuracy", True, test=round(value * ROWS) / ROWS))
            if own:
                rates.append(ChosenRate(*labels, lr, bracketed, tuple(sorted(scores.items())), seed))
        if shared is not None:
            rates.append(ChosenRate(*labels, shared[0], shared[1], tuple(sorted(shared[2].items()))))
    return summarise(runs, rates, "arm 00", RULE)


def called(summary: Summary) -> tuple[bool, float]:
    """(whether anything is called at all, the share of arms that are called a win over all, or in the one group)."""
    single = [row.against for row in summary.rows if row.against is not None]
    over = list(summary.pooled) or single
    every = [each.verdict for each in (*single, *summary.pooled)]
    return any(v in (WIN, LOSS) for v in every), float(np.mean([each.verdict == WIN for each in over]))


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    given.add_argument("--studies", type=int, default=2000)
    given.add_argument("--effects", type=float, nargs="*", default=[0.02, 0.04])
    given.add_argument("--power-studies", type=int, default=200)
    given.add_argument("--json", type=Path)
    asked = given.parse_args()
    told = []
    for (name, shape), (law, (c, v)) in product(SHAPES.items(), LAWS.items()):
        draw = np.random.default_rng(0)
        wrong = [called(study(draw, *shape, c, v, own=True))[0] for _ in range(asked.studies)]
        row = {"shape": name, "law": law, "studies": asked.studies, "false": float(np.mean(wrong))}
        for effect in asked.effects:
            found = [called(study(draw, *shape, c, v, True, effect))[1] for _ in range(asked.power_studies)]
            row[f"found at +{effect:g}"] = float(np.mean(found))
        told.append(row)
        print(json.dumps(row), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
