"""Private copies of weights for frozen adapters that share no product with others.

A law such as LoRAN's makes its change of W (O x I numbers, each with a sine) anew in every forward, which pays while it
trains, as the change is never kept.  Decoding one token costs the same pass over W, many times the product that it is
for: 2 O I T flops for T tokens.  With a copy of the adapted weight W' in memory, the rows of the adapter take one
product with it, whatever made it.  A copy is as large as the layers that it is of: worth it for the few adapters that
most tokens go through (systems such as dLoRA, Wu et al. OSDI 2024, merge one of them into the base for all).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.method import Factors, Method, Reweight
from ..kernels import reference
from .host import layers_now
from .shelf import Held, marked
from .state import find
from .tables import Mark
from .views import LinearView


@dataclass(frozen=True)
class Copied:
    """In the place of a method: the weight that it made of the layer's."""

    W_OI: Tensor
    mark: Mark  # of the weight that it was made of
    bottleneck = False
    drops = False

    def forward(self, x: Tensor, layer: LinearView, f: Factors) -> Tensor:
        return reference.reweighted(x, layer, self.W_OI)


def copy_size(model: nn.Module, name: str) -> int:
    """The bytes that `keep_copy` would take; 0 of an adapter for which there is nothing to gain."""
    held = _held(model, name)
    return sum(layer.weight.numel() * layer.weight.element_size() for _, _, layer in _sites(model, held))


@torch.no_grad()
def keep_copy(model: nn.Module, name: str) -> None:
    """Keeps the adapted weights of a frozen adapter's sites that share no product with others, for `rows`; see
    `copy_size`.  They count until `drop_copy`, or until the adapter is detached."""
    held = _held(model, name)
    held.copies = {path: _copied(method, layer, held.factors[path]) for path, method, layer in _sites(model, held)}


def drop_copy(model: nn.Module, name: str) -> None:
    """Forgets them; the adapter computes as before."""
    _held(model, name).copies = {}


def renew(held: Held, model: nn.Module) -> None:
    """Makes anew the copies of weights that were written into since."""
    layers = layers_now(model, held.copies)
    for path, layer in layers.items():
        if held.copies[path].mark != marked(layer):
            held.copies[path] = _copied(held.methods[path], layer, held.factors[path])


def _copied(method: Method, layer: LinearView, f: Factors) -> Copied:
    assert isinstance(method, Reweight)
    with torch.no_grad():
        return Copied(method.weight(layer.weight, f), marked(layer))


def _held(model: nn.Module, name: str) -> Held:
    adapter = find(model, name)[1]
    if not isinstance(adapter, Held):
        raise ValueError(f"{name!r} trains, or may: copies of weights are for adapters attached with frozen=True")
    return adapter


def _sites(model: nn.Module, held: Held) -> Iterator[tuple[str, Method, LinearView]]:
    """The sites of an adapter that lie on no shelf, where it makes a weight and the layer is a product with it."""
    loose = [path for path in held.factors if path not in held.spots]
    for path, layer in layers_now(model, loose).items():
        method = held.methods[path]
        if isinstance(method, Reweight) and layer.channel == -1 and layer.product and layer.reader is None:
            yield path, method, layer
