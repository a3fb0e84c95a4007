"""Changing the adapter in merged weights by overwriting entries: no matrix product, and nothing accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Additive, Factors, Method
from . import quantised
from .matrices import layers_at
from .views import LinearView, check_writable
from .where import inner


@runtime_checkable
class Sparse(Protocol):
    """A method that changes few entries of W and can name them."""

    def entries(self, f: Factors) -> tuple[Tensor, Tensor]:
        """(flat indices into W (O, I), what is added there)."""


@dataclass(frozen=True)
class Written:
    """Entries of the matrix of one site, at `at`, with the numbers that the base has there."""

    site: str
    W_OI: Tensor
    at: tuple[Tensor, Tensor]
    base: Tensor


class Switch:
    """Writes adapters into the weights of a plain `model`, one at a time.

        switch = Switch(model)
        switch(french)  # W there + its entries, as `merge` would store them
        switch(german)  # french's entries are overwritten with the base's, then german's written
        switch(None)  # the base, bit for bit

    The base's numbers are kept at the entries that are written, so the way back is exact in every dtype and French
    after German is French to the bit.  Methods that name their entries (SHiRA, S2FT) cost as many reads and writes; any
    other Additive one costs its dense update and a copy of what it changes.  Not while another thread computes.
    """

    def __init__(self, model: nn.Module):
        model = inner(model)
        if "_undula" in model.__dict__:
            raise RuntimeError("adapters are attached to this model: detach them, Switch writes into a plain model")
        self.model = model
        self.written: list[Written] = []

    @torch.no_grad()
    def __call__(self, adapter: Adapter | None) -> None:
        """Makes the weights those of the base with `adapter`.  Raises before anything is changed."""
        self._check_memory()
        new = [] if adapter is None else self._entries(adapter)
        for old in self.written:
            old.W_OI[old.at] = old.base
        self.written = []
        for site, W_OI, at, change in new:
            base = W_OI[at]
            W_OI[at] = (base + change).to(W_OI.dtype)
            self.written.append(Written(site, W_OI, at, base))

    def _check_memory(self) -> None:
        """Raises RuntimeError where the model no longer computes with the memory that was written into."""
        matrices = self._matrices([old.site for old in self.written])
        for old in self.written:
            now = matrices[old.site]
            if (now.data_ptr(), now.dtype, now.device) != (old.W_OI.data_ptr(), old.W_OI.dtype, old.W_OI.device):
                raise RuntimeError(
                    f"the weight of {old.site} lies elsewhere since an adapter was written there (the model was moved "
                    "or changed its type): the base's numbers cannot be put back there. Call switch(None) before "
                    "`model.to`; now load the base anew"
                )

    def _entries(self, adapter: Adapter) -> list[tuple[str, Tensor, tuple[Tensor, Tensor], Tensor]]:
        """(site, W, where, what is added) of every site."""
        if adapter.full:
            raise ValueError(f"the adapter holds {', '.join(adapter.full)} in full; Switch writes updates of layers")
        found = []
        matrices = self._matrices(list(adapter.methods))
        for site, method in adapter.methods.items():
            W_OI = matrices[site]
            if W_OI.shape != adapter.shapes[site]:
                raise ValueError(f"{site} is {tuple(W_OI.shape)} in this model, {adapter.shapes[site]} in the adapter")
            index, change = entries(method, adapter.factors[site], site)
            index, change, I = index.to(W_OI.device), change.detach().to(W_OI.device), W_OI.shape[1]
            found.append((site, W_OI, (index // I, index % I), change))
        return found

    def _matrices(self, sites: list[str]) -> dict[str, Tensor]:
        """The matrices of sites as views of the memory that the model computes with."""
        layers = layers_at(self.model, sites)
        for site in sites:
            if site not in layers:
                raise LookupError(f"the adapter has a site that this model has not: {site}")
        return {site: own(layer, self.model, site) for site, layer in layers.items()}


def own(layer: LinearView, model: nn.Module, site: str) -> Tensor:
    """W (O, I) sharing the module's memory.  Raises where it cannot, or where other modules would change too."""
    check_writable(site, layer)
    weight = layer.module.weight
    if not quantised.is_plain(weight) or layer.weight.data_ptr() != weight.data_ptr():
        return _refuse(site, f"{type(layer.module).__name__} with a {type(weight).__name__} of {weight.dtype}")
    held = layer.module._parameters["weight"]
    owners = [n for n, m in model.named_modules() if any(p is held for p in m._parameters.values())]
    if len(owners) > 1:
        raise ValueError(f"{' and '.join(owners)} share one weight: written for {site}, it would change for all")
    return layer.weight.detach()


def entries(method: Method, f: Factors, site: str) -> tuple[Tensor, Tensor]:
    """(flat indices, what is added to W there) of an update.  Raises TypeError where there is none."""
    if isinstance(method, Sparse):
        return method.entries(f)
    if not isinstance(method, Additive):
        raise TypeError(
            f"{method!r} at {site} stands on the rung {method.rung()}: it has no update that can be written"
        )
    change = method.delta(f).flatten()
    index = change.nonzero()[:, 0]
    return index, change[index]


def _refuse(site: str, what: str) -> Tensor:
    raise TypeError(f"entries of {site} cannot be overwritten: it is a {what}. Merge the adapter instead")
