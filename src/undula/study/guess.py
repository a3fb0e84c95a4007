"""Where the sweeps of a study may begin: the rate that `train.tuning` finds for each arm, on each model and data set.

The rates go into the study's file, by hand: what a study sweeps is part of what it is.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..train.base import config_of, quiet
from ..train.prepared import assembled
from ..train.rows import in_own_order
from ..train.run import Run
from ..train.tuning import Tuned, tuned
from .plan import Plan
from .sources import Sources
from .spec import Study
from .trial import Trial


@dataclass(frozen=True)
class Guess:
    """What was found for an arm in one place, or why nothing was."""

    arm: str
    place: str
    found: Tuned | None
    why: str = ""


def proposed(trial: Trial, sources: Sources) -> Tuned:
    """The rate for a run of a study, on its rows and with its seed; the run's own counts for nothing."""
    task, parts = sources.opened(trial.rows, trial.split_seed)
    task, parts, _ = in_own_order(trial.rows.task, task, parts, config_of(trial.run.model))
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        run = Run.of(dataclasses.replace(trial.run, task=task), Path(scratch))
        return tuned(assembled(run, parts["train"], parts["validation"]))


def guesses(study: Study) -> Iterator[Guess]:
    """Of every arm that trains, in every place, by the first seed that sweeps."""
    plan = Plan(study)
    seed = (study.sweep.seeds or study.seeds)[0]
    for cell in plan.cells:
        if cell.untrained:
            continue
        place = ", ".join((cell.base.label, cell.rows.label, cell.budget.label))
        try:
            yield Guess(cell.arm.name, place, proposed(cell.trial(cell.grid[0], seed, False), plan.sources))
        except (ValueError, RuntimeError) as error:
            yield Guess(cell.arm.name, place, None, str(error))


def grid(rates: Sequence[float], factor: float) -> tuple[float, float, float]:
    """Three rates to begin a sweep with, a `factor` apart: around the median of those that were found, in log rate."""
    middle = math.exp(statistics.median(math.log(rate) for rate in rates))
    lower, centre, higher = (float(f"{middle * factor**i:.2g}") for i in (-1, 0, 1))
    return lower, centre, higher
