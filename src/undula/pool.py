"""Adapters of one form on one model, their pairs stacked: what a mixed batch multiplies with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .method import Factors, LowRank
from .methods.dropout import bare

ALIGNED = 64  # bytes: where torch's own memory begins, so that a product of a view is the product of a copy

_address: Callable[[Tensor], int] = Tensor.data_ptr


@dataclass(frozen=True)
class Plain:
    """A pair (s B, A) of two factors of their own at one site, in words that compare."""

    path: str
    s: float
    B: str
    A: str
    shapes: tuple[torch.Size, torch.Size]
    dtype: torch.dtype
    device: torch.device
    drops: bool  # whether dropout acts on it while it trains


Form = tuple[Plain, ...]


def form(adapter: Adapter) -> Form:
    """The sites at which the adapter is a plain pair that no other site shares; adapters of equal forms go together."""
    counts: dict[int, int] = {}
    for _, _, t in adapter.tensors():
        counts[id(t)] = counts.get(id(t), 0) + 1
    found = []
    for path, method in adapter.methods.items():
        named = method.plain() if isinstance(method, LowRank) else None
        if named is None:
            continue
        s, b, a = named
        B, A = adapter.factors[path][b], adapter.factors[path][a]
        own = all(type(t) is nn.Parameter and not t.is_meta and counts[id(t)] == 1 for t in (B, A))
        if own and (B.dtype, B.device) == (A.dtype, A.device) and B.is_contiguous() and A.is_contiguous():
            drops = bare(method) is not method
            found.append(Plain(path, s, b, a, (B.shape, A.shape), A.dtype, A.device, drops))
    return tuple(found)


class Stack:
    """K tensors of one shape in one memory; each begins where memory of its own would (`ALIGNED`)."""

    def __init__(self, like: Tensor):
        self.shape, self.size = like.shape, like.numel()
        step = ALIGNED // like.element_size()
        self.flat = like.detach().new_empty(0, -(-self.size // step) * step)

    def grown(self, count: int) -> Tensor:
        """Memory for `count` tensors."""
        return self.flat.new_zeros(count, self.flat.shape[1])

    def row(self, flat: Tensor, k: int) -> Tensor:
        return flat[k, : self.size].view(self.shape)

    def rows(self, at: slice | Tensor) -> Tensor:
        """Some of them (K, *shape): a view where `at` is a slice."""
        chosen = self.flat[at] if isinstance(at, slice) else self.flat.index_select(0, at)
        return chosen[:, : self.size].view(-1, *self.shape)


class Pool:
    """What is stacked are the adapters' own parameters: each is a view of the stack, so that no batch copies them and
    nothing that changes them (an optimiser, a hand) is missed.  `holds` tells whether that is still so."""

    def __init__(self, form: Form, first: Adapter):
        self.sites = {plain.path: plain for plain in form}
        self.A = {p.path: Stack(first.factors[p.path][p.A]) for p in form}
        self.B = {p.path: Stack(first.factors[p.path][p.B]) for p in form}
        self.room = 0
        self.held: dict[int, tuple[list[nn.Parameter], list[int]]] = {}  # {row: (parameters, where they must lie)}
        self.free: list[int] = []

    def admit(self, adapter: Adapter) -> int:
        """Moves the pairs of an adapter of this form into the stacks; returns its row."""
        if not self.free:
            self._grow()
        row = self.free.pop()
        pairs = self._pairs(adapter.factors)
        for stack, p in pairs:
            place = stack.row(stack.flat, row)
            p.data = place.copy_(p.data)
        every = [p for _, p in pairs]
        self.held[row] = every, list(map(_address, every))
        return row

    def holds(self, row: int) -> bool:
        """Whether the parameters of a row are where they were put: `model.to`, `p.data = ...` move them elsewhere."""
        every, addresses = self.held[row]
        return list(map(_address, every)) == addresses

    def release(self, row: int) -> None:
        """Gives the parameters of a row memory of their own again."""
        every, addresses = self.held.pop(row)
        for p, address in zip(every, addresses, strict=True):
            if p.data_ptr() == address:
                p.data = p.data.clone()
        self.free.append(row)

    def _pairs(self, factors: Mapping[str, Factors]) -> list[tuple[Stack, Any]]:
        return [
            pair
            for path, plain in self.sites.items()
            for pair in ((self.A[path], factors[path][plain.A]), (self.B[path], factors[path][plain.B]))
        ]

    def _grow(self) -> None:
        before, self.room = self.room, max(1, self.room + (self.room + 1) // 2)
        stacks = [stack for path in self.sites for stack in (self.A[path], self.B[path])]
        for i, stack in enumerate(stacks):
            flat = stack.grown(self.room)
            flat[:before] = stack.flat
            for row, (every, addresses) in self.held.items():
                if every[i].data_ptr() == addresses[i]:
                    every[i].data = stack.row(flat, row)
                addresses[i] = stack.row(flat, row).data_ptr()
            stack.flat = flat
        self.free += range(self.room - 1, before - 1, -1)


class Pools:
    """The pools of one model.  A copy begins with none: copied parameters lie elsewhere."""

    def __init__(self) -> None:
        self.pools: dict[Form, Pool] = {}
        self.at: dict[str, tuple[Pool, int]] = {}  # {adapter: its row}

    def __reduce__(self) -> tuple[Any, ...]:
        return Pools, ()

    def of(self, name: str, adapter: Adapter) -> tuple[Pool, int] | None:
        """The pool and the row of an adapter; None for one that has no plain pair."""
        if name in self.at and self.at[name][0].holds(self.at[name][1]):
            return self.at[name]
        self.forget(name)
        key = form(adapter)
        if not key:
            return None
        pool = self.pools.setdefault(key, Pool(key, adapter))
        self.at[name] = pool, pool.admit(adapter)
        return self.at[name]

    def forget(self, name: str) -> None:
        """Lets an adapter go, with memory of its own."""
        if name not in self.at:
            return
        pool, row = self.at.pop(name)
        pool.release(row)
        if not pool.held:
            self.pools = {key: p for key, p in self.pools.items() if p is not pool}
