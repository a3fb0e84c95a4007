"""The rows of a batch that go through plain pairs of one form, in one product for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def flat(x: Tensor) -> Tensor:
    """Rows of any number of dimensions as (N, T, I)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


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
    """Adapters of one form that have `count` rows of a batch each: one product for all of them."""

    def __init__(self, form: Form, count: int):
        self.sites = {plain.path: plain for plain in form}
        self.count = count
        self.rows: list[int] = []
        self.adapters: list[Adapter] = []
        self._here: dict[str, tuple[list[Factors], Kept]] = {}

    def add(self, adapter: Adapter, rows: Sequence[int]) -> None:
        self.rows += rows
        self.adapters.append(adapter)

    def change(self, path: str, x_NTI: Tensor) -> Tensor:
        """What its adapters change of the layer's output at one site, of its rows in turn: (N, T, O)."""
        plain = self.sites[path]
        A_KRI, B_KOR = self._pairs(plain)
        x_KTI = x_NTI.to(A_KRI.dtype).reshape(len(A_KRI), -1, x_NTI.shape[2])
        z_KTR = torch.bmm(x_KTI, A_KRI.transpose(1, 2))
        return torch.bmm(z_KTR * plain.s, B_KOR.transpose(1, 2)).view(*x_NTI.shape[:2], B_KOR.shape[1])

    def _pairs(self, plain: Plain) -> tuple[Tensor, Tensor]:
        """(A (K, R, I), B (K, O, R)) of its adapters at one site."""
        if plain.path not in self._here:
            self._here[plain.path] = [a.factors[plain.path] for a in self.adapters], Kept()
        every, kept = self._here[plain.path]
        if len(every) == 1:
            return every[0][plain.A][None], every[0][plain.B][None]
        A, B = [f[plain.A] for f in every], [f[plain.B] for f in every]
        return kept.of(A + B, lambda: (torch.stack(A), torch.stack(B)))
