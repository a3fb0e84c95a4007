"""Restarted: a method beside the pairs that its restarts have left behind.

    W' = W + dW(f) + B_past A_past,   B_past (O x past), A_past (past x I), both frozen

ReLoRA (Lialin, Muckatira, Shivagunde, Rumshisky 2023, arXiv:2307.05695) and its relatives train a low-rank update,
merge it into the base and begin another.  Here what was merged stays in the adapter, as stacked factors in the factors'
own type: the base is never written to, no bf16 or quantised weight rounds the sum, every checkpoint is an ordinary
adapter, and the export is one plain LoRA of rank r + past.  `undula.ranks` has the schedules that restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Factors, Layer, LowRank, Product, Site
from ..core.ranges import Extra
from ..core.wrapper import Around
from ..kernels.bottleneck import bottleneck
from ..kernels.frozen_pair import beside_frozen
from .lora import LoRA


class _Merged:
    """A layer with a frozen pair added, for an inner method that has a forward of its own."""

    plain = False  # its output is not one product with `weight`

    def __init__(self, layer: Layer, B_OK: Tensor, A_KI: Tensor):
        self._layer, self._pair = layer, (A_KI, B_OK)
        self.training, self.channel, self.bias = layer.training, layer.channel, layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        return bottleneck(x, self._layer, *self._pair)

    @property
    def weight(self) -> Tensor:
        A_KI, B_OK = self._pair
        return self._layer.weight + B_OK @ A_KI

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        return self._layer.project(x, M_KI)


@dataclass(frozen=True)
class Restarted(Around, LowRank):
    """`inner` (LowRank) beside a frozen pair of rank `past`: zero in a new adapter, grown by `undula.ranks`."""

    formula = "W' = W + dW(f) + B_past A_past"
    parameters = "inner"
    source = "after Lialin et al. 2023, arXiv:2307.05695"

    inner: LowRank = LoRA()
    past: Extra = 0

    def __post_init__(self) -> None:
        if not isinstance(self.inner, LowRank) or isinstance(self.inner.undropped(), Restarted):
            raise TypeError(f"Restarted takes a method on the rung LowRank that is not Restarted; found {self.inner!r}")

    def init(self, site: Site) -> dict[str, Tensor]:
        O, I = site.shape
        f = self.inner.init(site)
        return {**f, "A_past": site.zeros(self.past, I), "B_past": site.zeros(O, self.past)} if self.past else f

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        past = {k: f[k] for k in ("A_past", "B_past") if self.past}
        return {**self.inner.again(site, {k: t for k, t in f.items() if k not in past}), **past}

    def products(self, f: Factors) -> list[Product] | None:
        return self.inner.products(f)

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        B_OR, A_RI = self.inner.pair(f)
        if not self.past:
            return B_OR, A_RI
        return torch.cat([B_OR, f["B_past"]], 1), torch.cat([A_RI, f["A_past"]])

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        if not self.past:
            return self.inner.forward(x, layer, f)
        if type(self.inner).forward is LowRank.forward:
            return beside_frozen(x, layer, self.inner.pair(f), (f["B_past"], f["A_past"]))
        return self.inner.forward(x, _Merged(layer, f["B_past"], f["A_past"]), f)
