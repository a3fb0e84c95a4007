"""Masked: a method whose layer does without some of its inputs.

    W' = (W + dW(f)) diag(m),   m (I) frozen, of zeros and ones

Structured pruning while it trains (LoRAPrune: Zhang, Chen, Shen, Yang, Ou, Yu, Zhuang 2023, arXiv:2305.18403): an
attention head, or a channel of a feed-forward block, is gone where the matrix behind it reads zeros in its place,
whatever the activation before.  The mask is part of the adapter, so that what is measured, saved, merged and opened
again is the pruned function; `undula.compress.prune_base` takes the rows and columns away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Factors, Layer, Method, Reweight, Site
from ..core.wrapper import Around
from ..kernels import reference
from .lora import LoRA


@dataclass(frozen=True)
class Masked(Around, Reweight):
    """`inner` (on the rung Reweight or above) with the mask m on the layer's inputs: ones in a new adapter, closed by
    `undula.ranks.loraprune.LoRAPrune`."""

    formula = "W' = (W + dW) diag(m)"
    parameters = "inner"
    source = "after Zhang et al. 2023, arXiv:2305.18403"

    inner: Method = LoRA()

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Reweight) or isinstance(self.inner.undropped(), Masked):
            raise TypeError(f"Masked takes a method on the rung Reweight that is not Masked; found {self.inner!r}")

    @property
    def _inner(self) -> Reweight:
        assert isinstance(self.inner, Reweight)
        return self.inner

    def init(self, site: Site) -> dict[str, Tensor]:
        return {**self.inner.init(site), "mask": torch.ones(site.shape[1], dtype=site.dtype, device=site.device)}

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        return {**self.inner.again(site, own(f)), "mask": f["mask"]}

    def check(self, site: Site, f: Factors) -> None:
        self.inner.check(site, own(f))
        if "mask" in f and not ((f["mask"] == 0) | (f["mask"] == 1)).all():
            raise ValueError("the mask of a Masked layer has other numbers than 0 and 1")

    def reads(self, f: Factors) -> Tensor | None:
        return f["mask"]

    def unmasked(self, f: Factors) -> tuple[Method, Factors]:
        return self.inner, own(f)

    def inside(self) -> Method:
        return self.inner.inside()

    def around(self, other: Method) -> Method:
        return Masked(self.inner.around(other))

    def weight(self, W_OI: Tensor, f: Factors) -> Tensor:
        return self._inner.weight(W_OI, own(f)) * f["mask"]

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        linear = layer.channel == -1 and x.is_floating_point()
        if linear and getattr(layer, "product", layer.plain):  # W' x = W (m x), and the layer has its own product
            return self.inner.forward(x * f["mask"].to(x.dtype), layer, own(f))
        if layer.training and self.inner.drops:
            raise TypeError(f"{self!r} trains on linear layers alone: elsewhere put Dropout around Masked")
        return reference.reweighted(x, layer, self.weight(layer.weight, f))


def own(f: Factors) -> Factors:
    """The factors of the method inside."""
    return {k: t for k, t in f.items() if k != "mask"}
