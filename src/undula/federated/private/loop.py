"""One party's training under DP-SGD (Abadi et al. 2016, arXiv:1607.00133), around any optimiser of torch.

    how = DPSGD(epsilon=3.0, delta=1e-5, clip=1.0)
    with how.training(model, optimizer, losses, rows=len(data), batch=64, steps=500) as private:
        for _ in range(500):
            private.step()
    print(private.epsilon)

`losses(numbers)` computes the loss of each of these rows, by itself: a tensor (n,).  In each step every row takes part
with the chance q = batch / rows (Poisson), and the optimiser gets

    g = (1 / batch) (sum_n g_n min(1, clip / |g_n|) + N(0, (noise clip)^2)),   |g_n| over all that trains
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...host.where import inner
from . import accounting
from .accounting import History
from .refused import check_model

How = Any  # a `DPSGD`
Losses = Callable[[list[int]], Tensor]
CLOSE = {8: 1e-6, 4: 1e-3}  # by the bytes of the base's numbers; of narrower ones 0.05


class Private:
    """A training under way; `step` takes one step, `epsilon` is what all steps so far let others learn of a row.

    steps: that are planned, those of `history` among them: on these the noise is set where a target is given, and none
    is taken after them.  history: what was spent on the same rows before.  at_once: rows in memory at a time.  key:
    tells this party's random numbers from others', where a seed makes them.  A context: when it ends the model is as it
    was, with what it has learnt.

    Raises TypeError or ValueError for a model whose rows do not stand each by itself.
    """

    def __init__(
        self,
        how: How,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: Losses,
        *,
        rows: int,
        batch: int,
        steps: int,
        history: History = (),
        at_once: int | None = None,
        key: Sequence[object] = (),
    ):
        self.how, self.model, self.losses = how, inner(model), losses
        self.rows, self.batch = rows, min(batch, rows)
        self.at_once = at_once or self.batch
        self.rate, self.steps = how.rate(rows, batch), steps
        self.noise, self.before, self.taken = how.multiplier(rows, batch, steps), tuple(history), 0
        check_model(self.model, optimizer)
        device = next(p.device for p in self.model.parameters() if p.requires_grad)
        done = sum(steps for _, _, steps in self.before)
        key = (*key, done) if done else key  # a seed gives steps that go on other noise than those before
        self.choices = accounting.generator(how.seed, "rows", *key)
        with accounting.quiet():
            from .hooks import hooks

            self.hooks = hooks(self.model, how.mode, how.clip)
            self.optimizer = _optimizer(how)(
                optimizer,
                noise_multiplier=self.noise,
                max_grad_norm=how.clip,
                expected_batch_size=self.batch,
                generator=accounting.generator(how.seed, "noise", *key, device=device),
                secure_mode=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.hooks.close()

    @property
    def history(self) -> History:
        """With the steps that were taken here."""
        return (*self.before, (self.noise, self.rate, self.taken)) if self.taken else self.before

    @property
    def epsilon(self) -> float:
        """At the delta of `how`."""
        return accounting.epsilon(self.history, self.how.delta, self.how.accountant)

    def draw(self) -> list[int]:
        """The rows of a step: each with the chance `rate`, none sometimes."""
        with accounting.quiet():
            from opacus.utils.uniform_sampler import UniformWithReplacementSampler

        sampler = UniformWithReplacementSampler(
            num_samples=self.rows, sample_rate=self.rate, generator=self.choices, steps=1
        )
        return next(iter(sampler))

    def step(self) -> float | None:
        """Draws rows and takes one step.  Returns the mean of their losses, None of no rows: for the eyes of who has
        the rows, since it is neither clipped nor noised."""
        drawn = self.draw()
        if not self.taken:
            self.check(range(min(2, self.rows)))  # whatever was drawn: it may be one row, or none
        losses = self.take(drawn)
        return None if losses is None else float(losses.mean())

    def take(self, drawn: Sequence[int]) -> Tensor | None:
        """One step on these rows, which `draw` has drawn; their losses.  Raises FloatingPointError for what is not
        finite, RuntimeError for a step beyond those on which the noise of a target was set."""
        if self.how.epsilon is not None and sum(steps for _, _, steps in self.history) >= self.steps:
            raise RuntimeError(
                f"the noise keeps {self.steps} steps to epsilon={self.how.epsilon:g}, and they are taken: plan more "
                "(steps=...)"
            )
        parts = [list(drawn[i : i + self.at_once]) for i in range(0, len(drawn), self.at_once)] or [[]]
        found = []
        for part in parts:
            self.optimizer.zero_grad()
            if part:
                found.append(self._gradients(part))
            else:  # nobody was drawn: the step is noise alone
                self.hooks.begin(0)
                self.hooks.finish()
            self.optimizer.signal_skip_step(part is not parts[-1])
            self.optimizer.step()
        self.taken += 1
        for p in self.hooks.trained:
            if not p.isfinite().all():
                raise FloatingPointError("a step under DP-SGD is not finite: lower the learning rate or the noise")
        return torch.cat(found) if found else None

    def _gradients(self, part: list[int]) -> Tensor:
        """Leaves the gradients of these rows where the optimiser finds them."""
        self.hooks.begin(len(part))
        losses = self.losses(part)
        if losses.shape != (len(part),):
            raise ValueError(f"losses of {len(part)} rows are a tensor ({len(part)},), found {tuple(losses.shape)}")
        if not losses.isfinite().all():
            raise FloatingPointError("the loss of a row is not finite: no clip bounds it")
        if self.hooks.norms:
            with accounting.quiet():
                from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

            DPTensorFastGradientClipping(self.hooks, self.optimizer, losses, "sum").backward()
        else:
            losses.sum().backward()
            self.hooks.finish()
        return losses.detach()

    def check(self, numbers: Sequence[int]) -> None:
        """That rows stand each by itself: gradients of each alone are those that it has in a batch.  In evaluation
        mode, so that dropout draws nothing.  Raises ValueError."""
        modes = {m: m.training for m in self.model.modules()}
        self.model.eval()
        self.hooks.disable_hooks()
        try:
            together, alone = self._plain(list(numbers)), [self._plain([n]) for n in numbers]
            summed = [torch.stack(each).sum(0) for each in zip(*alone, strict=True)]
            size = max(_norm(together), _norm(summed))
            off = _norm([a - b for a, b in zip(together, summed, strict=True)])
        finally:
            self.hooks.enable_hooks()
            self.optimizer.zero_grad()
            for module, training in modes.items():
                module.training = training
        narrow = min(p.dtype.itemsize for p in self.model.parameters() if p.is_floating_point())
        if not off <= CLOSE.get(narrow, 0.05) * size:
            raise ValueError(
                f"a row's gradient depends on the other rows of its batch (by {off / size:.2g} of it): statistics of a "
                "batch, a loss that is no sum over rows, or positions that rows share. What one row can change is then "
                "not bounded, whatever is clipped"
            )

    def _plain(self, numbers: list[int]) -> list[Tensor]:
        own = self.hooks.trained
        found = torch.autograd.grad(self.losses(numbers).sum(), own, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def _optimizer(how: How) -> Any:
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

    return DPOptimizerFastGradientClipping if how.mode == "ghost" else DPOptimizer
