"""DP-SGD (Abadi et al. 2016, arXiv:1607.00133) on every client: what leaves it tells little of any one of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from ...core.ranges import Inside, NotNegative, Positive, Seed
from ...train.tasks.lending import still_statistics
from ..privacy import Federation, Privacy
from . import accounting, refused
from .accounting import ACCOUNTANTS, PRV
from .loop import Losses, Private
from .losses import by_batch, row_losses

MODES = ("hooks", "ghost", "functorch")


class _Budget:
    """What the two kinds of privacy have in common: a target epsilon or a noise multiplier, and where noise is from."""

    epsilon: float | None
    delta: float
    noise: float | None
    accountant: str
    seed: int | None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.epsilon is None) == (self.noise is None):
            raise ValueError(f"{name} takes a target (epsilon=3.0) or a noise multiplier (noise=1.0): one of them")
        if self.accountant not in ACCOUNTANTS:
            raise ValueError(f"{name}.accountant is {' or '.join(ACCOUNTANTS)}, found {self.accountant!r}")

    def told(self, worst: float, federation: Federation) -> dict[str, Any]:
        """What a record says; `worst`: the epsilon of who has spent the most, None where nothing bounds it."""
        where = "the system" if self.seed is None else "a seed, for experiments"
        found = {"epsilon": worst if math.isfinite(worst) else None, "delta": self.delta, "noise from": where}
        own = {party.name: party.epsilon for party in federation.clients if party.epsilon is not None}
        return found | ({"budgets of their own": own} if own else {})


@Privacy.register
@dataclass(frozen=True)
class DPSGD(_Budget, Privacy):
    """Gradients of rows, clipped to the norm `clip`, summed over a Poisson sample, with noise; by Opacus.

    epsilon: the target over all steps of all rounds, by which the noise is set; or noise: the multiplier itself.
    delta: far below 1 / rows.  mode: how Opacus finds the gradients of rows: "hooks" keeps them, "ghost" keeps their
    norms and goes backward twice, "functorch" asks nothing of a method's law.  accountant: "prv", or "rdp", faster and
    looser.  seed: noise and samples that can be had again, for experiments: who knows it can take the noise away.
    """

    epsilon: Positive | None = None
    delta: Inside = 1e-5
    clip: Positive = 1.0
    noise: NotNegative | None = None
    mode: str = "hooks"
    accountant: str = PRV
    seed: Seed | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"DPSGD.mode is {', '.join(MODES)}; found {self.mode!r}")

    def rate(self, rows: int, batch: int) -> float:
        """q: the chance of a row to take part in a step."""
        return min(1.0, batch / rows)

    def multiplier(self, rows: int, batch: int, steps: int) -> float:
        """The noise of so many steps.  Raises ValueError for a delta that would let a row be told outright."""
        if self.delta * rows >= 1:
            raise ValueError(
                f"delta={self.delta:g} with {rows} rows allows to tell one of them outright: take delta far below 1 / "
                f"rows, {0.1 / rows:.1g} or less"
            )
        if self.noise is not None:
            return self.noise
        assert self.epsilon is not None
        return accounting.noise_for(self.epsilon, self.delta, self.rate(rows, batch), steps, self.accountant)

    def training(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, losses: Losses, **options: Any
    ) -> Private:
        """A training of one party, see `Private`."""
        return Private(self, model, optimizer, losses, **options)

    def refusals(self, federation: Federation) -> Iterator[str]:
        yield from refused.of_run(federation.recipe)

    def noise_of(self, federation: Federation, name: str, rows: int) -> float | None:
        return self._noise_of(federation, name, rows) if federation.planned[name] else None

    def said(self, counts: dict[str, int | float]) -> dict[str, int | float]:
        """Without the loss, which no noise covers."""
        return {k: v for k, v in counts.items() if k != "loss"}

    def fit(self, fitter: Any, federation: Federation, rows: int, name: str, round: int) -> Any:
        recipe = federation.recipe
        if not 1 <= round <= federation.rounds or name not in federation.chosen(round):
            raise ValueError(
                f"{name} is not asked in round {round} by this file, and its noise is that of the rounds in which it "
                "is: what more is asked for is not covered"
            )
        steps = steps_of(recipe, rows)
        fitter.create_optimizer_and_scheduler(steps)
        model, examples = fitter.model, fitter.train_dataset
        model.train()
        still_statistics(model.modules())
        with replace(self, epsilon=None, noise=self._noise_of(federation, name, rows)).training(
            model,
            fitter.optimizer,
            lambda numbers: row_losses(model, examples, numbers),
            rows=rows,
            batch=recipe.batch * recipe.accumulate,
            steps=steps * federation.planned[name],
            at_once=recipe.batch if by_batch(examples) else 1,
            key=(name, round),
        ) as private:
            losses = []
            for _ in range(steps):
                losses.append(private.step())
                fitter.lr_scheduler.step()
        known = [each for each in losses if each is not None]
        return SimpleNamespace(training_loss=math.fsum(known) / len(known) if known else 0.0, global_step=steps)

    def spent(self, federation: Federation, asked: Mapping[str, int], rows: Mapping[str, int]) -> dict[str, Any]:
        recipe, worst = federation.recipe, 0.0
        for name, times in asked.items():
            if name in rows:
                n, steps, noise = rows[name], steps_of(recipe, rows[name]), self._noise_of(federation, name, rows[name])
                history = ((noise, self.rate(n, recipe.batch * recipe.accumulate), steps * times),)
                worst = max(worst, accounting.epsilon(history, self.delta, self.accountant))
        unknown = [name for name in asked if name not in rows]  # what they have spent follows from their rows
        return self.told(worst, federation) | ({"not counted": unknown} if unknown else {})

    def _noise_of(self, federation: Federation, name: str, rows: int) -> float:
        """That of all, or what a budget of the client's own asks for, which is more."""
        recipe, own = federation.recipe, federation.party(name).epsilon
        batch, steps = recipe.batch * recipe.accumulate, steps_of(recipe, rows) * federation.planned[name]
        noise = self.multiplier(rows, batch, steps)
        if own is None:
            return noise
        return max(noise, accounting.noise_for(own, self.delta, self.rate(rows, batch), steps, self.accountant))


def steps_of(recipe: Any, rows: int) -> int:
    """The steps of a client with so many rows in one round."""
    if recipe.max_steps is not None:
        return int(recipe.max_steps)
    return max(1, math.ceil(recipe.epochs * math.ceil(rows / (recipe.batch * recipe.accumulate))))


def rounds_with(federation: Federation, name: str, last: int) -> int:
    """In how many rounds up to this one a client is asked."""
    return sum(name in federation.chosen(round) for round in range(1, last + 1))
