"""How far a verb is, on the error stream, where that is a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from . import shell


@contextlib.contextmanager
def layers_bar(name: str, total: int) -> Iterator[Callable[[str], object]]:
    """A bar of layers: what is called with each that is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shell.err, disable=_hidden(), transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield lambda _: progress.advance(task)


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
