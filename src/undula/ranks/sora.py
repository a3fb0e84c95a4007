"""SoRA's gates (Ding et al. 2023, arXiv:2311.11696): proximal steps on loss + lambda |g|_1.

    g <- T_xi(g - eta dL/dg),   xi = eta lambda,   T_xi(v) = sign(v) max(|v| - xi, 0)

The gates get this instead of the optimiser's step (neither its momentum nor its weight decay), with their own rate eta:
a linear warm-up, then constant.  lambda follows `levels`, each for an equal share of the updates: one run gives a path
of ever sparser adapters, recorded in `course.path`.  A gate at zero still gets a gradient and may come back.

Settled here (sources differ): the authors' code steps by Adam with a constant xi, adds lambda mean |g| to the loss as
well, and its operator sets all |v| < 2 xi to zero; here the paper's equation.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.method import Method
from ..core.ranges import Few, NotNegative, Positive, Share
from ..host.views import outline
from ..methods import sora as law
from .allocator import Allocator
from .gates import GateAllocator, GateCourse, gate_of
from .procedure import Quality


class Levels(Choice):
    """The values of lambda, one after another."""

    @abc.abstractmethod
    def values(self) -> tuple[float, ...]: ...


@Levels.register
@dataclass(frozen=True)
class Constant(Levels):
    """One value."""

    value: NotNegative = 0.01

    def values(self) -> tuple[float, ...]:
        return (self.value,)


@Levels.register
@dataclass(frozen=True)
class Linear(Levels):
    """`count` values from `first` to `last` in equal steps."""

    first: NotNegative = 0.0
    last: NotNegative = 0.1
    count: Few = 5

    def values(self) -> tuple[float, ...]:
        step = (self.last - self.first) / max(1, self.count - 1)
        return tuple(self.first + i * step for i in range(self.count))


@Levels.register
@dataclass(frozen=True)
class Geometric(Levels):
    """`count` values from `first` to `last` in equal ratios."""

    first: Positive = 0.001
    last: Positive = 0.1
    count: Few = 5

    def values(self) -> tuple[float, ...]:
        ratio = (self.last / self.first) ** (1 / max(1, self.count - 1))
        return tuple(self.first * ratio**i for i in range(self.count))


@Levels.register
@dataclass(frozen=True)
class Listed(Levels):
    """These values."""

    lambdas: tuple[NotNegative, ...]

    def values(self) -> tuple[float, ...]:
        return self.lambdas


def prox(v: Tensor, xi: float) -> Tensor:
    """T_xi(v) = sign(v) max(|v| - xi, 0), the argmin over u of (u - v)^2 / 2 + xi |u|."""
    return F.softshrink(v, xi)


@dataclass(frozen=True)
class Point:
    """The end of one level: after `step` updates, lambda, the live ranks in all, and the quality where it is known."""

    step: int
    penalty: float
    live: int
    quality: float | None = None


@Allocator.register
@dataclass(frozen=True)
class SoRA(GateAllocator):
    """Proximal steps on trained gates: of SoRA and of any other method that names a trained `gate`."""

    works_on = (law.SoRA,)
    source = "Ding et al. 2023, arXiv:2311.11696"

    lr: Positive = 0.1  # eta, of the gates alone
    warmup: Share = 0.06  # share of the updates over which eta rises
    levels: Levels = Constant()

    def __post_init__(self) -> None:
        if not self.levels.values():
            raise ValueError(f"SoRA needs at least one lambda, found {self.levels!r}")

    def serves(self, method: Method) -> bool:
        gate = gate_of(method)
        return gate is not None and method.init(outline("any", (8, 8)))[gate].requires_grad

    def refusal(self, method: Method | None) -> str:
        return f"{self!r} works on SoRA and other methods with a trained gate, not on {method!r}"

    def ends(self, steps: int) -> list[int]:
        """The number of updates after which each level ends."""
        count = len(self.levels.values())
        return [round(steps * (i + 1) / count) for i in range(count)]

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return 0 if len(self.ends(steps)) == 1 else min(steps, self.ends(steps)[-2] + 1)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> SoRACourse:
        return SoRACourse(self, model, optimizer, steps, quality)


class SoRACourse(GateCourse):
    def __init__(
        self, how: SoRA, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None
    ):
        super().__init__(how, model, optimizer, steps)
        self.how, self.quality, self.path = how, quality, list[Point]()
        self.lambdas = how.levels.values()
        self.rising = max(1, round(how.warmup * steps))
        self.ends = how.ends(steps)
        if len(set(self.ends)) < len(self.ends) or self.ends[0] < 1:
            raise ValueError(f"{how!r}: {len(self.lambdas)} levels do not fit into {steps} updates")

    @property
    def gates(self) -> list[Tensor]:
        """Each live gate once, whichever sites share it."""
        return list({id(g): g for g in super().gates}.values())

    @property
    def penalty(self) -> float:
        """lambda of the update that comes."""
        return self.lambdas[min(sum(end <= self.step for end in self.ends), len(self.lambdas) - 1)]

    @torch.no_grad()
    def on_gradients(self) -> None:
        eta = self.how.lr * min(1.0, (self.step + 1) / self.rising)
        for g in self.gates:
            v = g if g.grad is None else torch.sub(g, g.grad, alpha=eta)
            g.copy_(prox(v, eta * self.penalty))
            g.grad = None  # the optimiser leaves it alone

    def on_update(self) -> None:
        if self.step in self.ends:
            self._note()

    def on_end(self) -> None:
        """The level that a training ended in is a point too."""
        if self.step and (not self.path or self.path[-1].step < self.step):
            self._note()

    def _note(self) -> None:
        penalty = self.lambdas[sum(end < self.step for end in self.ends)]
        quality = None if self.quality is None else float(self.quality())
        self.path.append(Point(self.step, penalty, sum(self.ranks().values()), quality))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {**super().state()[1], "path": [asdict(p) for p in self.path]}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().restore(tensors, values)
        self.path = [Point(**p) for p in values["path"]]
