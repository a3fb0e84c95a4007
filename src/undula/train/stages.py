"""What a training does at the moment, told to whoever listens (the command line): opening takes long, measuring too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol


class Listener(Protocol):
    """Is told of each stage, and of rows that are done in it."""

    def begin(self, what: str, rows: int | None, unit: str) -> None: ...

    def advance(self, rows: int) -> None: ...

    def end(self) -> None: ...


_LISTENER: ContextVar[Listener | None] = ContextVar("undula_stages", default=None)


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Within, this one listens."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextlib.contextmanager
def stage(what: str, rows: int | None = None, unit: str = "rows") -> Iterator[None]:
    """Within, this is what is done, with so many rows (or what `unit` calls them) where that is known."""
    listener = _LISTENER.get()
    if listener is None:
        yield
        return
    listener.begin(what, rows, unit)
    try:
        yield
    finally:
        listener.end()


def advanced(rows: int) -> None:
    """So many rows more are done."""
    if (listener := _LISTENER.get()) is not None:
        listener.advance(rows)
