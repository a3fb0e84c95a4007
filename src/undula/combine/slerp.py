"""Slerp: between the directions of updates on the sphere, not through it (Shoemake 1985), of any number of adapters.

dW = sum_i c_i dW_i,   sum_i c_i dW_i / |dW_i| = the weighted mean on the sphere of the directions dW_i / |dW_i|
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.ranges import Rank
from .combiner import Combiner
from .update import Layer, Made, inner, linear, norm

MOST_STEPS = 1000


@Combiner.register
@dataclass(frozen=True)
class Slerp(Combiner):
    """Of two adapters c_i = sin(w_i angle) / sin(angle) with weights that sum to 1, as mergekit's slerp; of more the
    point of the sphere from which the weighted directions balance (the Karcher mean).  The angles come from the
    factors, so the result is exact, of the rank of all together, or the nearest of rank `rank`.

    Weights count in proportion and are not negative.  An adapter that is zero at a layer has no direction there and
    counts by its weight alone, as in an average.  Raises ValueError for directions without a mean: opposite ones.
    """

    rank: Rank | None = None

    def weights(self, weights: Sequence[float] | None, number: int) -> tuple[float, ...]:
        given = super().weights(weights, number)
        if min(given) < 0 or not math.fsum(given):
            raise ValueError(f"Slerp takes shares of the way, weights that are not negative, found {list(given)}")
        return tuple(w / math.fsum(given) for w in given)

    def shares(self, weights: Sequence[float]) -> list[float]:
        return list(weights)

    def at(self, layer: Layer) -> Made:
        sizes = [norm(term) for term in layer.terms]
        some = [i for i, size in enumerate(sizes) if size > 0]
        shares = layer.of(layer.weights)
        c = list(shares)
        if len(some) > 1:
            gram = torch.tensor(
                [[inner(layer.terms[i], layer.terms[j]) / (sizes[i] * sizes[j]) for j in some] for i in some],
                dtype=torch.float64,
            )
            share = math.fsum(shares[i] for i in some)  # that of adapters without a direction is lost, as by averaging
            found = mean(gram.clamp(-1, 1), torch.tensor([shares[i] / share for i in some], dtype=torch.float64))
            if found is None:
                raise ValueError(f"at {layer.site} the updates point in opposite directions, between which no way is "
                                 "the shortest: leave one out, or take another way to combine")  # fmt: skip
            for i, each in zip(some, found.tolist(), strict=True):
                c[i] = share * each
        return linear(layer, c, self.rank)


def mean(gram: Tensor, w: Tensor) -> Tensor | None:
    """Coefficients, over unit vectors with this Gram matrix, of their weighted mean on the sphere; None where there is
    none that is told from others."""
    c = w.clone()
    size = float(c @ gram @ c)
    if size <= 1e-12:
        return None
    c = c / math.sqrt(size)
    for _ in range(MOST_STEPS):
        cosine = (gram @ c).clamp(-1, 1)
        angle = cosine.arccos()
        if float((angle * (w > 0)).max()) > math.pi - 1e-6:
            return None
        ratio = torch.where(angle > 1e-8, angle / angle.sin().clamp_min(1e-300), torch.ones_like(angle))
        step = w * ratio - (w * ratio * cosine).sum() * c  # sum_i w_i log_m(u_i), m = sum_i c_i u_i
        length = math.sqrt(max(float(step @ gram @ step), 0.0))
        if length < 1e-15:
            return c
        c = math.cos(length) * c + math.sin(length) / length * step
        c = c / math.sqrt(float(c @ gram @ c))
        if length < 1e-14:
            return c
    return c
