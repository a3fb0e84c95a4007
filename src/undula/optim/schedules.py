"""The learning rate over a training, as a multiplier of its top."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..core.choice import Choice


class Schedule(Choice):
    """What the learning rate is multiplied by at each update."""

    @abc.abstractmethod
    def multiplier(self, steps: int, warmup: int) -> Callable[[int], float]:
        """The factor at update 0, 1 ... of `steps`, the first `warmup` of which ramp up from 0."""


def ramp(step: int, warmup: int) -> float:
    """Linearly from 0 to 1 over the first `warmup` updates."""
    return min(step / warmup, 1.0) if warmup else 1.0


@Schedule.register
@dataclass(frozen=True)
class Linear(Schedule):
    """Linearly to 0 after the warm-up."""

    def multiplier(self, steps: int, warmup: int) -> Callable[[int], float]:
        return lambda step: step / warmup if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))


@Schedule.register
@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine to 0 after the warm-up."""

    def multiplier(self, steps: int, warmup: int) -> Callable[[int], float]:
        def factor(step: int) -> float:
            through = min(max(step - warmup, 0) / max(1, steps - warmup), 1.0)
            return ramp(step, warmup) * 0.5 * (1 + math.cos(math.pi * through))

        return factor


@Schedule.register
@dataclass(frozen=True)
class Constant(Schedule):
    """1 after the warm-up."""

    def multiplier(self, steps: int, warmup: int) -> Callable[[int], float]:
        return lambda step: ramp(step, warmup)
