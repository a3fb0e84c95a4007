"""What of jobs is on disk while they train: OUT/NAME/checkpoints/round-N, of all running jobs at one round.

What a row contributes is rounded according to the rows beside it.  So a job's weights are those of an uninterrupted
training to the bit where all jobs go on from one round, and meet the rows of the others that they would have met.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io import files
from ..train.doubts import finite
from ..train.run import CHECKPOINTS
from .course import Course

NAME, VERSION, KEPT = "job", 1, 2


def save(course: Course, round: int, among: list[str]) -> None:
    """Writes a job's checkpoint, complete or not at all; `among`: the jobs that are at this round."""
    state = course.optimiser.state_dict()["state"]
    tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(course.parameters)}
    tensors |= {f"state.{i}.{k}": v for i, own in state.items() for k, v in own.items() if torch.is_tensor(v)}
    job = course.job
    values = {
        "version": VERSION, "round": round, "among": among, "step": job.step, "steps": job.steps, "loss": job.loss,
        "tokens": job.tokens, "ended": course.ended, "error": job.error, "seconds": course.seconds,
        "losses": course.losses, "sums": course.sums, "points": course.points, "told": course.told,
        "rates": [[g["lr"], g.get("initial_lr", g["lr"])] for g in course.optimiser.param_groups],
        "schedule": {k: v for k, v in course.schedule.state_dict().items() if k != "lr_lambdas"},
        "numbers": {i: {k: v for k, v in own.items() if not torch.is_tensor(v)} for i, own in state.items()},
    }  # fmt: skip
    values = finite(values)  # what is not is None there, and NaN again when it is read
    place = _folder(course.ready.run.out, round)
    draft = place.with_name(f"{place.name}.part")
    for old in (draft, place):
        shutil.rmtree(old, ignore_errors=True)
    draft.mkdir(parents=True)
    files.write_state(draft, NAME, values, {k: t.cpu().contiguous() for k, t in tensors.items()})
    os.replace(draft, place)


def rotate(course: Course) -> None:
    """Deletes all but the newest checkpoints, and what a kill left of one."""
    for left in (course.ready.run.out / CHECKPOINTS).glob("round-*.part"):
        shutil.rmtree(left, ignore_errors=True)
    for number in rounds(course.ready.run.out)[KEPT:]:
        shutil.rmtree(_folder(course.ready.run.out, number), ignore_errors=True)


def rounds(out: Path) -> list[int]:
    """The rounds of which a job has checkpoints, the newest first."""
    found = [p.name.partition("-")[2] for p in (out / CHECKPOINTS).glob("round-*")]
    return sorted((int(n) for n in found if n.isdigit()), reverse=True)


def common(outs: Mapping[str, Path]) -> int | None:
    """The newest round of which every job that was at it has its checkpoint; None where there is none.  `outs`: those
    of the jobs that are not finished."""
    for number in sorted({n for out in outs.values() for n in rounds(out)}, reverse=True):
        holders = [name for name, out in outs.items() if number in rounds(out)]
        among = read(outs[holders[0]], number)[0]["among"]
        if all(name in holders for name in among if name in outs):
            return number
    return None


def read(out: Path, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(values, tensors) of a checkpoint.  Raises ValueError for what is malformed, or of another version."""
    values, tensors = files.read_state(_folder(out, number), NAME)
    if values.get("version") != VERSION:
        raise ValueError(f"{_folder(out, number)} is not a checkpoint of version {VERSION}")
    return values, tensors


@torch.no_grad()
def restore(course: Course, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Puts a job where its checkpoint was.  Raises ValueError for a checkpoint of other parameters."""
    shapes = [tensors[f"parameter.{i}"].shape for i in range(sum(k.startswith("parameter.") for k in tensors))]
    if shapes != [p.shape for p in course.parameters] or values["steps"] != course.job.steps:
        raise ValueError(
            f"the checkpoint in {course.ready.run.out} is of a job with other parameters or steps: begin it again in "
            "another directory"
        )
    for i, p in enumerate(course.parameters):
        p.copy_(tensors[f"parameter.{i}"])
    state: dict[int, dict[str, Any]] = {int(i): dict(own) for i, own in values["numbers"].items()}
    for key, t in tensors.items():
        kind, number, *name = key.split(".", 2)
        if kind == "state":
            state.setdefault(int(number), {})[name[0]] = t
    whole = course.optimiser.state_dict() | {"state": state}
    for group, (lr, first) in zip(whole["param_groups"], values["rates"], strict=True):
        group["lr"], group["initial_lr"] = lr, first
    course.optimiser.load_state_dict(whole)
    course.schedule.load_state_dict(course.schedule.state_dict() | values["schedule"])
    job = course.job
    job.step, job.loss, job.tokens, job.error = (values[k] for k in ("step", "loss", "tokens", "error"))
    course.state.global_step = course.resumed_from = job.step
    course.told.update(values["told"])
    course.losses = [[step, math.nan if loss is None else loss] for step, loss in values["losses"]]
    course.sums, course.points = values["sums"], values["points"]
    course.seconds, course.ended = values["seconds"], values["ended"]
    course.skip(job.step)


def _folder(out: Path, number: int) -> Path:
    return out / CHECKPOINTS / f"round-{number}"
