"""LoRA-LEGO (Zhao et al. 2025, arXiv:2409.16167): the ranks of all adapters, as units, grouped by likeness; of each
group one.

    unit = (column b of B, row a of A), |b| = |a|;   dW = gain sum_groups b a',   (b, a) = the mean of a group
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.ranges import Rank, Share
from ..kernels import svd
from .combiner import Combiner
from .update import Layer, Made, Term, truncated

MOST_ROUNDS, MOST_TRIED = 300, 32


class Gauge(Choice):
    """B A = (B G) (G^-1 A): which of these pairs' ranks are the units."""

    @abc.abstractmethod
    def __call__(self, B_OR: Tensor, A_RI: Tensor) -> tuple[Tensor, Tensor]: ...


@Gauge.register
@dataclass(frozen=True)
class Balanced(Gauge):
    """The adapter's own ranks, with |b| = |a|: the result does not depend on how a rank's size is shared."""

    def __call__(self, B_OR: Tensor, A_RI: Tensor) -> tuple[Tensor, Tensor]:
        return svd.balanced(B_OR, A_RI)


@Gauge.register
@dataclass(frozen=True)
class Principal(Gauge):
    """The singular triples of dW: the result does not depend on the factors at all, where no two singular values are
    the same."""

    def __call__(self, B_OR: Tensor, A_RI: Tensor) -> tuple[Tensor, Tensor]:
        return svd.halves(*svd.factored(B_OR, A_RI))


@Combiner.register
@dataclass(frozen=True)
class LEGO(Combiner):
    """Units of all adapters in k = `rank` groups by k-means; without `rank` k is that of the best silhouette, from the
    smallest rank of an adapter on.  A unit and its negative (-a, -b) are one.  k-means begins with the largest unit
    and goes on with the farthest from those taken, so nothing is drawn and no order of adapters or ranks counts.

    Averaging shortens: each group is given its members' mean size back (to the power `restore`), and dW is multiplied
    by sqrt(mean rank of the adapters / k) (to the power `rescale`).  Both are ours where the paper's formulas could not
    be had.  Weights say how much an adapter's units count in a group, in proportion; they are not negative.
    """

    grade: ClassVar[str] = "interpretation"
    rank: Rank | None = None
    gauge: Gauge = Balanced()
    restore: Share = 1.0
    rescale: Share = 1.0

    def weights(self, weights: Sequence[float] | None, number: int) -> tuple[float, ...]:
        given = super().weights(weights, number)
        if min(given) < 0 or not math.fsum(given):
            raise ValueError(f"LEGO takes weights that are not negative, and not all 0, found {list(given)}")
        return tuple(w / math.fsum(given) for w in given)

    def at(self, layer: Layer) -> Made:
        shares = layer.of(layer.weights)
        pairs = [self._units(term) for term, w in zip(layer.terms, shares, strict=True) if w]
        weights = [w for w in shares if w]
        units_ND = torch.cat([torch.cat([B.T, A], 1) for B, A in pairs]).double()
        w_N = torch.cat(
            [torch.full((len(A),), w, dtype=torch.float64) for w, (_, A) in zip(weights, pairs, strict=True)]
        )
        square_N = units_ND.square().sum(1)
        live = square_N > square_N.max() * torch.finfo(units_ND.dtype).eps * max(layer.shape)
        if not live.any():
            return truncated(layer, *pairs[0], None)
        ranks = [int(own.sum()) for own in live.split([len(A) for _, A in pairs])]
        ranks = [r for r in ranks if r]
        units_ND, w_N = units_ND[live], w_N.to(units_ND.device)[live]
        centres_KD, group_N = self._grouped(units_ND, w_N, min(ranks))
        k = len(centres_KD)
        size_N = units_ND.norm(dim=1)
        total_K = torch.zeros(k, dtype=w_N.dtype, device=w_N.device).index_add(0, group_N, w_N)
        mean_K = torch.zeros_like(total_K).index_add(0, group_N, w_N * size_N) / total_K
        longer_K = (mean_K / centres_KD.norm(dim=1).clamp_min(1e-300)) ** self.restore
        gain = (math.fsum(ranks) / len(ranks) / k) ** (self.rescale / 2)
        B_OK, A_KI = (centres_KD * longer_K[:, None]).split(layer.shape, 1)
        return truncated(layer, gain * B_OK.T.to(layer.dtype), A_KI.to(layer.dtype), None)

    def _units(self, term: Term) -> tuple[Tensor, Tensor]:
        return self.gauge(*term.pair())

    def _grouped(self, units_ND: Tensor, w_N: Tensor, least: int) -> tuple[Tensor, Tensor]:
        if self.rank is not None:
            return groups(units_ND, w_N, self.rank)
        last = max(least, len(units_ND) - 1)
        tried = sorted({round(least + (last - least) * i / MOST_TRIED) for i in range(MOST_TRIED + 1)})
        found = [groups(units_ND, w_N, k) for k in tried]
        scores = [silhouette(units_ND, group_N) for _, group_N in found]
        return found[max(range(len(tried)), key=lambda i: (round(scores[i], 6), -i))]


