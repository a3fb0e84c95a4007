"""A run of a study that this process has claimed, and what it came to.  Processes on one folder share its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .sources import Sources
from .trial import Trial, perform

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


def make(order: Order, heard: Heard = lambda *_: None) -> Ended:
    """Makes one run.  An error of the run is its outcome; Ctrl-C is not caught."""
    from .watch import Watch

    watch = Watch(heard, order.halving, order.rivals)
    try:
        return Ended(order, perform(order.trial, watch, order.sources), None)
    except Exception as error:  # whatever one configuration does must not stop the others
        return Ended(order, None, f"{type(error).__name__}: {error}")
