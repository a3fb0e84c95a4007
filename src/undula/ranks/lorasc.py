"""LoRASC, slow cascaded learning (2024, arXiv:2407.01491): after that paper, interpretation.

    cycle t:  y = (W_t + N_t) x + s B_t A_t x,    then W_{t+1} = W_t + merge s B_t A_t and a fresh pair

Known from the paper are the three moves: noise on the frozen backbone while a fast LoRA trains, a weighted portion of
it merged into a slow one, that merged into the backbone.  Settled here: the slow LoRA is the sum of the portions, N_t
has independent entries N(0, (noise std(W))^2), drawn once per cycle, gone before the merge; optimiser state is cleared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import LowRank
from ..core.ranges import Count, Few, NotNegative, Seed, Share
from ..host.state import host_of
from ..host.views import LinearView, check_product
from ..kernels import frozen, reference
from .allocator import Allocator
from .procedure import Course, Quality
from .restart import Cleared, Cycles, Moments, check_cycles, last_begins
from .surgery import live_layers


@Allocator.register
@dataclass(frozen=True)
class LoRASC(Allocator):
    """A cascade of LoRAs: `every` updates, or `cycles` equal parts (4 where neither is given).  `merge` = 1 and
    `noise` = 0 is plain merge-and-restart."""

    works_on = (LowRank,)
    source = "after arXiv:2407.01491"
    grade = "interpretation"

    cycles: Few | None = None
    every: Count | None = None
    merge: Share = 1.0  # the portion of a trained pair that stays
    noise: NotNegative = 0.01  # in standard deviations of W
    moments: Moments = Cleared()
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_cycles(self.cycles, self.every)

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return steps if self.merge != 1 else last_begins(steps, self.cycles, self.every)  # a portion of the last pair

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> Course:
        return _LoRASC(self, model, optimizer, steps)


class _LoRASC(Cycles):
    """The noise stands in for the layers from `before_forward` to `before_update`; at any other moment (evaluation,
    checkpoints, merges) the model has none.  The noisy copies of a cycle's weights are kept between updates."""

    def __init__(self, allocator: LoRASC, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(allocator, model, optimizer, steps, allocator.cycles, allocator.every)
        self.allocator = allocator
        trained = [
            n for n in self.adapter.full if n.rpartition(".")[0] in self.adapter.factors and n.endswith("weight")
        ]
        if allocator.noise and trained:
            raise ValueError(f"{trained[0]} trains in full: noise stands on copies of frozen weights; set noise=0")
        if allocator.noise:
            for path, layer in live_layers(self.model).items():
                check_product(path, layer)
        self._noisy: dict[str, Tensor] = {}
        self._noisy_in = -1  # the cycle that they belong to

    def on_forward(self) -> None:
        if not self.allocator.noise:
            return
        if self._noisy_in != self.cycle:
            self._noisy, self._noisy_in = {}, self.cycle  # the old ones are freed first
            layers = live_layers(self.model)
            self._noisy = {path: self._with_noise(path, layer.weight) for path, layer in layers.items()}
        self._exchange(lambda layer, path: _Noisy(layer, self._noisy[path]))

    def on_backward(self) -> None:
        self._exchange(lambda layer, path: layer)  # also where the update will be skipped

    def _exchange(self, new: Callable[[LinearView, str], Any]) -> None:
        slots = host_of(self.model).slots
        for path, slot in ((path, slots[path]) for path in self.adapter.factors):
            clean = slot.layer.clean if isinstance(slot.layer, _Noisy) else slot.layer
            slot.layer = new(clean, path)

    @torch.no_grad()
    def _with_noise(self, path: str, W_OI: Tensor) -> Tensor:
        n_OI = normal(self.allocator.seed, ("LoRASC", self.cycle, path), tuple(W_OI.shape), W_OI.device)
        return (W_OI + self.allocator.noise * W_OI.float().std() * n_OI).to(W_OI.dtype)

    def turn(self, cycle: int) -> None:
        self.restart(self.places(), self.allocator.seed, cycle, self.allocator.moments, self.allocator.merge)

    def on_end(self) -> None:
        """The last pair too leaves no more than its portion."""
        self._exchange(lambda layer, path: layer)
        if self.allocator.merge != 1:
            self.turn(len(self.ends) - 1)


class _Noisy:
    """A layer with another matrix in the place of its own."""

    def __init__(self, clean: LinearView, W_OI: Tensor):
        self.clean, self.plain, self.weight = clean, clean.plain, W_OI

    def __call__(self, x: Tensor) -> Tensor:
        return reference.reweighted(x, self.clean, self.weight)

    def with_more(self, more: Any, named: Any) -> LinearView:
        raise TypeError(f"{self.clean.call.__qualname__} is called with more than x: set noise=0 in LoRASC")

    def __getattr__(self, name: str) -> Any:
        if name == "clean":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.clean, name)


def normal(seed: int, key: tuple[frozen.Key, ...], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers of the stream (seed, key) by Box and Muller (1958), float32, none beyond 5.8."""
    radius = (1 - frozen.uniform(seed, (*key, "radius"), shape, device)).mul_(0.5).log_().mul_(-2).sqrt_()
    return radius.mul_(frozen.uniform(seed, (*key, "angle"), shape, device).mul_(math.pi).cos_())
