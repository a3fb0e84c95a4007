"""Centred: any start without touching the base.

    W' = W + delta(f) - delta(f0),   f0 the factors at the start, frozen

So PiSSA and its like begin at the base, and activations that cannot leave B = 0 learn.  LowRank methods stay LowRank,
at twice the rank.  A start with B = 0 has nothing to count out: its method keeps its rank and its factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ..core.bend import Bend
from ..core.method import (
    Additive,
    Factors,
    Layer,
    LowRank,
    Method,
    Product,
    Site,
)
from ..core.wrapper import Around, Wrapper, on_rung
from ..starts import Gaussian, Start


@dataclass(frozen=True, repr=False)
class Centred(Around, Wrapper):
    """`inner` (Additive, with a `start`) begun at `start` and counted from there."""

    formula = "W' = W + dW(f) - dW(f0)"
    parameters = "inner"

    inner: Method
    start: Start = Gaussian()

    if TYPE_CHECKING:  # the variants have it: each from its rung

        def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor: ...

    def __new__(cls, inner: Method, start: Start = Gaussian()) -> Self:
        return object.__new__(on_rung(Centred, inner))  # type: ignore[return-value]

    def __post_init__(self) -> None:
        if not self.inner.takes_start:
            raise TypeError(
                f"{self.inner!r} has no start that could be chosen: Centred takes LoRA, LoRAN and their like; other "
                "wrappers go around it, as in Dropout(Centred(LoRA()))"
            )

    def init(self, site: Site) -> dict[str, Tensor]:
        f = self.inner.init(site, self.start)  # type: ignore[call-arg]
        if self.at_base():
            return f
        return {**f, **{f"{k}0": t.detach().clone() for k, t in f.items() if t.requires_grad}}

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        """Begun where f began: from another start, f's f0 would not lead to the base."""
        if self.at_base():
            return super().again(site, f)
        return {k: f[f"{k}0"].detach().clone().requires_grad_() if f"{k}0" in f else t for k, t in f.items()}

    def at_base(self) -> bool:
        """Whether dW(f0) = 0."""
        return self.start.at_base and self.inner.starts_at_base

    def bend(self, f: Factors) -> Bend | None:
        now, start = (self.inner.bend(g) for g in self.both(f))
        return now if now is None or start is None or self.at_base() else now.since(start)  # type: ignore[arg-type]

    def products(self, f: Factors) -> list[Product] | None:
        return self.inner.products(self.both(f)[0])

    def both(self, f: Factors) -> tuple[Factors, Factors]:
        """(the factors, the factors at the start).  Frozen ones are the same in both."""
        first = {k for k in f if k.endswith("0") and k[:-1] in f}
        return {k: t for k, t in f.items() if k not in first}, {k: f.get(f"{k}0", f[k]) for k in f if k not in first}


class _LowRankCentred(Centred, LowRank):
    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        if self.at_base():
            return self.inner.pair(f)  # type: ignore[attr-defined]
        (B, A), (B0, A0) = (self.inner.pair(g) for g in self.both(f))  # type: ignore[attr-defined]
        return torch.cat([B, -B0], 1), torch.cat([A, A0], 0)


class _AdditiveCentred(Centred, Additive):
    def delta(self, f: Factors) -> Tensor:
        if self.at_base():
            return self.inner.delta(f)  # type: ignore[attr-defined]
        now, start = (self.inner.delta(g) for g in self.both(f))  # type: ignore[attr-defined]
        return now - start

    def rows(self, f: Factors, some: slice) -> Tensor:
        if self.at_base():
            return self.inner.rows(f, some)  # type: ignore[attr-defined]
        now, start = (self.inner.rows(g, some) for g in self.both(f))  # type: ignore[attr-defined]
        return now - start
