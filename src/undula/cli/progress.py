"""How far a verb is, on the error stream, where that is a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from . import shell

if TYPE_CHECKING:
    from rich.progress import Progress


@contextlib.contextmanager
def layers_bar(name: str, total: int) -> Iterator[Callable[[str], object]]:
    """A bar of layers: what is called with each that is done."""
    with _bar() as progress:
        task = progress.add_task(name, total=total)
        yield lambda _: progress.advance(task)


@contextlib.contextmanager
def counting(name: str) -> Iterator[Callable[[int, int], object]]:
    """A bar of what is called with (how many are done, of how many)."""
    with _bar() as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def _bar() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=shell.err, disable=_hidden(), transient=True)


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """What is at work, and for how long, where nothing counts the steps of it."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=shell.err, disable=_hidden(), transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def _hidden() -> bool:
    return not shell.err.is_terminal or shell.voice.quiet
