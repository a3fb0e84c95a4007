"""What a study hears of a run while it trains: evaluations, the best point, progress, and whether to give up early."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from ..core.adapter import Adapter
from ..host.host import attach, detach
from ..train.prepared import Prepared
from .spent import Spent

Curve = Sequence[tuple[int, float]]


class Watch(TrainerCallback):
    """Evaluates on the validation rows at even steps and keeps the numbers of the best point.

    `heard(step, steps)` is told of every step.  `rivals` are the curves of the runs that came before in the same sweep:
    with `halving` the run ends early where it falls behind them (`pruned`).
    """

    def __init__(
        self,
        heard: Callable[[int, int], None] = lambda *_: None,
        halving: int | None = None,
        rivals: Sequence[Curve] = (),
    ):
        self.heard, self.halving, self.rivals = heard, halving, rivals
        self.curve: list[tuple[int, float]] = []
        self.best: float | None = None
        self.kept: Adapter | None = None
        self.spent = Spent()  # here
        self.counts_from = 0
        self.pruned = False

    def begin(self, ready: Prepared, evaluations: int) -> None:
        """The run that is about to train."""
        self.ready, self.evaluations = ready, evaluations

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stepped(state.global_step, state.max_steps):
            self.measure(state, control)

    def stepped(self, step: int, steps: int) -> bool:
        """Whether this step is one of the even ones."""
        self.heard(step, steps)
        if step == 1 and (how := self.ready.run.procedure) is not None:
            self.counts_from = how.counts_from(steps, self.ready.adapter)
        return step * self.evaluations // steps > (step - 1) * self.evaluations // steps

    def measure(self, state: Any, control: Any) -> None:
        """Evaluates, and ends a run that has fallen behind."""
        self.evaluate(state.global_step)
        if state.global_step < state.max_steps and self._hopeless():
            self.pruned = control.should_training_stop = True

    def evaluate(self, step: int) -> None:
        """Measures the model as it is after so many steps, and keeps its adapter where none was better.  Before an
        allocator has reached its budget that chooses nothing: it would be the figure of another size."""
        begun = Spent.now()
        self._evaluate(step)
        self.spent += Spent.now() - begun

    def _evaluate(self, step: int) -> None:
        ready = self.ready
        if not all(torch.isfinite(p).all() for p in ready.adapter.parameters()):
            return
        found = ready.run.task.choose(ready.model, ready.held, ready.run.batch)
        if not math.isfinite(found):
            return
        self.curve.append((step, found))
        if step < self.counts_from:
            return
        better = self.best is None or (found > self.best) == ready.run.task.more_is_better
        if better or found == self.best:  # of equal points the last, which has learned most
            self.best = found
            self.kept = ready.adapter.copy()  # frozen factors too: an allocator may move them

    def _hopeless(self) -> bool:
        if self.halving is None or self.kept is None:
            return False
        curve, *rivals = ([(s, v) for s, v in line if s >= self.counts_from] for line in (self.curve, *self.rivals))
        return pruned(curve, [r for r in rivals if r], self.halving, self.ready.run.task.more_is_better)

    def restore(self) -> Prepared:
        """The run with the best point's adapter on its model.  Attached anew: an allocator may have changed methods and
        shapes, and at the end which sites share a parameter."""
        assert self.kept is not None
        detach(self.ready.model)
        return dataclasses.replace(self.ready, adapter=attach(self.ready.model, self.kept))


def pruned(curve: Curve, rivals: Sequence[Curve], reduction: int, more_is_better: bool) -> bool:
    """Whether asynchronous successive halving ends the run with this curve at its last evaluation, given the curves of
    the runs before it (Jamieson, Talwalkar 2016; Li et al. 2020, arXiv:1810.05934).

    Evaluations number 1, reduction, reduction^2, ... are the rungs.  At a rung a run ends unless it is among the best
    1 / reduction of those that have reached it so far, itself included (rounded down, but one at least; equals go on).
    The decisions are those of Optuna's `SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction)`.
    """
    reached: dict[int, list[float]] = {}  # by rung

    def behind(line: Curve, rung: int) -> bool:
        value = line[rung - 1][1] if more_is_better else -line[rung - 1][1]
        there = sorted([*reached.get(rung, []), value], reverse=True)
        reached[rung] = there
        return value < there[max(len(there) // reduction, 1) - 1]

    rungs = [1]
    while rungs[-1] < len(curve):
        rungs.append(rungs[-1] * reduction)
    for rival in rivals:
        for rung in rungs:
            if rung > len(rival) or behind(rival, rung):
                break
    return len(curve) == rungs[-1] and behind(curve, rungs[-1])
