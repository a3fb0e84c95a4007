"""Merging by two axes, as mergekit has them (Goddard et al. 2024, arXiv:2403.13257): what is left of each update, and
how that becomes one, in a space.

    dW = scale * consensus_i( w_i, sparsify(dW_i) )
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.ranges import NotZero, Rank, Seed
from ..kernels import svd
from .combiner import Combiner
from .consensus import Average, Consensus
from .sparsify import Everything, Sparsify
from .update import Layer, Made, Term, blocks, compressed, linear, truncated


class Space(Choice):
    """Where entries are compared."""

    @abc.abstractmethod
    def merged(self, layer: Layer, merge: Merge) -> Made:
        """The combination of a layer's terms, entry by entry."""


@Space.register
@dataclass(frozen=True)
class Update(Space):
    """The entries of dW (O, I) itself, a block of rows at a time."""

    def merged(self, layer: Layer, merge: Merge) -> Made:
        c = merge.coefficients(layer)
        rows = merge.terms(layer, lambda term: blocks(layer, term.rows, len(layer.terms)))
        rank = layer.rank if merge.rank is None else merge.rank
        return compressed(layer, lambda some: merge.scale * merge.consensus(rows(some), c), rank)


@Space.register
@dataclass(frozen=True)
class Aligned(Space):
    """KnOTS (Stoica et al. 2025, arXiv:2410.19735): with [dW_1 ... dW_N] = U S [V_1' ... V_N'] the entries of S V_i',
    in which the adapters share their directions U; dW = U merged.  From the factors (of updates without, from their
    own decomposition), so of rank sum_i r_i at most and without an O x I matrix."""

    def merged(self, layer: Layer, merge: Merge) -> Made:
        U_OK, aligned = align([term.pair() for term in layer.terms])
        of = dict(zip((term.number for term in layer.terms), aligned, strict=True))
        K, I = aligned[0].shape
        rows = merge.terms(
            layer, lambda term: svd.Blocks((K, I), lambda some: of[term.number][some], K, U_OK.device, U_OK.dtype)
        )
        merged_KI = merge.scale * merge.consensus(rows(slice(0, K)), merge.coefficients(layer))
        return truncated(layer, U_OK, merged_KI, merge.rank)


@Combiner.register
@dataclass(frozen=True)
class Merge(Combiner):
    """dW = scale * consensus(w_i, sparsify(dW_i)), entry by entry in `space`.

    Where that is linear in the updates (nothing is left out, no sign elected) it is computed from the factors: without
    `rank` exact, with the rank of all of them together; with it the nearest update of that rank.  Else the result has
    no low rank by itself: it is computed a block of rows at a time and kept at `rank`, by default the sum of the
    ranks; one that is not below the layer's own keeps all of it.  `seed` is that of what is drawn, with the layer's
    name and the adapter's place.
    """

    sparsify: Sparsify = Everything()
    consensus: Consensus = Average()
    space: Space = Update()
    scale: NotZero = 1.0
    rank: Rank | None = None
    seed: Seed = 0

    def at(self, layer: Layer) -> Made:
        if self.consensus.linear and self.sparsify.keeps_all:
            return linear(layer, [self.scale * c for c in self.coefficients(layer)], self.rank)
        return self.space.merged(layer, self)

    def coefficients(self, layer: Layer) -> list[float]:
        """The consensus' coefficients of the terms that there are."""
        return layer.of(self.consensus.coefficients(layer.weights))

    def shares(self, weights: Sequence[float]) -> list[float]:
        return self.consensus.coefficients(weights)

    def terms(self, layer: Layer, of: Callable[[Term], svd.Blocks]) -> Callable[[slice], list[Tensor]]:
        """What is left of each term, by rows; `of` gives its entries in a space."""
        spaces = [of(term) for term in layer.terms]
        told = [self.sparsify.measured(_entries(M), M.shape[0] * M.shape[1], M.dtype) for M in spaces]

        def rows(some: slice) -> list[Tensor]:
            return [
                self.sparsify(M.rows(some).to(M.dtype), kept, self._generator(layer.site, term.number, some.start))
                for M, kept, term in zip(spaces, told, layer.terms, strict=True)
            ]

        return rows

    def _generator(self, site: str, number: int, row: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {number} {row} {site}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _entries(M: svd.Blocks) -> Callable[[], Iterable[Tensor]]:
    return lambda: (block for _, block in M.each())


def align(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """(U (O, K), [S V_i' (K, I)]) of [B_1 A_1 ... B_N A_N], in float64, without directions of no weight; what is
    rounding there is 0, so that it has no sign that would count."""
    Q_OR, R = torch.linalg.qr(torch.cat([B for B, _ in pairs], 1).double())
    lefts = torch.split(R, [B.shape[1] for B, _ in pairs], 1)
    bases = [torch.linalg.qr(A.double().T) for _, A in pairs]
    core = torch.cat([left @ R_A.T for left, (_, R_A) in zip(lefts, bases, strict=True)], 1)
    U, s, Vh = torch.linalg.svd(core, full_matrices=False)
    rounding = float(s[0].detach()) * torch.finfo(s.dtype).eps * max(core.shape)
    carries = s > rounding
    carries[0] = True
    U, SV = U[:, carries], s[carries, None] * Vh[carries]
    parts = torch.split(SV, [Q.shape[1] for Q, _ in bases], 1)
    aligned = [part @ Q.T for part, (Q, _) in zip(parts, bases, strict=True)]
    return Q_OR @ U, [t.masked_fill(t.abs() <= rounding, 0.0) for t in aligned]
