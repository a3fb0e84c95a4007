"""The laws as written on paper.  Every fast kernel is tested against these."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.layer import Layer


def channels(v_O: Tensor, layer: Layer) -> Tensor:
    """A vector with one entry per output channel, shaped to broadcast over the layer's output."""
    return v_O.reshape(-1, *(1,) * (-layer.channel - 1))


def restore(y_TO: Tensor, layer: Layer) -> Tensor:
    """Channels-last values in the layout of the layer's output."""
    return y_TO if layer.channel == -1 else y_TO.movedim(-1, layer.channel)


def project(x: Tensor, layer: Layer, M_KI: Tensor) -> Tensor:
    """M in place of the layer's matrix, channels last, computed in M's type (x may be indices: an embedding)."""
    return layer.project(x.to(M_KI.dtype) if x.is_floating_point() else x, M_KI)


def added(y: Tensor, change: Tensor) -> Tensor:
    """y + change, summed in the wider of the two types and rounded once to y's."""
    return (y + change).to(y.dtype)


def reweighted(x: Tensor, layer: Layer, W_OI: Tensor) -> Tensor:
    """y = W x + b for a new weight W."""
    y = restore(project(x, layer, W_OI), layer)
    if layer.bias is not None:
        y = y + channels(layer.bias, layer)
    return y.to(x.dtype) if x.is_floating_point() else y


def additive(x: Tensor, layer: Layer, delta_OI: Tensor) -> Tensor:
    """y = layer(x) + dW x."""
    return added(layer(x), restore(project(x, layer, delta_OI), layer))


def bottleneck(x: Tensor, layer: Layer, A_RI: Tensor, bend, B_OR: Tensor) -> Tensor:
    """y = layer(x) + B bend(A x); `bend` maps (..., R) to (..., R)."""
    return added(layer(x), restore(F.linear(bend(project(x, layer, A_RI)), B_OR), layer))


def columns(x: Tensor, layer: Layer, S_OK: Tensor, index_K: Tensor) -> Tensor:
    """y = layer(x) + S x[index]: an update of columns `index` of W."""
    return added(layer(x), F.linear(x.index_select(-1, index_K).to(S_OK.dtype), S_OK))


def rows(x: Tensor, layer: Layer, S_KI: Tensor, index_K: Tensor) -> Tensor:
    """y = layer(x), and S x added at `index`: an update of rows `index` of W."""
    y, change = layer(x), F.linear(x.to(S_KI.dtype), S_KI)
    return added(y, torch.zeros_like(y, dtype=change.dtype).index_add(-1, index_K, change))
