"""Sum: w_1 dW_1 + w_2 dW_2 + ... of any Additive methods: what adapter arithmetic makes.

    W' = W + sum_i w_i delta_i(f_i)

Exact and lazy: the parts keep their factors (`0_A`, `0_B`, `1_A` ...).  Of LowRank parts the sum is LowRank, of rank
sum_i r_i: the factors stacked (as in FLoRA, Wang et al. 2024, arXiv:2409.05976).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ..core.method import (
    RUNGS,
    Additive,
    Factors,
    Layer,
    LowRank,
    Method,
    Product,
    Site,
)
from ..core.ranges import Finite
from ..core.wrapper import Wrapper, on_rung
from .lora import Fixed, LoRA


@dataclass(frozen=True, repr=False)
class Sum(Wrapper):
    """The weighted sum of `parts` (methods on the Additive rung)."""

    formula = "W' = W + sum_i w_i dW_i"
    parameters = "sum(parts)"

    parts: tuple[Method, ...]
    weights: tuple[Finite, ...]

    if TYPE_CHECKING:  # the variants have it: each from its rung

        def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor: ...

    def __new__(cls, parts: tuple[Method, ...], weights: tuple[float, ...]) -> Self:
        if not parts or len(parts) != len(weights):
            raise ValueError(f"a Sum needs one weight per part, found {len(parts)} parts, {len(weights)} weights")
        lowest = max(parts, key=lambda m: next(i for i, r in enumerate(RUNGS) if isinstance(m, r)))
        return object.__new__(on_rung(Sum, lowest))  # type: ignore[return-value]

    def init(self, site: Site) -> dict[str, Tensor]:
        return together(m.init(site) for m in self.parts)

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        return together(m.again(site, own) for _, m, own in self.terms(f))

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        return together(m.rebuilt(site) for m in self.parts)

    @property
    def drops(self) -> bool:
        return any(m.drops for m in self.parts)

    def products(self, f: Factors) -> list[Product] | None:
        parts = [(w, m.products(own)) for w, m, own in self.terms(f)]
        if any(found is None for _, found in parts):
            return None
        return [p._replace(scale=w * p.scale) for w, found in parts for p in found or ()]

    def check(self, site: Site, f: Factors) -> None:
        for _, method, own in self.terms(f):
            method.check(site, own)

    def terms(self, f: Factors) -> list[tuple[float, Method, Factors]]:
        """(weight, method, its own factors) of every part."""
        return list(zip(self.weights, self.parts, apart(f, len(self.parts)), strict=True))


def together(every: Iterable[Factors]) -> dict[str, Tensor]:
    """The factors of several parts as those of one method: `0_A`, `0_B`, `1_A` ..."""
    return {f"{i}_{k}": t for i, f in enumerate(every) for k, t in f.items()}


def apart(f: Factors, number: int) -> list[dict[str, Tensor]]:
    """The inverse: each part's own.  Other names are those of what is around the parts."""
    own: list[dict[str, Tensor]] = [{} for _ in range(number)]
    for key, t in f.items():
        i, _, name = key.partition("_")
        if i.isdecimal():
            own[int(i)][name] = t
    return own


class _LowRankSum(Sum, LowRank):
    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        pairs = [(w, m.pair(own)) for w, m, own in self.terms(f) if isinstance(m, LowRank)]
        return torch.cat([w * B for w, (B, _) in pairs], 1), torch.cat([A for _, (_, A) in pairs], 0)


class _AdditiveSum(Sum, Additive):
    def delta(self, f: Factors) -> Tensor:
        deltas = [w * m.delta(own) for w, m, own in self.terms(f) if isinstance(m, Additive)]
        return torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]

    def rows(self, f: Factors, some: slice) -> Tensor:
        parts = [w * m.rows(own, some) for w, m, own in self.terms(f) if isinstance(m, Additive)]
        return sum(parts[1:], parts[0])


def added(parts: list[tuple[float, Additive, Factors]], shape: tuple[int, int]) -> tuple[Method, Factors]:
    """The sum of weighted updates of one layer (O, I).  What is a sum already gives its parts; equal parts (the same
    method and tensors) are one; low-rank parts of more rank than the layer become one pair of the layer's rank."""
    flat: dict[tuple, tuple[float, Method, Factors]] = {}
    for w, method, f in parts:
        inner = [(w * v, m, own) for v, m, own in method.terms(f)] if isinstance(method, Sum) else [(w, method, f)]
        for v, m, own in inner:
            key = m, tuple((k, id(t)) for k, t in own.items())
            flat[key] = flat.get(key, (0.0,))[0] + v, m, own
    terms = list(flat.values())
    total = Sum(tuple(m for _, m, _ in terms), tuple(v for v, _, _ in terms))
    return _bounded(total, together(own for _, _, own in terms), shape)


def _bounded(total: Method, f: Factors, shape: tuple[int, int]) -> tuple[Method, Factors]:
    """The same update with no more rank than the layer has, dW as a pair of itself and the identity, in float32 or
    wider: where all parts are plain pairs of numbers, not of something that is still to be differentiated."""
    parts = getattr(total, "parts", ())
    plain = all(isinstance(m, LowRank) and m.plain() is not None for m in parts)
    if len(parts) < 2 or not plain or any(t.grad_fn is not None for t in f.values()):
        return total, f
    assert isinstance(total, LowRank)
    with torch.no_grad(), torch.autocast(next(iter(f.values())).device.type, enabled=False):
        wide = {k: t.to(torch.promote_types(t.dtype, torch.float32)) for k, t in f.items()}
        B_OR, A_RI = total.pair(wide)
        if B_OR.shape[1] <= min(shape):
            return total, f
        return as_pair(B_OR @ A_RI)


def as_pair(dW_OI: Tensor) -> tuple[LoRA, dict[str, Tensor]]:
    """A whole update as a low-rank one of the layer's own rank: itself and the identity."""
    O, I = dW_OI.shape
    r = min(O, I)
    one = torch.eye(r, dtype=dW_OI.dtype, device=dW_OI.device)
    pair = {"A": one, "B": dW_OI} if r == I else {"A": dW_OI, "B": one}
    return LoRA(r=r, alpha=1.0, scaling=Fixed(1.0)), {k: t.requires_grad_() for k, t in pair.items()}
