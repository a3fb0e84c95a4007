"""Measuring while it trains: when, which point was the best, and when to stop.

It leaves no trace in the training: what it draws is put back.  What it has found is part of the Trainer's state, so a
resumed training goes on as if it had not been interrupted; the best adapter so far lies in OUT/checkpoints/best-STEP.
"""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..core.adapter import Adapter
from ..host.host import selected
from . import processes
from .resume import EVALUATIONS
from .run import CHECKPOINTS, Run

MOST = 10  # evaluations where a run does not say
SHARE, FORWARD = 0.1, 1 / 3  # of the training's time that they may take; of a row's training, what measuring it takes


def number_of(run: Run, steps: int, trained: int, held: int) -> int:
    """How many evaluations a run of so many steps on `trained` rows in all makes, of `held` rows each, where it does
    not say: ten, or as many as take a tenth of the training's time; fewer than two are none.  Ten where it asks for the
    best or for an early end."""
    if run.keep_best or run.patience is not None:
        return min(MOST, steps)
    affordable = int(SHARE * trained / (FORWARD * max(held, 1)))
    found = min(MOST, steps, affordable)
    return found if found > 1 else 0


def due(run: Run, step: int, steps: int, number: int) -> bool:
    """Whether to measure after this step; after the last one where there are any evaluations."""
    if run.eval_every is None:
        return step * number // steps > (step - 1) * number // steps
    if run.eval_every == 0:
        return False
    every = math.ceil(run.eval_every * steps) if run.eval_every < 1 else int(run.eval_every)
    return step % every == 0 or step == steps


class Evaluations(TrainerCallback):
    """Asks the Trainer for evaluations, keeps the best adapter, and ends the training where none is better any more.

    Of equal points the last is kept, which has learned most.  Before an allocator has reached its budget an evaluation
    chooses nothing: it would be the figure of another adapter."""

    def __init__(self, run: Run, held: int):
        self.run, self.held, self.number = run, held, 0
        self.keep = run.keep_best is not False

    def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        trained = state.max_steps * self.run.batch * self.run.accumulate * processes.count()
        self.number = number_of(self.run, state.max_steps, trained, self.held)
        told = state.stateful_callbacks.setdefault(EVALUATIONS, {})
        if "counts_from" not in told:
            how = self.run.procedure
            first = 0 if how is None else how.counts_from(state.max_steps, selected(found["model"]))
            told.update(counts_from=first, step=None, value=None, since=0, ended=None)

    def adapter(self, model: Any) -> Adapter:
        """What is kept of the best point."""
        return selected(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if due(self.run, state.global_step, state.max_steps, self.number):
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        told, step = state.stateful_callbacks[EVALUATIONS], state.global_step
        value = found["metrics"].get(f"eval_{self.run.task.headline}", math.nan)
        if step < told["counts_from"]:
            return
        first, finite = told["value"] is None, math.isfinite(value)
        better = (
            finite and (first or (value > told["value"]) == self.run.task.more_is_better) and value != told["value"]
        )
        told["since"] = 0 if better else told["since"] + 1
        if better or (finite and value == told["value"]):
            told.update(step=step, value=value)
            if self.keep and processes.is_first():
                self.adapter(found["model"]).save(best_folder(self.run.out, step))
        if self.run.patience is not None and told["since"] >= self.run.patience and step < state.max_steps:
            told["ended"] = step
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint is whole: what was the best before what it knows of is needed no more."""
        if processes.is_first():
            kept = best_folder(self.run.out, state.stateful_callbacks[EVALUATIONS]["step"])
            for old in (self.run.out / CHECKPOINTS).glob("best-*"):
                if old != kept:
                    shutil.rmtree(old, ignore_errors=True)


def best_folder(out: Path, step: int | None) -> Path:
    """Where the best adapter of a training is, while it goes on."""
    return out / CHECKPOINTS / f"best-{step}"


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Within, whatever is drawn is drawn from copies: afterwards every generator is where it was."""
    python, ours = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    theirs = None if numpy is None else numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(ours)
        if numpy is not None:
            numpy.random.set_state(theirs)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def curve(log: list[Any]) -> list[dict[str, Any]]:
    """[{"step", and the metrics}] of the Trainer's log."""
    found = {}
    for entry in log:
        metrics = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
        if metrics:
            found[entry["step"]] = {"step": entry["step"], **metrics}
    return list(found.values())


def outcome(run: Run, told: Mapping[str, Any], points: list[dict[str, Any]]) -> dict[str, Any]:
    """The report's part on the evaluations."""
    if not points:
        return {"evaluations": [], "best": None}
    step, kept = told.get("step"), run.keep_best is not False
    best = None if step is None else {
        "step": step, "metric": run.task.headline, "value": told["value"], "of": len(points), "kept": kept
    }  # fmt: skip
    return {"evaluations": points, "best": best, "ended_early": ended(run, told)}


def ended(run: Run, told: Mapping[str, Any]) -> str | None:
    """Why the training ended before its last step, where evaluations ended it."""
    if told.get("ended") is None:
        return None
    return (
        f"ended at step {told['ended']}: {run.patience} evaluation{'s' * (run.patience != 1)} without a better "
        f"{run.task.headline} than {told['value']:.4g}"
    )
