"""What a training leaves: the adapter, its figures, the report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.adapter import Adapter
from ..host.host import attach, detach
from ..ranks.gates import in_use
from . import page, processes
from .base import called_elsewhere
from .begun import carry
from .card import of_run, put
from .details import details, diagnosis
from .doubts import closed, doubts, finite
from .measure import PeakMemory, versions
from .prepared import Prepared
from .resume import last_checkpoint
from .run import REPORT, read_run, write_json
from .stages import stage
from .tasks.heads import Classes


class Diverged(RuntimeError):
    """Numbers of the training are no longer finite.  The report is written."""


def concluded(
    ready: Prepared,
    before: Mapping[str, float],
    course: Mapping[str, Any],
    memory: PeakMemory,
    begun: float,
    lost: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Saves and measures what was trained, where it is not `lost`, and returns the report, which is written; `course`
    is its part on the course.  Raises Diverged after that where a number is not finite."""
    run = ready.run
    after = {} if lost else processes.by_first(lambda: _after(ready))
    memory.read()
    last = course["losses"][-1:] + [[0, v] for v in after.values()]
    made = _made(ready)
    diverged = not after or not all(math.isfinite(loss) for _, loss in last)
    report = {
        "state": "diverged" if diverged else "stopped" if course["steps"] < course["steps_asked"] else "done",
        "warnings": [] if diverged else [*_doubts(ready, before, after, course["losses"]), *closed(made)],
        **made,
        "metric": run.task.headline,
        "before": before,
        "after": after,
        **course,
        "seconds_with_evaluation": round(time.perf_counter() - begun, 3),
        "peak_memory_bytes": memory.bytes,
        "peak_memory_is": memory.how,
        "versions": versions(),
        "run": ready.run.encode(),
        "out": str(run.out),
        **more,
    }
    report |= processes.by_first(lambda: _shown(ready, report))
    report = processes.by_first(lambda: _written(ready, finite(report)))
    if diverged:
        raise Diverged(
            f"the training diverged at step {course['steps']} of {course['steps_asked']}: its loss or its adapter is "
            f"no longer finite. Lower the rate (lr={run.lr}). The report is in {run.out / REPORT}"
        )
    return report


SUMMARY = ("metric", "before", "after", "steps", "train_rows", "eval_rows", "rows_in_a_step", "seed")


def _shown(ready: Prepared, report: Mapping[str, Any]) -> dict[str, Any]:
    """The report's part on single classes and rows."""
    told = read_run(ready.run.out)
    best, others = report["best"], list(ready.figures.get("other_splits", ()))
    found = {"written_before": told["written"]} if told.get("written") else {}
    found |= {"tuned": told["tuned"]} if told.get("tuned") else {}  # how the rate was found
    if best is not None and best["kept"] and best["of"] > 1 and report["after"]:
        found["optimism"] = (
            f"These figures are the best of {best['of']} evaluations on the same rows, so a little too good: "
            f"undula eval {ready.run.out} "
            + (f"--split {others[0]} measures on rows by which nothing was chosen" if others else
               "--data FILE measures on rows that you kept aside")
        )  # fmt: skip
    return {**(details(ready.held) if report["after"] else {}), **found}


def _written(ready: Prepared, report: dict[str, Any]) -> dict[str, Any]:
    """Writes the report, and its figures into the adapter, with which they go wherever that goes.  report.json comes
    last: it says that the run is finished, and what a kill leaves without it can be resumed."""
    run, adapter = ready.run, ready.adapter
    with stage("writing the report"):
        page.write(run, report, ready.held.rows, diagnosis(adapter) if report["after"] else [])
    if report["after"]:
        data = Path(run.data).name if Path(run.data).exists() else run.data
        roles = [role for role in ready.train.rows.column_names if role in run.task.roles]
        training = {"data": data, **{k: report[k] for k in SUMMARY}, "lr": run.lr, "roles": roles}
        adapter.about = {**adapter.about, "training": training}  # type: ignore[misc]
        _save(ready)
        if run.optimiser.carries and (checkpoint := last_checkpoint(run.out, run.procedure is not None)) is not None:
            carry(checkpoint, run.out)
        put(of_run(run, adapter), run.out)
    write_json(run.out / REPORT, report)
    return report


