"""The stages of a training on the terminal, see `train.stages`.  Apart from the bar of its steps, for which the Trainer
is imported: what is wrong with the data is said before that."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Stages:
    """What comes before and after the steps: a line that moves on a terminal, a line each elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self.progress: Progress | None = None
        self.what, self.done, self.task = "", 0, TaskID(0)
        self.rows: int | None = None
        self.unit = "rows"

    def begin(self, what: str, rows: int | None, unit: str) -> None:
        if not self.console.is_terminal:
            self.console.print(
                what + (f": {rows:,} {unit}" if rows else ""), soft_wrap=True, highlight=False, markup=False
            )
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, transient=True)
        self.what, self.rows, self.unit, self.done = what, rows, unit, 0
        self.task = self.progress.add_task(what + (f": {rows:,} {unit}" if rows else ""), total=None)
        self.progress.start()

    def advance(self, rows: int) -> None:
        if self.progress is not None:
            self.done += rows
            whole = f" of {self.rows:,}" if self.rows else ""
            self.progress.update(self.task, description=f"{self.what}: {self.done:,}{whole} {self.unit}")

    def end(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
