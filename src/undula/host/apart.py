"""Layers at which PEFT's plain LoRA computes something else than W + dW.

Its layers use a pair in their own way (`peft.tuners.lora.layer`, 0.21.2).  `A` of a convolution is another one of the
same class, with the layer's kernel, stride and padding, and nothing else of it; `B` one of size 1.  `A` of an embedding
is looked up as the layer's own table is, times `embed_scale` where the layer has one.  What a layer is called with
beside x goes to the base alone.  A module that stands at several places is adapted at the first of them alone.  So live
and merged differ in PEFT itself where a layer has more, and what was trained there is not what undula computes, nor the
other way round.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import quantised
from .product import CONVOLUTIONS, STOCK
from .views import ConvView, EmbeddingView, LinearView

THEIRS = "trained as PEFT's LoRA"  # in `Adapter.apart`, of factors that a LoRA of PEFT's had


def unlike(layer: LinearView) -> str | None:
    """What PEFT's LoRA would not follow at this layer, in words; None where it computes W + dW."""
    module = layer.module
    stock: type[nn.Module]
    theirs: Callable[[LinearView, Tensor], tuple[Tensor, Tensor]]
    if layer.reader is not None or layer.also:
        return (
            f"a weight that {layer.reader} reads"
            if layer.reader
            else f"one layer at several places ({', '.join(layer.also)} too)"
        )
    takes_more = layer.call not in STOCK and len(inspect.signature(layer.call).parameters) > 2
    if takes_more or not layer.product:
        how = "whose forward takes more than x" if takes_more else "which has a forward of its own"
        return f"a {type(module).__name__}, {how}"
    if isinstance(layer, ConvView):
        wide = [k > 1 for k in module.kernel_size]
        if any(d != 1 and w for d, w in zip(module.dilation, wide, strict=True)):
            return f"a convolution with dilation={tuple(module.dilation)}"
        if module.padding_mode != "zeros" and _pads(module, wide):
            return f"a convolution with padding_mode={module.padding_mode!r}"
        stock, theirs = next(c for c in CONVOLUTIONS if isinstance(module, c)), _convolved
    elif isinstance(layer, EmbeddingView):
        stock, theirs = nn.Embedding, _looked_up
    else:
        return None
    own = layer.call is not stock.forward and _differ(layer, theirs)
    return f"a {type(module).__name__}, which has a forward of its own" if own else None


def _pads(conv: Any, wide: list[bool]) -> bool:
    return any(wide) if conv.padding == "same" else conv.padding != "valid" and any(conv.padding)


def _differ(layer: LinearView, theirs: Callable[[LinearView, Tensor], tuple[Tensor, Tensor]]) -> bool:
    """Whether they do on a trial; False where PEFT could not make such a layer, which it says itself."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ours, other = theirs(layer, layer.example())
    except Exception:  # a class that is made otherwise, or asks for more than a layer's input
        return False
    near = 1e-3 if layer.module.weight.dtype in quantised.WIDE else 0.1
    return ours.shape != other.shape or not bool((ours - other).norm() <= near * other.norm())


def _convolved(layer: LinearView, x: Tensor) -> tuple[Tensor, Tensor]:
    conv = layer.module
    A = type(conv)(conv.in_channels, 1, conv.kernel_size, conv.stride, conv.padding, bias=False).to(conv.weight)
    B = type(conv)(1, conv.out_channels, 1, bias=False).to(conv.weight)
    return layer.project(x, A.weight.flatten(1)) @ B.weight.flatten(1).T, B(A(x)).movedim(layer.channel, -1)


def _looked_up(layer: LinearView, x: Tensor) -> tuple[Tensor, Tensor]:
    table = layer.module
    A = torch.randn(1, table.num_embeddings, device="cpu").to(table.weight)
    scale = torch.as_tensor(getattr(table, "embed_scale", 1.0), device="cpu")
    return layer.project(x, A), F.embedding(x, A.T) * (scale.to(A) if scale.numel() == 1 else 1.0)


def apart(layers: Mapping[str, LinearView]) -> dict[str, str]:
    """What `Adapter.apart` says of an adapter that computes at these layers."""
    return {path: why for path, layer in layers.items() if (why := unlike(layer)) is not None}


def check_theirs(path: str, why: str | None, said: str | None) -> None:
    """Raises ValueError where factors that PEFT's LoRA had come to a layer at which PEFT computes otherwise."""
    if why is not None and said == THEIRS:
        raise ValueError(
            f"{path} is {why}. PEFT's LoRA does not follow that while it is live, so the adapter was trained as a "
            "function that neither undula nor PEFT's own merge computes. To use it as PEFT merges it, W + s B A, drop "
            "the mark: dataclasses.replace(adapter, apart={}); else train it again with undula"
        )
