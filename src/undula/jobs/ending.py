"""What a job leaves: an ordinary run directory."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..io import files
from ..train.concluding import concluded, course_of, with_best
from ..train.measure import PeakMemory
from ..train.run import REPORT
from .course import Course
from .job import DIVERGED, DONE, STOPPED, Job

FAILURE = "failed.json"  # beside run.json: why a job ended without a report


def report(course: Course, begun: float, memory: PeakMemory, among: list[str]) -> dict[str, Any]:
    """Saves and measures a job whose adapter is selected; its report, which is written.  Raises Diverged after that
    where numbers are not finite."""
    job, ready = course.job, dataclasses.replace(course.ready, adapter=course.adapter)
    log: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in course.losses]
    log += [{"step": p["step"], **{f"eval_{k}": v for k, v in p.items() if k != "step"}} for p in course.points]
    made = course_of(job.step, job.steps, course.resumed_from, course.seconds, log)
    ready, told = with_best(ready, made, course.told, log)
    (ready.run.out / FAILURE).unlink(missing_ok=True)
    lost = course.ended == DIVERGED
    return concluded(ready, course.before, told, memory, begun, lost, trained_among=among, tokens=job.tokens)


def remembered(job: Job) -> None:
    """A job that was finished before: its report says how."""
    job.report = found = written(job)
    if found is None:
        return
    job.state = {"diverged": DIVERGED, "stopped": STOPPED}.get(str(found.get("state")), DONE)
    job.step, job.steps, job.tokens = (int(found.get(k) or 0) for k in ("steps", "steps_asked", "tokens"))
    last = (found.get("losses") or [[0, None]])[-1][1]
    job.loss = last if last is None else float(last)


def written(job: Job) -> dict[str, Any] | None:
    """The report of a job's directory; None where there is none."""
    path = job.run.out / REPORT
    return files.parsed(path.read_bytes(), str(path)) if path.is_file() else None
