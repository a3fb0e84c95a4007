"""Whose random numbers a dropout draws: the global generator's, or within `drawing` a source's.

Where the rows of a batch belong to several trainings, each has a stream of its own, so that what one draws does not
depend on who is in the batch beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class Source(Protocol):
    """Draws for the rows of one batch."""

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Inverted dropout of x."""

    def among(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Within, x are the rows of that name alone."""


SOURCE: ContextVar[Source | None] = ContextVar("undula.draws", default=None)


@contextlib.contextmanager
def drawing(source: Source) -> Iterator[None]:
    """Within, dropouts draw from this source."""
    token = SOURCE.set(source)
    try:
        yield
    finally:
        SOURCE.reset(token)


def active() -> bool:
    """Whether there is a source."""
    return SOURCE.get() is not None


def dropped(x: Tensor, p: float) -> Tensor | None:
    """Inverted dropout of x as the source draws it; None where there is none."""
    source = SOURCE.get()
    return None if source is None else source.drop(x, p)


def among(name: str) -> contextlib.AbstractContextManager[None]:
    """Within, a source draws for the rows of that name alone."""
    source = SOURCE.get()
    return contextlib.nullcontext() if source is None else source.among(name)
