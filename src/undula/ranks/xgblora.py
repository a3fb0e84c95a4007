"""XGBLoRA, gradient boosting with rank-1 LoRAs (2024, arXiv:2410.19694): after that paper, interpretation.

    booster t:  S_t a random subset of the layers;  some updates of W + s b a' in S_t on L + penalty (|a|^2 + |b|^2);
                then W <- W + s b a' and a fresh pair there

There is no residual target: a booster goes on from the weights that those before it have left.  Settled here: optimiser
state of what restarts is cleared; a layer is everything below one number in the site names (`model.layers.3`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..core.adapter import Adapter
from ..core.method import LowRank
from ..core.ranges import Count, Few, NotNegative, Seed
from ..kernels import frozen
from ..optim.paired import pull
from .allocator import Allocator
from .procedure import Course, Place, Quality
from .restart import Cleared, Cycles, Moments, check_cycles, last_begins


@Allocator.register
@dataclass(frozen=True)
class XGBLoRA(Allocator):
    """Boosters of `every` updates, or `boosters` equal parts (4 where neither is given), each on `layers` random
    layers.  The paper's boosters are LoRA(r=1); any other rank works as well."""

    works_on = (LowRank,)
    source = "after arXiv:2410.19694"
    grade = "interpretation"

    boosters: Few | None = None
    every: Count | None = None
    layers: Count | None = None  # None: all of them
    penalty: NotNegative = 0.0
    moments: Moments = Cleared()
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_cycles(self.boosters, self.every)

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return last_begins(steps, self.boosters, self.every)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> Course:
        return _XGBLoRA(self, model, optimizer, steps)


class _XGBLoRA(Cycles):
    def __init__(self, allocator: XGBLoRA, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(allocator, model, optimizer, steps, allocator.boosters, allocator.every)
        self.allocator = allocator
        self.layers = list(dict.fromkeys(layer_of(place.site) for place in self.places()))
        if (allocator.layers or 1) > len(self.layers):
            raise ValueError(f"{allocator.layers} layers are to be drawn; the adapter has {len(self.layers)}")
        owners: dict[int, str] = {}
        for place in self.places():
            for t in place.f.values():
                if t.requires_grad and owners.setdefault(id(t), layer_of(place.site)) != layer_of(place.site):
                    raise TypeError(f"{place.site} shares what it trains with another layer: no layer trains alone")

    def chosen(self, booster: int) -> set[str]:
        """The layers that train in this booster."""
        order = frozen.permutation(self.allocator.seed, ("XGBLoRA", booster), len(self.layers)).tolist()
        return {self.layers[i] for i in order[: self.allocator.layers]}

    def _at_work(self, booster: int) -> Iterator[tuple[Place, bool]]:
        chosen = self.chosen(booster)
        return ((place, layer_of(place.site) in chosen) for place in self.places())

    @torch.no_grad()
    def on_gradients(self) -> None:
        for place, trains in self._at_work(self.cycle):
            for p in place.f.values():
                if not trains:
                    p.grad = None  # optimisers pass over it: no step, no decay
                elif p.grad is not None and self.allocator.penalty:
                    pull(self.optimizer, [p], [2 * self.allocator.penalty * p])

    def turn(self, cycle: int) -> None:
        trained = [place for place, trains in self._at_work(cycle) if trains]
        self.restart(trained, self.allocator.seed, cycle, self.allocator.moments)


def layer_of(site: str) -> str:
    """The part of a site's name up to its first number: `model.layers.3` of `model.layers.3.mlp.up_proj`; the whole
    name where there is none."""
    parts = site.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: first + 1])
