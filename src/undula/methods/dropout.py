"""Dropout on an adapter's input (Hu et al. 2021 use it in LoRA; Srivastava et al. 2014).

    y = W x + (W' - W) D(x),   D(x)_i = 0 with probability p, else x_i / (1 - p);   D = identity outside training

The frozen layer always sees x itself.  Each layer draws its own mask, as published: layers that read the same x do not
share one.  On a CPU `torch.dropout` costs more than LoRA's own products: at the usual rates what falls out is drawn
instead of a mask, and one number kept (see `kernels.holes`); elsewhere the mask is drawn 16 bits an input (p in steps
of 1/65536), about twice as cheap.  Both follow `torch.manual_seed`.  Compiled, the mask is torch's own draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..core.method import (
    Additive,
    Factors,
    Layer,
    LowRank,
    Method,
    Product,
    Reweight,
    Settled,
    Site,
)
from ..core.ranges import PartShare
from ..core.wrapper import Around, Wrapper, on_rung
from ..kernels import draws, reference
from ..kernels.bottleneck import fusible, fusible_rounded
from ..kernels.holes import dropped, few, pair_of_dropped

LEVELS = 1 << 16  # that 16 random bits tell apart


def drop(x: Tensor, p: float) -> Tensor:
    """Inverted dropout of x; but for the few of `kernels.holes` the rate is p rounded to 1/65536 and the survivors are
    scaled by the rounded rate."""
    if few(x, p):
        return dropped(x, p)
    level = round(p * LEVELS)
    if torch.compiler.is_compiling():  # which knows no `random_`, and would break its graph there
        return x * (torch.rand(x.shape, device=x.device) >= level / LEVELS) * (LEVELS / (LEVELS - level))
    if (found := draws.dropped(x, p)) is not None:
        return found
    return x * kept(x.shape, p, x.device) * (LEVELS / (LEVELS - level))


def kept(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Which entries a dropout keeps."""
    size = math.prod(shape)
    return stays(noise(-(-size // 4), device)[:size], p).view(tuple(shape))


def noise(number: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """4 x so many random numbers of 16 bits."""
    drawn = torch.empty(number, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16)


def stays(noise: Tensor, p: float) -> Tensor:
    """Which of these numbers of 16 bits say that an entry is kept."""
    return noise >= round(p * LEVELS) - LEVELS // 2


class _Detour:
    """A layer whose frozen product sees `x` whatever the adapter is given."""

    plain = False  # two inputs, so two products

    def __init__(self, layer: Layer, x: Tensor):
        self._layer, self._x = layer, x
        self.training, self.channel = layer.training, layer.channel

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(self._x)

    @property
    def bias(self) -> Tensor | None:
        return self._layer.bias

    @property
    def weight(self) -> Tensor:
        return self._layer.weight

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        return self._layer.project(x, M_KI)


@dataclass(frozen=True, repr=False)
class Dropout(Around, Wrapper):
    """`inner` with dropout of rate p on its input while training."""

    formula = "y = W x + (W' - W) drop(x)"
    parameters = "inner"
    source = "Srivastava et al. 2014; Hu et al. 2021, arXiv:2106.09685"

    inner: Method
    p: PartShare = 0.05

    def __new__(cls, inner: Method, p: float = 0.05) -> Self:
        return object.__new__(on_rung(Dropout, inner))  # type: ignore[return-value]

    def __post_init__(self) -> None:
        if round(self.p * LEVELS) not in range(int(self.p > 0), LEVELS):
            raise ValueError(
                f"a dropout rate goes in steps of 1/{LEVELS}; found p={self.p}, which would be none at all, or all"
            )

    def init(self, site: Site) -> dict[str, Tensor]:
        return self.inner.init(site)

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        return self.inner.again(site, f)

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        if not layer.training or self.p == 0 or not x.is_floating_point():
            return self.inner.forward(x, layer, f)
        if isinstance(self.inner, LowRank) and type(self.inner).forward is LowRank.forward and few(x, self.p):
            B_OR, A_RI = self.inner.pair(f)
            if fusible(x, layer, A_RI, B_OR) or (self.inner.plain() and fusible_rounded(x, layer, A_RI, B_OR)):
                return pair_of_dropped(x, layer, A_RI, B_OR, self.p)
        D = drop(x, self.p)
        if isinstance(self.inner, Reweight) and not isinstance(self.inner, Additive):
            W_OI = layer.weight
            return reference.additive(D, _Detour(layer, x), self.inner.weight(W_OI, f) - W_OI)
        return self.inner.forward(D, _Detour(layer, x), f)

    def settled(self, layer: Layer, f: Factors) -> Settled | None:
        return self.inner.settled(layer, f)

    def products(self, f: Factors) -> list[Product] | None:
        return self.inner.products(f)

    def bent(self, z_TR: Tensor, f: Factors) -> Tensor:
        return self.inner.bent(z_TR, f)

    def static_pair(self, f: Factors) -> tuple[Tensor, Tensor] | None:
        return self.inner.static_pair(f)

    def at_rank(self, f: Factors, b: int) -> tuple[Method, Factors] | None:
        return self.inner.at_rank(f, b)

    @property
    def drops(self) -> bool:
        return True

    def inside(self) -> Method:
        return self.inner.inside()

    def around(self, other: Method) -> Method:
        return Dropout(self.inner.around(other), self.p)  # on the rung of what is inside now

    def undropped(self) -> Method:
        return self.inner.undropped()


class _LowRankDropout(Dropout, LowRank):
    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        return self.inner.pair(f)  # type: ignore[attr-defined]

    def plain(self) -> tuple[float, str, str] | None:
        return self.inner.plain()  # type: ignore[attr-defined]


class _AdditiveDropout(Dropout, Additive):
    def delta(self, f: Factors) -> Tensor:
        return self.inner.delta(f)  # type: ignore[attr-defined]

    def rows(self, f: Factors, some: slice) -> Tensor:
        return self.inner.rows(f, some)  # type: ignore[attr-defined]


class _ReweightDropout(Dropout, Reweight):
    def weight(self, W_OI: Tensor, f: Factors) -> Tensor:
        return self.inner.weight(W_OI, f)  # type: ignore[attr-defined]


class _MethodDropout(Dropout):
    pass