def _save(ready: Prepared) -> None:
    ready.adapter.save(ready.run.out, base=called_elsewhere(ready.run.model), task=ready.run.task.peft)


def _after(ready: Prepared) -> dict[str, float]:
    """Saves what was trained, and measures it; nothing where its numbers are not finite."""
    run = ready.run
    if not all(torch.isfinite(t).all() for t in ready.adapter.parameters()):
        return {}  # no directory would take it back
    _save(ready)
    with stage("measuring after", len(ready.held)):
        return run.task.score(ready.model, ready.held, run.batch)


def _doubts(ready: Prepared, before: Mapping[str, float], after: Mapping[str, float], losses: Any) -> list[str]:
    task = ready.run.task
    return doubts(ready.held.rows, before, after, losses, task.names if isinstance(task, Classes) else ())


def _made(ready: Prepared) -> dict[str, Any]:
    """The report's part on what was trained."""
    method = ready.run.method
    return {
        "method": "head only" if method is None else type(method).public().__name__,
        "rung": None if method is None else method.rung(),
        "configuration": None if method is None else method.encode(),
        "allocator": None if ready.run.allocator is None else ready.run.allocator.encode(),
        "ranks": None if ready.run.allocator is None else _ranks(ready.adapter),
        **_penalised(ready),
        "trainable_parameters": ready.adapter.num_parameters(),
        "sites": len(ready.adapter.methods),
        "train_rows": len(ready.train),
        "eval_rows": len(ready.held),
        "data": {**ready.figures, "notes": list(ready.notes)},
        "device": str(ready.model.device),
        "processes": processes.count(),
        "rows_in_a_step": processes.count() * ready.run.batch * ready.run.accumulate,
        "seed": ready.run.seed,
    }


def _penalised(ready: Prepared) -> dict[str, Any]:
    """What penalties there were, and what they came to."""
    found = [{**p.encode(), "result": p.figures(ready.model) if p.active else {}} for p in ready.run.penalty]
    return {"penalties": found} if found else {}


def _ranks(adapter: Adapter) -> dict[str, int]:
    """The ranks of all sites in all, of the smallest and of the largest."""
    found = in_use(adapter).values()
    return {"total": sum(found), "least": min(found, default=0), "most": max(found, default=0)}


def with_best(
    ready: Prepared, course: dict[str, Any], told: Mapping[str, Any], log: list[Any]
) -> tuple[Prepared, dict[str, Any]]:
    """The run with the adapter of its best evaluation, where it keeps that, and its course with the evaluations."""
    from .checkpoints import restore
    from .evaluating import best_folder, curve, outcome

    run, step = ready.run, told.get("step")
    course |= outcome(run, told, curve(log))
    broken = not all(math.isfinite(loss) for _, loss in course["losses"][-1:])  # then it has diverged, and says so
    if step is None or step == course["steps"] or run.keep_best is False or broken:
        return ready, course
    saved = Adapter.load(best_folder(run.out, step))
    if run.allocator is None:
        restore(ready.adapter, saved)
        return ready, course
    detach(ready.model)  # it had other methods and shapes then
    return dataclasses.replace(ready, adapter=attach(ready.model, saved)), course


def course_of(steps: int, asked: int, begun_at: int, seconds: float, log: list[Any]) -> dict[str, Any]:
    return {
        "steps": steps,
        "steps_asked": asked,
        "resumed_from_step": begun_at,
        "seconds": round(seconds, 3),  # of training alone, since the last resume
        "losses": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
    }
