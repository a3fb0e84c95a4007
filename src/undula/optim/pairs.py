"""The pairs of factors that train: what an optimiser or a penalty must see together, found by the methods themselves.

pairs(adapter) -> [Pair(site, A, B, scale), ...],   dW = sum of scale B diag(gate) A + what is frozen
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import LowRank, Method


@dataclass(frozen=True, eq=False)
class Pair:
    """scale B diag(gate) A at a site: B (O, R) and A (R, I) are the live parameters themselves; gate (R), or None for
    1, is what an allocator or a method has between them."""

    site: str
    A: Tensor
    B: Tensor
    scale: float
    gate: Tensor | None = None

    @property
    def left(self) -> Tensor:
        """B diag(gate) (O, R): dW = scale left dA for a change of A."""
        return self.B if self.gate is None else self.B * self.gate

    @property
    def right(self) -> Tensor:
        """diag(gate) A (R, I): dW = scale dB right for a change of B."""
        return self.A if self.gate is None else self.gate[:, None] * self.A

    @property
    def trains(self) -> bool:
        """Whether both factors do."""
        return self.A.requires_grad and self.B.requires_grad


def pairs(adapter: Adapter) -> list[Pair]:
    """The pairs of all sites, in the adapter's order.  A site whose method adds several products (`Sum`) has several.

    Asked again after an allocator's or a restart's change it tells the factors, gates and scales of then.  Raises
    TypeError for a site whose update is no sum of products of factors of its own, ValueError where two pairs share a
    factor or none of a pair trains.
    """
    found = [pair for site, method in adapter.methods.items() for pair in _at(site, method, adapter)]
    owner: dict[int, str] = {}
    for pair in found:
        for name, t in (("A", pair.A), ("B", pair.B)):
            if (other := owner.setdefault(id(t), pair.site)) is not pair.site or pair.A is pair.B:
                raise ValueError(
                    f"{pair.site} and {other} share the factor {name}: its gradient is of both products together, and "
                    "no pair is to be had. Take an optimiser that needs none, such as AdamW"
                )
    return found


def _at(site: str, method: Method, adapter: Adapter) -> Iterator[Pair]:
    products = method.products(adapter.factors[site])
    if products is None:
        why = "it gives a pair, but computes it from other factors" if isinstance(method, LowRank) else "it has no pair"
        raise TypeError(
            f"{method!r} at {site} (rung {method.rung()}) is no product of two factors that train: {why}. LoRA and "
            "what is made of it (GatedLoRA, SoRA, AdaLoRA, Restarted, Centred, Dropout, DoRA, Sum of these) have "
            "pairs; for others take an optimiser that needs none, such as AdamW"
        )
    seen: set[int] = set()
    for n, (scale, B_OR, A_RI, gate) in enumerate(products):
        if not (A_RI.requires_grad or B_OR.requires_grad):
            continue
        if {id(A_RI), id(B_OR)} & seen:
            raise ValueError(f"two products at {site} share a factor: no pair of them is to be had. Take AdamW")
        seen |= {id(A_RI), id(B_OR)}
        yield Pair(site if len(products) == 1 else f"{site}#{n}", A_RI, B_OR, scale, gate)


Key = tuple[torch.Size, torch.Size, torch.dtype, torch.device, bool]


def alike(found: Iterable[Pair]) -> list[list[Pair]]:
    """The pairs in lists of equal shapes, types and devices, which can be stacked."""
    lists: dict[Key, list[Pair]] = {}
    for p in found:
        lists.setdefault((p.A.shape, p.B.shape, p.A.dtype, p.A.device, p.gate is None), []).append(p)
    return list(lists.values())


@dataclass(frozen=True)
class Stacked:
    """N pairs of equal shapes as tensors: left (N, O, R), right (N, R, I), scale (N, 1, 1)."""

    left: Tensor
    right: Tensor
    scale: Tensor

    @staticmethod
    def of(those: list[Pair]) -> Stacked:
        """Copies, without gradients, at least as wide as float32."""
        like = those[0].A
        dtype = torch.promote_types(like.dtype, torch.float32)
        scale = torch.tensor([p.scale for p in those], dtype=dtype, device=like.device)
        left = torch.stack([p.left.detach() for p in those]).to(dtype)
        return Stacked(left, torch.stack([p.right.detach() for p in those]).to(dtype), scale[:, None, None])