def groups(units_ND: Tensor, w_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(centres (K, D), the group of each unit) of k-means on units whose sign does not count; fewer
    than k where there are fewer different units."""
    centres = [units_ND[units_ND.norm(dim=1).argmax()]]
    away_N = _away(units_ND, torch.stack(centres)).amin(1)
    floor = 1e-13 * float(units_ND.square().sum(1).max())
    while len(centres) < k and float(away_N.max()) > floor:
        centres.append(units_ND[away_N.argmax()])
        away_N = torch.minimum(away_N, _away(units_ND, centres[-1][None])[:, 0])
    centres_KD = torch.stack(centres)
    group_N = torch.full((len(units_ND),), -1, device=units_ND.device)
    for _ in range(MOST_ROUNDS):
        found_N = _away(units_ND, centres_KD).argmin(1)
        if torch.equal(found_N, group_N):
            break
        group_N = found_N
        kept = torch.unique(group_N)  # a group that has lost its last unit is none
        group_N = torch.searchsorted(kept, group_N)
        sign_N = _signs(units_ND, centres_KD[kept][group_N])
        signed_ND = units_ND * (w_N * sign_N)[:, None]
        total_K = torch.zeros(len(kept), dtype=w_N.dtype, device=w_N.device).index_add(0, group_N, w_N)
        centres_KD = torch.zeros_like(centres_KD[kept]).index_add(0, group_N, signed_ND) / total_K[:, None]
    return centres_KD, group_N


def _signs(units_ND: Tensor, centres_ND: Tensor) -> Tensor:
    return torch.where((units_ND * centres_ND).sum(1) < 0, -1.0, 1.0).to(units_ND.dtype)


def _away(units_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """min(|u - c|^2, |u + c|^2) (N, K)."""
    squares = units_ND.square().sum(1)[:, None] + centres_KD.square().sum(1)
    return (squares - 2 * (units_ND @ centres_KD.T).abs()).clamp_min(0)


def silhouette(units_ND: Tensor, group_N: Tensor) -> float:
    """The mean of (b - a) / max(a, b), a a unit's mean distance to its own group, b to the nearest other; 0 for one
    that is alone (Rousseeuw 1987)."""
    k = int(group_N.max()) + 1
    if k < 2:
        return 0.0
    away_NN = _away(units_ND, units_ND).sqrt()
    member_NK = torch.nn.functional.one_hot(group_N, k).to(away_NN.dtype)
    count_K = member_NK.sum(0)
    sums_NK = away_NN @ member_NK
    own_N = count_K[group_N]
    a_N = sums_NK.gather(1, group_N[:, None])[:, 0] / (own_N - 1).clamp_min(1)
    b_N = (sums_NK / count_K).masked_fill(member_NK > 0, math.inf).amin(1)
    score_N = (b_N - a_N) / torch.maximum(a_N, b_N).clamp_min(1e-300)
    return float(score_N.masked_fill(own_N < 2, 0.0).mean())
