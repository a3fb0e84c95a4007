"""A job that the Trainer trains, as `view.View` sees it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .job import RUNNING, Job
from .view import View


class Following(TrainerCallback):
    """Keeps a job up to date and tells the view."""

    def __init__(self, job: Job, view: View):
        self.job, self.view = job, view

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.job.step, self.job.steps, self.job.state = state.global_step, state.max_steps, RUNNING
        self.view.begun(self.job)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.job.step = state.global_step
        self.view.stepped(self.job)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        self.job.loss = (logs or {}).get("loss", self.job.loss)
