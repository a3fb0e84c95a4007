"""A progress bar for the Trainer; where there is no terminal, ten lines in a run instead."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class Bar(TrainerCallback):
    """Steps, loss and time left.  A context manager, so that an error leaves the terminal as it was."""

    def __init__(self, console: Console):
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
        self.console = console
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.task: TaskID | None = None
        self.line = 0  # the step of the next line

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.task is None or not logs or "loss" not in logs:
            return
        self.progress.update(self.task, loss=f"loss {logs['loss']:.3f}")
        if not self.console.is_terminal and state.global_step >= self.line:
            self.console.print(f"step {state.global_step} of {state.max_steps}, loss {logs['loss']:.4f}")
            self.line = state.global_step + state.max_steps // 10

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.stop()
