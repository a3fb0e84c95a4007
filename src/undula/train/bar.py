"""A progress bar for the Trainer; where there is no terminal, ten lines instead."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback


class Bar(TrainerCallback):
    """Steps, loss and time left; a line for each evaluation, and with `every` for each entry of the Trainer's log.  A
    context manager, so that an error leaves the terminal as it was."""

    def __init__(self, console: Console, every: bool = False):
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
        self.console, self.every = console, every
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
        if not self.console.is_terminal:
            self.console.print(f"training: {state.max_steps} steps", highlight=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs, at = logs or {}, f"step {state.global_step} of {state.max_steps}"
        measured = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        if self.task is None or not (measured or "loss" in logs):
            return
        if measured:
            self._print(f"{at}, on the validation rows: {_told(measured)}")
            return
        self.progress.update(self.task, loss=f"loss {logs['loss']:.3f}")
        if self.every:
            self._print(f"{at}: {_told(logs)}")
        elif not self.console.is_terminal and state.global_step >= self.line:
            self._print(f"{at}, loss {logs['loss']:.4f}")
            self.line = state.global_step + state.max_steps // 10

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.stop()


def _told(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
