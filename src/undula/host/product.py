"""Whether a layer, as a view of it has it (see `views`), multiplies by its weight: W x + b."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import reference
from . import quantised

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
STOCK = (nn.Linear.forward, nn.Embedding.forward, *(conv.forward for conv in CONVOLUTIONS))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def is_stock(layer: Any) -> bool:
    """Whether the class computes as torch's or transformers' own does."""
    stock = (None, *(conv._conv_forward for conv in CONVOLUTIONS))
    own = getattr(layer.cls, "_conv_forward", None) not in stock or layer.computes_weight
    return not own and (layer.call in STOCK or layer.call.__module__ == "transformers.pytorch_utils")


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Examples leave no trace: what a forward writes (an observer's range, running means) is put back, and the draws of
    random numbers are."""
    below = [
        (m, dict(m.__dict__), [(held, dict(held)) for held in (m._buffers, m._parameters)]) for m in module.modules()
    ]
    held = [
        t
        for m, own, _ in below
        for t in (*m._buffers.values(), *own.values())
        if isinstance(t, Tensor) and not t.is_meta
    ]
    before = [(t, t.detach().clone()) for t in held]
    device = next((t.device for t in module.parameters()), torch.device("cpu"))
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for m, own, dicts in below:
            for found, was in ((m.__dict__, own), *dicts):
                found.clear()
                found.update(was)
        for t, numbers in before:
            if not torch.equal(t, numbers):
                t.detach().copy_(numbers)


@torch.no_grad()
def multiplies(layer: Any) -> bool:
    """Whether layer(x) is W x + b, and W + M gives M x more, for small and large examples, in training too."""
    with _untouched(layer.module):
        return _looks_up_padding(layer) and _agrees(layer)


def _looks_up_padding(layer: Any) -> bool:
    """Whether an embedding with padding looks up row x for x, so that inputs tell where the padding is."""
    if not isinstance(layer.module, nn.Embedding) or layer.module.padding_idx is None:
        return True
    x = layer.example()
    M_KI = torch.zeros(1, layer.module.weight.shape[0], device="cpu").to(layer.module.weight)
    M_KI[0, 0] = 1
    try:
        return torch.equal(layer.through(x, M_KI)[:, 0] != 0, x == 0)
    except Exception:  # of a class that looks up something else
        return False


def _agrees(layer: Any) -> bool:
    W_OI = layer.weight
    eps = torch.finfo(W_OI.dtype).eps
    allowed = 32 * eps if W_OI.dtype in quantised.WIDE else 8 * eps
    bias = 0 if layer.bias is None else reference.channels(layer.bias, layer)
    w, m = torch.randn(2, W_OI.shape[0], 1, generator=generator(), device="cpu").to(W_OI)
    flat_OI, more_OI = w.expand(W_OI.shape), m.expand(W_OI.shape)  # matrices of no size
    ones_KI = m.new_ones(1, 1).expand(W_OI.shape[0] + 1, W_OI.shape[1])  # a gain for each output does not fit K rows
    try:
        for scale, training in ((1, False), (1000, False), (1, True)):
            for below in layer.module.modules():
                below.training = training
            x = layer.example()
            x = scale * x if x.is_floating_point() else x
            found, wanted = layer(x), reference.restore(layer.project(x, W_OI), layer) + bias
            both, first = (layer.through(x, M, layer.bias) for M in (flat_OI + more_OI, flat_OI))
            change, extra = both - first, reference.restore(layer.project(x, ones_KI)[..., :1] * m.T, layer)
            same = found.shape == wanted.shape and (found - wanted).norm() <= allowed * wanted.norm()
            adds = (change - extra).norm() <= allowed * both.norm().clamp(min=extra.norm())
            if not (same and adds):  # nor where one is NaN
                return False
    except Exception:  # of a class that asks for something else, or gives something else
        return False
    return True
