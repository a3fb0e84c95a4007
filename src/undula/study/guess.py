"""Where the sweeps of a study begin: around the rate that `train.tuning` finds for each arm in each place.

With `rates = "auto"` a study finds them by its first seed, before any run, and keeps them beside its runs, so that what
goes on later sweeps the same; `undula tune --study` says what would be found, to be written into the file by hand.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
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
from .store import Store
from .trial import Trial
from .view import View


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
    for cell in plan.cells:
        if cell.untrained:
            continue
        try:
            yield Guess(cell.arm.name, cell.place, proposed(cell.asker, plan.sources))
        except (ValueError, RuntimeError) as error:
            yield Guess(cell.arm.name, cell.place, None, str(error))


def begun(plan: Plan, store: Store, view: View) -> Plan:
    """The plan with the rates that its sweeps begin around: what the store does not hold is found, and kept there.

    Raises ValueError, which names the arm, where none can be found.
    """
    for cell in plan.cells:
        if not cell.auto or cell.asker.key in store.rates():
            continue
        name = f"{cell.arm.name} ({cell.place})"
        try:
            found = proposed(cell.asker, plan.sources)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f'{name}: rates = "auto" finds none ({error}): name some') from error
        store.keep_rate(cell.asker.key, found.encode())
        view.said(f"{name}: its sweep begins around {found.lr:g} ({found.how}; {found.seconds:.1f} s)")
        for note in found.notes:
            view.said(f"{name}: {note}")
    return planned(plan.study, store, plan.sources)


def planned(study: Study, store: Store, sources: Sources | None = None) -> Plan:
    """A plan with the rates that the store holds."""
    return Plan(study, sources, {key: found["lr"] for key, found in store.rates().items()})
