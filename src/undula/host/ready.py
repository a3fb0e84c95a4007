"""Adapters that serve, made ready beside the computation: what is left to do on the model is to copy numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..core.adapter import Adapter
from . import quantised
from .fitting import narrowed
from .frame import Frame
from .host import check_free, deselect, forget
from .shelf import Held, lying, placed
from .state import Host, changing
from .tables import Placing
from .views import LinearView
from .where import inner


@dataclass(frozen=True)
class Ready:
    """An adapter with tensors of its own, checked against a model, and what of it goes into the tables there."""

    adapter: Adapter
    layers: Mapping[str, LinearView]
    placing: Mapping[str, Placing]

    @property
    def nbytes(self) -> int:
        """What it takes on the model."""
        there = lying(self.placing)
        beside = {id(t): t.nbytes for site, name, t in self.adapter.tensors() if (site, name) not in there}
        parts = [t for p in self.placing.values() for t in p.parts.values()]
        return sum(t.nbytes for t in parts) + sum(beside.values())


@torch.no_grad()
def ready(frame: Frame, adapter: Adapter, dtype: torch.dtype | None = None) -> Ready:
    """What `attach(model, adapter, dtype=dtype, frozen=True)` checks and computes, of a frame's model; any thread may
    call it.  Raises ValueError or TypeError for an adapter that does not fit, and for parameters in full."""
    if adapter.full:
        raise ValueError(
            f"an adapter that is made ready holds nothing in full, found {', '.join(list(adapter.full)[:3])}"
        )
    made = narrowed(frame.fitted(adapter), dtype)
    layers = {path: frame.layers[path] for path in made.factors}
    return Ready(made, layers, placed(made, layers))


def put(model: nn.Module, made: Ready, name: str, reserve: int = 0) -> None:
    """Attaches what was made ready, which is used up; for `reserve` see `Shelf`.  Raises ValueError for a name that is
    taken, RuntimeError within `rows` and for a merged adapter."""
    model = inner(model)
    host = model.__dict__.setdefault("_undula", Host())
    try:
        with torch.inference_mode(False), torch.no_grad(), changing(host, "attach"):
            check_free(host, name)
            held = Held.on(made.adapter, made.layers, host.shelves, made.placing, reserve)
            if not host.adapters:
                host.trainable_before = [p for p in model.parameters() if p.requires_grad]
                model.requires_grad_(False)
                quantised.keep_gradients(model)
            host.adapters[name], held.attached, held.pooled = held, True, True
    finally:
        forget(model, host)


def take(model: nn.Module, name: str) -> None:
    """Detaches one of these; what it was is lost."""
    host: Host = inner(model).__dict__["_undula"]
    with torch.inference_mode(False), torch.no_grad(), changing(host, "detach"):
        held = host.adapters[name]
        if not isinstance(held, Held) or not held.pooled:
            raise ValueError(f"{name!r} was not made ready and put there: use undula.detach")
        if host.selected == name:
            deselect(model)
        held.leave(host.shelves)
        held.attached = False
        del host.adapters[name]
        host.forms.pop(name, None)
        if not host.adapters:
            for p in host.trainable_before:
                p.requires_grad_(True)
            host.trainable_before = []
    forget(inner(model), host)
