"""What a study hears of a run while it trains: evaluations, the best point, progress, and whether to give up early."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from ..adapter import Adapter
from ..host import attach, detach
from ..train.fit import Prepared
from .spent import Spent

Curve = Sequence[tuple[int, float]]


class Watch(TrainerCallback):
    """Evaluates on the validation rows at even steps and keeps the numbers of the best point.

    `heard(step, steps)` is told of every step.  `rivals` are the curves of the runs that came before in the same sweep:
    with `halving` the run ends early when Optuna's successive halving would prune it against them.
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
        self.heard(state.global_step, state.max_steps)
        step, steps = state.global_step, state.max_steps
        if step == 1 and (allocator := self.ready.run.allocator) is not None:
            self.counts_from = allocator.counts_from(steps, self.ready.adapter)
        if step * self.evaluations // steps > (step - 1) * self.evaluations // steps:
            self.evaluate(step)
            if step < steps and self._hopeless():
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
    """Whether Optuna's successive halving (Jamieson, Talwalkar 2016; asynchronous form: Li et al. 2020,
    arXiv:1810.05934) would end the run with this curve, given those of earlier runs.  One evaluation is one unit of
    resource."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction)
    study = optuna.create_study(direction="maximize" if more_is_better else "minimize", pruner=pruner)
    for rival in (*rivals, curve):
        trial = study.ask()
        for number, (_, value) in enumerate(rival, 1):
            trial.report(value, number)
            stop = trial.should_prune()  # also notes which rungs the run has reached
            if stop and rival is not curve:
                break
        if rival is curve:
            return stop
        study.tell(trial, state=optuna.trial.TrialState.PRUNED if stop else optuna.trial.TrialState.COMPLETE,
                   values=None if stop else rival[-1][1])  # fmt: skip
    return False
