"""A job as others see it: what is trained, where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..io.draft import FULL
from ..train.run import Run

WAITING, RUNNING, DONE, STOPPED, DIVERGED, FAILED = "waiting", "running", "done", "stopped", "diverged", "failed"


@dataclass
class Job:
    """One training among others.  step of steps; loss: of its last step; tokens: that it has trained on, padding apart;
    error: what ended it, where that was no end of its own."""

    name: str
    run: Run
    state: str = WAITING
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens: int = 0
    error: str | None = None
    report: dict[str, Any] | None = None
    course: Any = field(default=None, repr=False)  # its `course.Course`, while it runs
    kept: Any = field(default=None, repr=False)  # its `kept.Kept`, where an engine trains it


def is_full(error: Exception) -> bool:
    """Whether a disk is full: no fault of a job's, and nothing that others could go on with."""
    return isinstance(error, OSError) and error.errno in FULL


def told_of(error: Exception) -> str:
    """What a job says of what ended it."""
    return f"{type(error).__name__}: {error}"
