"""A run of a study that this process has claimed, and what it came to.  Processes on one folder share its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .sources import Sources
from .trial import Trial, perform

if TYPE_CHECKING:
    from .plan import Plan
    from .store import Record, Store

Rivals = Sequence[Sequence[tuple[int, float]]]
Heard = Callable[[int, int], None]


@dataclass(frozen=True)
class Order:
    """A run that was claimed: `rivals` and `halving` as in `Watch`; `sources`: what this process has read already."""

    trial: Trial
    halving: int | None = None
    rivals: Rivals = ()
    sources: Sources | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Ended:
    """A run that came to an end: its figures, or why it failed."""

    order: Order
    result: Mapping[str, Any] | None
    error: str | None


def ordered(plan: Plan, trial: Trial, known: Mapping[str, Record]) -> Order:
    """A run that was claimed, as the plan wants it."""
    rivals = plan.rivals(trial, known)
    if rivals is None:
        return Order(trial, sources=plan.sources)
    return Order(trial, plan.study.sweep.halving, rivals, plan.sources)


def record(plan: Plan, store: Store, ended: Ended) -> Ended:
    """Keeps what a run came to.  One that read other rows than this study did (after a file was written anew) has
    failed: its figure belongs to no table."""
    trial, result = ended.order.trial, ended.result
    if result is not None and result["rows_digest"] != plan.sources.digest(trial.rows, trial.split_seed):
        ended = Ended(ended.order, None, f"ValueError: the rows of {trial.rows.source} changed while the study ran")
    if ended.result is None:
        store.fail(trial, ended.error or "unknown")
    else:
        store.finish(trial, ended.result)
    return ended


def make(order: Order, heard: Heard = lambda *_: None) -> Ended:
    """Makes one run.  An error of the run is its outcome; Ctrl-C is not caught."""
    from .watch import Watch

    watch = Watch(heard, order.halving, order.rivals)
    try:
        return Ended(order, perform(order.trial, watch, order.sources), None)
    except Exception as error:  # whatever one configuration does must not stop the others
        return Ended(order, None, f"{type(error).__name__}: {error}")
