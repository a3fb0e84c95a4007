"""Many trainings at once on one base in memory.

    undula.train_many("jobs.toml", out="runs")

Nothing else is loaded until it is called: `from undula.jobs.file import read`, `from undula.jobs.engine import Engine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.extras import needs
from ..core.turns import turn

if TYPE_CHECKING:
    from ..train.recipe import Recipe
    from .job import Job
    from .view import View

__all__ = ["train_many"]


@needs("train")
@turn()
def train_many(
    jobs: str | Path | Mapping[str, Recipe],
    out: str | Path,
    *,
    resume: bool = False,
    budget: int | None = None,
    view: View | None = None,
) -> dict[str, Job]:
    """Trains many adapters on one base at once, each into OUT/NAME, which is an ordinary run's directory then.

        undula.train_many("jobs.toml", out="runs")
        undula.train_many({"a": Recipe(...), "b": Recipe(...)}, out="runs")

    jobs: a file (see `undula.jobs.file`) or recipes by name, of one model; methods, ranks, data, rates, schedules,
    lengths and seeds are each one's own.  A job's weights are those of training it alone.  One that fails ends, and no
    other notices.  budget: bytes for the base, the jobs and their activations; jobs that do not fit wait.  With
    `resume`, those that have begun go on from where all were saved; finished ones are left as they are.

    Returns {name: job}: its `state` ("done", "stopped", "diverged", "failed"), `report` and `error`; OUT/jobs.json says
    the same.  Raises Interrupted after Ctrl-C, when all are saved; `io.toml.Faults` or ValueError with all that is
    wrong, before anything starts.
    """
    from .many import many

    return many(jobs, out, resume=resume, budget=budget, view=view)
