"""Gradients of each row at the host's layers, from what goes in and what comes back there.

Let row n of a batch have the inputs x_n (T, I) at a layer and the gradients g_n (T, O) of its own loss to the layer's
outputs.  The gradient of the row's loss to a factor is the layer's law pulled back from g_n at x_n:

    any law          the vector-Jacobian product of `Method.forward`, row by row under `torch.func.vmap`
    W' = W + B A     dB_n = g_n' (x_n A'),  dA_n = (g_n B)' x_n,  pulled back through `LowRank.pair`

The first needs nothing of a law; the second never computes the frozen product again.  What a dropout has let fall in
the forward pass falls here too.  N = rows, T = positions of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.method import Factors, LowRank, Method
from ...host.views import LinearView
from ...kernels import draws
from ...kernels.autocast import exact
from ...methods.dropout import Dropout

HELD = 1 << 26  # numbers of rows' dense updates at a time


class Drawn:
    """A source of dropout that keeps its masks."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    def drop(self, x: Tensor, p: float) -> Tensor:
        self.masks.append(F.dropout(torch.ones_like(x), p))
        return x * self.masks[-1]

    def among(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Again(Drawn):
    """One that drops what another has."""

    def __init__(self, masks: Sequence[Tensor]) -> None:
        self.left: Iterator[Tensor] = iter(masks)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x * next(self.left)


Law = Callable[[Method, LinearView, Tensor, Tensor, Factors, list[Tensor]], dict[str, Tensor]]


def pulled(
    method: Method, layer: LinearView, x: Tensor, g: Tensor, f: Factors, masks: list[Tensor]
) -> dict[str, Tensor]:
    """{factor: gradients of each row (N, *its shape)} of y = forward(x, layer, f), g = dL/dy, of what trains."""
    trained = {name: t.detach() for name, t in f.items() if t.requires_grad}
    still = {name: t.detach() for name, t in f.items() if not t.requires_grad}

    def of_row(x_1: Tensor, g_1: Tensor, *row_masks: Tensor) -> dict[str, Tensor]:
        def law(own: dict[str, Tensor]) -> Tensor:
            with draws.drawing(Again([mask[None] for mask in row_masks])):
                return method.forward(x_1[None], layer, {**still, **own})

        return torch.func.vjp(law, trained)[1](g_1[None])[0]

    O, I = layer.weight.shape
    size = None if method.bottleneck else max(1, HELD // (O * I))
    with exact(x.device):
        return torch.func.vmap(of_row, chunk_size=size)(x, g, *masks)


def multiplied(
    method: Method, layer: LinearView, x: Tensor, g: Tensor, f: Factors, masks: list[Tensor]
) -> dict[str, Tensor]:
    """The same; of a pair of factors at a linear layer as products."""
    inner = method.inner if type(method).public() is Dropout else method  # type: ignore[attr-defined]
    pair = isinstance(inner, LowRank) and type(inner).forward is LowRank.forward
    if not pair or layer.channel != -1 or not x.is_floating_point():
        return pulled(method, layer, x, g, f, masks)
    assert isinstance(inner, LowRank)
    trained = {name: t.detach() for name, t in f.items() if t.requires_grad}
    still = {name: t.detach() for name, t in f.items() if not t.requires_grad}
    pair_of = inner.pair
    with exact(x.device):
        found: Any = torch.func.vjp(lambda own: pair_of({**still, **own}), trained)
        (B_OR, A_RI), back = found
        for mask in masks:
            x = x * mask
        x_NTI, g_NTO = (t.flatten(1, -2) if t.ndim > 2 else t[:, None] for t in (x.to(A_RI.dtype), g.to(B_OR.dtype)))
        dB_NOR = g_NTO.mT @ (x_NTI @ A_RI.T)
        dA_NRI = (g_NTO @ B_OR).mT @ x_NTI
        return torch.func.vmap(lambda dB, dA: back((dB, dA))[0])(dB_NOR, dA_NRI)


class Heard:
    """In the place of a layer's method: computes as that does, and tells what went in and what comes back."""

    def __init__(self, method: Method, told: Callable[..., Any]):
        self.method, self.told = method, told

    def forward(self, x: Tensor, layer: LinearView, f: Factors) -> Tensor:
        source = Drawn()
        with draws.drawing(source):
            y = self.method.forward(x, layer, f)
        return self.told(self.method, x, y, layer, f, source.masks)
