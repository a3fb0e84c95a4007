"""LoRTA (Hounie, Kanatsoulis, Tandon, Ribeiro 2024, arXiv:2410.04060).

    dW[o, (q, j)] = s sum_r A[o, r] B[j, r] H[q, r] K[kind, r] L[layer, r],    s = alpha / r

One CP tensor holds all updates of the model; its modes are outputs, inputs within a head, heads, kinds of matrix
(query, key, value, output) and layers.  B = 0 at the start, so only B has a gradient at the first step.

The paper's tensor is for square matrices of attention.  Here every shape (O, I) has a tensor of its own, with A and B
of the lengths that it needs, and the kinds are those that occur at that shape: this extends the paper.  The official
code lets A span the outputs and splits the inputs in heads, for every kind; `HeadsInOutputs` is the other way round,
which is the layout of queries, keys and values.  An axis that `heads` does not divide is split by its largest divisor
below.

A site has its own rows of K and L only, each a tensor that the sites of that kind or layer share.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor

from ..core.choice import Choice
from ..core.method import Factors, LowRank, Site
from ..core.ranges import Count, Positive, Rank
from ._stacks import by_head, divisor, place
from .lora import Classic, Scaling


class Orientation(Choice):
    """Which axis of the matrix the heads split."""

    @abc.abstractmethod
    def dims(self, O: int, I: int, heads: int) -> tuple[int, int, int]:
        """Rows of A, B and H: (the other axis, a head's part of the axis, heads)."""

    @abc.abstractmethod
    def pair(self, A_DR: Tensor, split_ER: Tensor) -> tuple[Tensor, Tensor]:
        """(B (O, R), A (R, I)) from the factors of the other axis and of the split one."""


@Orientation.register
@dataclass(frozen=True)
class HeadsInInputs(Orientation):
    """A spans the outputs, heads split the inputs (the official code)."""

    def dims(self, O: int, I: int, heads: int) -> tuple[int, int, int]:
        h = divisor(I, heads)
        return O, I // h, h

    def pair(self, A_DR: Tensor, split_ER: Tensor) -> tuple[Tensor, Tensor]:
        return A_DR, split_ER.T


@Orientation.register
@dataclass(frozen=True)
class HeadsInOutputs(Orientation):
    """A spans the inputs, heads split the outputs, as the heads of queries, keys and values do."""

    def dims(self, O: int, I: int, heads: int) -> tuple[int, int, int]:
        h = divisor(O, heads)
        return I, O // h, h

    def pair(self, A_DR: Tensor, split_ER: Tensor) -> tuple[Tensor, Tensor]:
        return split_ER, A_DR.T


@dataclass(frozen=True)
class LoRTA(LowRank):
    """W' = W + a slice of one CP tensor."""

    formula = "W' = W + s (A diag(K_kind * L_layer)) (H (.) B)', H (.) B the Khatri-Rao product over heads"
    parameters = "r*(sum(orientation.dims(O, I, heads)) + 2)"
    source = "Hounie et al. 2024, arXiv:2410.04060"

    r: Rank = 8
    alpha: Positive = 8.0
    heads: Count = 12  # attention heads of the model
    orientation: Orientation = HeadsInInputs()
    scaling: Scaling = Classic()

    def init(self, site: Site) -> dict[str, Tensor]:
        D, E, h = self.orientation.dims(*site.shape, self.heads)
        here, r = place(site.name), self.r
        narrow, wide = r**-0.5, (6 / r) ** 0.5  # Kaiming with a = sqrt 5 and a = 0 over r columns, as the code draws

        def tied(*shape: int, bound: float, of: tuple[str | int, ...]) -> Tensor:
            return site.once((self, site.shape, *of), lambda: site.uniform(*shape, bound=bound).requires_grad_())

        return {
            "A": tied(D, r, bound=narrow, of=("A",)),
            "B": tied(E, r, bound=0.0, of=("B",)),
            "H": tied(h, r, bound=wide, of=("H",)),
            "K": tied(r, bound=wide, of=("K", here.kind)),
            "L": tied(r, bound=wide, of=("L", here.layer)),
        }

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        row_R = self.scaling(self.r, self.alpha) * f["K"] * f["L"]
        return self.orientation.pair(f["A"], by_head(f["H"] * row_R, f["B"]))
