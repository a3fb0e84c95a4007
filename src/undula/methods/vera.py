"""VeRA (Kopiczko, Blankevoort, Asano 2023, arXiv:2310.11454, ICLR 2024).

    W' = W + diag(b) B diag(d) A,   A (r x I), B (O x r) frozen, b (O) and d (r) trained

A and B are Kaiming-uniform (gain sqrt 2: within sqrt(6/I) and sqrt(6/r)), one A for all layers of a width and one B for
all of a height, rebuilt from the seed.  (PEFT cuts both out of one pair as large as the largest layer, so its bounds
follow that layer's size.)  Start: b = 0, d = 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..core.method import Factors, Layer, LowRank, Site
from ..core.ranges import NotZero, Rank, Seed
from ..kernels.bottleneck import bottleneck

DEAD = "at d = 0, with b = 0 at the start, nothing has a gradient: it could never learn; the paper has d=0.1"


@dataclass(frozen=True)
class VeRA(LowRank):
    """W' = W + diag(b) B diag(d) A: two trained vectors around a frozen random pair."""

    formula = "W' = W + diag(b) B diag(d) A, A and B frozen"
    parameters = "O + r"
    source = "Kopiczko et al. 2023, arXiv:2310.11454"

    r: Rank = 256
    d: Annotated[NotZero, DEAD] = 0.1  # where the vector d starts
    seed: Seed = 0

    def most(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        return 2 * max(max(shape) for shape in shapes.values())  # the paper goes to 4/3 of it

    def init(self, site: Site) -> dict[str, Tensor]:
        b_O, d_R = site.zeros(site.shape[0]), torch.full((self.r,), self.d, dtype=site.dtype, device=site.device)
        return {**self.rebuilt(site), "b": b_O.requires_grad_(), "d": d_R.requires_grad_()}

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        (O, I), r = site.shape, self.r

        def once(name: str, n: int, shape: tuple[int, int], fan_in: int) -> Tensor:
            key, bound = ("VeRA", name, n), math.sqrt(6 / fan_in)
            return site.once(
                (*key, self.seed, r, site.dtype, site.device),
                lambda: site.frozen(self.seed, *key, shape=shape, bound=bound),
            )

        return {"A": once("A", I, (r, I), I), "B": once("B", O, (O, r), r)}

    @property
    def linear_in(self) -> str:
        return "b"

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        return f["b"][:, None] * f["B"], f["d"][:, None] * f["A"]

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        """As the pair's product, with d on the activations: A is frozen and needs no gradient."""
        return bottleneck(x, layer, f["A"], f["b"][:, None] * f["B"], lambda z: z * f["d"])
