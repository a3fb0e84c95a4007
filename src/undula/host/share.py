"""The rows of a batch that go through plain pairs of one form, in one product for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Factors, LowRank
from ..kernels import reference


class Kept:
    """What was made of some tensors, for as long as they stay: without gradients, for the next forward of a batch.  A
    tensor that is another one, lies elsewhere or was written into by an operation that counts is seen; writing into
    `t.data` leaves no trace in torch."""

    def __init__(self) -> None:
        self.marks: tuple | None = None
        self.made: Any = None

    def of(self, tensors: list[Tensor], make: Callable[[], Any]) -> Any:
        if torch.is_grad_enabled() or any(map(Tensor.is_inference, tensors)):
            return make()
        now = (
            list(map(id, tensors)),
            list(map(Tensor.data_ptr, tensors)),
            [t._version for t in tensors],
        )
        if self.marks != now:
            self.marks, self.made = now, make()
        return self.made


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of any number of dimensions as (N, T, I)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).to(dtype)


def changed(y: Tensor, change: Tensor, order: Tensor | None) -> Tensor:
    """y with `change` (N, T, O) added to the rows `order`, or to all of them, in the wider type and rounded once."""
    change = change.view(change.shape[0], *y.shape[1:])
    if order is None:
        return reference.added(y, change) if torch.is_grad_enabled() else y.add_(change)
    if change.dtype == y.dtype:
        return y.index_add(0, order, change) if torch.is_grad_enabled() else y.index_add_(0, order, change)
    return y.index_copy(0, order, reference.added(y[order], change))


@dataclass(frozen=True)
class Plain:
    """A pair (s f[B], f[A]) of one site in words that compare."""

    path: str
    s: float
    B: str
    A: str
    shapes: tuple[torch.Size, torch.Size]
    drops: bool  # whether dropout acts on it while it trains


Form = tuple[Plain, ...]


def form(adapter: Adapter) -> Form:
    """The sites at which the adapter is a plain pair; adapters of equal forms go through one product each time."""
    found = []
    for path, method in adapter.methods.items():
        named = method.plain() if isinstance(method, LowRank) else None
        if named is not None:
            s, B, A = named
            f = adapter.factors[path]
            found.append(Plain(path, s, B, A, (f[B].shape, f[A].shape), method.drops))
    return tuple(found)


class Share:
    """The rows of a batch that go through adapters of one form, sorted by adapter."""

    def __init__(self, form: Form, count: int):
        self.sites = {plain.path: plain for plain in form}
        self.count = count
        self.order: list[int] = []
        self.counts: list[int] = []
        self.adapters: list[Adapter] = []
        self._there: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}
        self._here: dict[str, tuple[list[Factors], Kept]] = {}

    def add(self, adapter: Adapter, rows: list[int]) -> None:
        self.order += rows
        self.counts.append(len(rows))
        self.adapters.append(adapter)

    def settle(self) -> None:
        """What all layers will read: how the rows lie, and of which adapters' pairs a product is made."""
        self.equal = len(set(self.counts)) == 1
        self.each = not self.equal and len(self.order) <= 2 * len(self.counts)  # mostly rows of their own: a pair each
        self.moved = self.order != list(range(self.count))

    def taken(self) -> list[int] | None:
        """The place in the stacks of each pair of the product; None: all of them in turn."""
        return [k for k, n in enumerate(self.counts) for _ in range(n)] if self.each else None

    def positions(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """(rows of the batch, what is `taken`) on a device; None for all of them in turn."""
        if device not in self._there:
            with torch.inference_mode(False):  # a later forward of the batch may want gradients
                order, taken = self.order if self.moved else None, self.taken()
                found = [None if index is None else torch.tensor(index, device=device) for index in (order, taken)]
                self._there[device] = found[0], found[1]
        return self._there[device]

    def pairs(self, plain: Plain, taken: Tensor | None) -> tuple[Tensor, Tensor]:
        """(A (K, R, I), B (K, O, R)) of the product at one site."""
        if plain.path not in self._here:
            self._here[plain.path] = [a.factors[plain.path] for a in self.adapters], Kept()
        every, kept = self._here[plain.path]
        A, B = [f[plain.A] for f in every], [f[plain.B] for f in every]
        return kept.of(A + B, lambda: chosen((torch.stack(A), torch.stack(B)), taken))

    def change(self, path: str, x: Tensor) -> Tensor:
        """s B A x of these rows at one site, (N, T, O)."""
        plain, (order, taken) = self.sites[path], self.positions(x.device)
        A_KRI, B_KOR = self.pairs(plain, taken)
        mine = flat(x if order is None else x[order], A_KRI.dtype)
        if self.equal or self.each:
            z_KTR = torch.bmm(mine.reshape(len(A_KRI), -1, mine.shape[2]), A_KRI.transpose(1, 2))
            return torch.bmm(z_KTR * plain.s, B_KOR.transpose(1, 2)).view(*mine.shape[:2], B_KOR.shape[1])
        parts = zip(mine.split(self.counts), A_KRI.unbind(), B_KOR.unbind(), strict=True)
        return torch.cat([p @ A.t() * plain.s @ B.t() for p, A, B in parts])


def chosen(stacks: tuple[Tensor, Tensor], taken: Tensor | None) -> tuple[Tensor, Tensor]:
    return stacks if taken is None else (stacks[0][taken], stacks[1][taken])
