"""SHiRA: sparse high-rank adapters (Bhardwaj, Pandey, Priyadarshi, Ganapathy, Kadambi, Esteves, Borse, Whatmough,
Garrepalli, Van Baalen, Teague, Nagel 2024, arXiv:2406.13175, NeurIPS 2024).

    W' = W + s S,   S zero but for K entries at fixed places;   s = 1 in training, free afterwards

K = r (O + I), a LoRA's count at rank r (as in PEFT), at most O I.  The rank of S is far above r.  `Switch` changes
adapters in merged weights by overwriting K entries; `interference` measures how two of them get in each other's way.

Open in the paper and settled here: Struct takes the diagonal first, then whole rows at an even stride; the l2 norm of
AWOM is Frobenius'; gradients are averaged before their magnitude is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..core.method import Additive, Factors, Layer, Site, check_within
from ..core.ranges import NotZero, Rank
from ..kernels import sparse
from ..starts.masks import Mask, Rand

if TYPE_CHECKING:
    from ..core.adapter import Adapter


@dataclass(frozen=True)
class SHiRA(Additive):
    """W' = W + s S, S with K = r (O + I) trained entries where `mask` puts them."""

    formula = "W' = W + s S, S sparse"
    parameters = "min(r*(O + I), O*I)"
    source = "Bhardwaj et al. 2024, arXiv:2406.13175"

    r: Rank = 8  # the rank of the LoRA that has as many parameters
    s: NotZero = 1.0
    mask: Mask = Rand()

    def init(self, site: Site) -> dict[str, Tensor]:
        index_K = self.index(site)
        values_K = site.zeros(len(index_K)).requires_grad_()
        return {"values": values_K, "index": index_K, "outline": outline(site)}

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        """The same mask: it may come from data."""
        return {**f, "values": site.zeros(len(f["index"])).requires_grad_()}

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        return {"outline": outline(site), **({"index": self.index(site)} if self.mask.seeded else {})}

    def check(self, site: Site, f: Factors) -> None:
        O, I = site.shape
        check_within(f"{site.name}.index", f["index"], 0, O * I - 1)
        if not bool((f["index"].diff() > 0).all()):
            raise ValueError(f"{site.name}.index does not rise: an entry may be there once")

    def index(self, site: Site) -> Tensor:
        """Where S is not zero: flat indices, rising."""
        O, I = site.shape
        return self.mask(site, min(self.r * (O + I), O * I)).to(site.device)

    @property
    def linear_in(self) -> str:
        return "values"

    def delta(self, f: Factors) -> Tensor:
        O, I, _ = f["outline"].shape
        index_K, change_K = self.entries(f)
        return change_K.new_zeros(O * I).index_add(0, index_K, change_K).view(O, I)

    def rows(self, f: Factors, some: slice) -> Tensor:
        O, I, _ = f["outline"].shape
        index_K, change_K = self.entries(f)
        first, last, _ = some.indices(O)
        ends = torch.tensor([first * I, last * I], dtype=index_K.dtype, device=index_K.device)
        low, high = torch.searchsorted(index_K, ends).tolist()  # they rise
        found = change_K.new_zeros((last - first) * I)
        return found.index_add(0, index_K[low:high] - first * I, change_K[low:high]).view(-1, I)

    def weight(self, W_OI: Tensor, f: Factors) -> Tensor:
        # no zeros are added: the other entries stay to the bit (-0.0 + 0.0 is 0.0)
        index_K, change_K = self.entries(f)
        W = W_OI.to(torch.promote_types(W_OI.dtype, change_K.dtype))
        return W.reshape(-1).index_add(0, index_K, change_K.to(W.dtype)).view(W.shape)

    def entries(self, f: Factors) -> tuple[Tensor, Tensor]:
        """(flat indices, what is added to W there)."""
        return f["index"], self.s * f["values"]

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        if layer.channel != -1 or not x.is_floating_point() or torch.compiler.is_compiling():  # as a matrix
            return super().forward(x, layer, f)
        return sparse.entries(x, layer, *self.entries(f), f["outline"].shape[0])


def outline(site: Site) -> Tensor:
    """(O, I, 0): no numbers; its shape tells the layer's, which the entries alone do not."""
    return site.zeros(*site.shape, 0)


class Interference(NamedTuple):
    """How far S1' S2 is from zero."""

    awom: float  # adapter weight orthogonality magnitude: its norm
    awor: float  # adapter weight orthogonality ratio: the share of it that is zero


def interference(a: Adapter, b: Adapter) -> dict[str, Interference]:
    """Of two adapters (on the Additive rung) at every site that both have.  Orthogonal ones: AWOM 0, AWOR 1."""
    found = {}
    for site in (s for s in a.factors if s in b.factors):
        product_II = a.delta(site).T @ b.delta(site)
        nonzero = int(product_II.count_nonzero()) / product_II.numel()
        found[site] = Interference(float(product_II.norm()), 1 - nonzero)
    return found
