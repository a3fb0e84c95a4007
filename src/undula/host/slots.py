"""An adapted layer: a class of its own, and what hangs below it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Factors, Reweight
from . import masters, mounted
from .route import At, Routing
from .rowwise import Base
from .sharded import PARALLEL, is_sharded
from .views import Acts, LinearView, adapted
from .weights import Read


def never_called(*_: Any) -> None:
    """The hook of a module that nothing calls, see `Slot`."""


class Slot(nn.Module):
    """What hangs below an adapted layer: a method, the layer as a matrix, and the factors as parameters."""

    def __init__(self, host: Routing, path: str, method: Acts, layer: LinearView, factors: Factors):
        super().__init__()
        self.host, self.path, self.method, self.layer = host, path, method, layer
        self.last = 0  # the number of the route of its last forward, 0 outside of `rows`
        self.ran = False  # whether the model computed with it since, see `merging`
        layer.product  # noqa: B018 (examples go through the layer now, not within a forward)
        # the adapter's own dictionary: what replaces parameters here (FSDP2) replaces the adapter's
        self._parameters = factors  # type: ignore[assignment]
        # A slot is never called, but torch's TransformerEncoderLayer looks for hooks below it: where it finds one, it
        # calls its layers in evaluation too, and does not compute from their weights past the adapter.
        self.register_forward_hook(never_called)

    def named_parameters(self, *args: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Without frozen factors that are a shape or one number: `fully_shard` asks each module for what to cut, and
        cannot cut these.  They stay whole in each process; the model's own list has them."""
        every = super().named_parameters(*args, **named)
        return ((name, p) for name, p in every if p.requires_grad or (p.ndim and p.numel()))

    def fits(self, module: nn.Module | None) -> bool:
        """Whether this is still the slot for what stands at its site."""
        layer = self.layer
        if isinstance(layer, Read):
            return module is layer.owner
        if module is None:
            return False
        if self is module._modules.get("undula"):
            return module is layer.module
        return module is layer.module and type(module) is layer.cls and module.__dict__.get("forward") is layer.override

    def hangs(self, module: nn.Module | None) -> bool:
        """Whether it adapts this module now."""
        layer, below = self.layer, None if module is None else module._modules.get("undula")
        if isinstance(layer, Read):
            return module is layer.owner and below is not None and below._modules.get(layer.key) is self
        return module is layer.module and below is self

    def law(self) -> tuple[Reweight, Factors] | None:
        """Of a weight that is read: what makes it in this context; None for the base's."""
        route = self.host.route(self) if self.host.routed else None
        if route is not None:
            return route.law(self.path)  # type: ignore[return-value]
        return None if isinstance(self.method, Base) else (self.method, self._parameters)  # type: ignore[return-value]

    def __repr__(self) -> str:
        held = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self._parameters.items() if t is not None)
        return f"{self.method!r}: {held}" if held else repr(self.method)


class Adapted:
    """Mixed into the class of a layer while an adapter is selected."""

    undula: Slot
    original: type[nn.Module]

    def forward(self, *args: Any, **named: Any) -> Tensor:
        slot: Slot | None = self._modules.get("undula")  # type: ignore[attr-defined]
        if "_is_replica" in self.__dict__:
            raise RuntimeError(
                "nn.DataParallel copies an adapted model wrongly (its copies have no parameters): use one device "
                "(CUDA_VISIBLE_DEVICES=0), or DistributedDataParallel (torchrun)"
            )
        if slot is None:  # of a hook that was put over an adapted layer, which is none now
            return type(self).forward(self, *args, **named)
        layer = slot.layer
        if layer.override is not None and threading.get_ident() in layer.inside:  # of such a hook, within `layer`
            return layer.call(self, *args, **named)
        if not torch.compiler.is_compiling() and not slot.ran:
            slot.ran = True
        method = slot.method
        if slot.host.routed:
            route = slot.host.route(slot)
            method = method if route is None else At(route, slot.path)
        return adapted(method, layer, slot._parameters, args, named)  # type: ignore[arg-type]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Raises RuntimeError for a shard: `parallelize_module` knows how to cut a layer, and no method."""
        if is_sharded(param):
            raise RuntimeError(PARALLEL.format(self.undula.path))
        super().register_parameter(name, param)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, masters.parts(self.original), self.__getstate__()


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _adapted(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _classes:
        _classes[original] = type(f"Adapted{original.__name__}", (Adapted, original), {"original": original})
    return _classes[original]


def _revive(narrow: type[nn.Module], leaves: tuple[str, ...] = ()) -> nn.Module:
    cls = _adapted(masters.cast_class(narrow, leaves))
    return cls.__new__(cls)


def install(slot: Slot) -> None:
    """Adapts the slot's layer."""
    if isinstance(slot.layer, Read):
        mounted.mount(slot)
        return
    module = slot.layer.module
    module.__dict__.pop("forward", None)  # an accelerate hook: `slot.layer` holds and calls it
    object.__setattr__(module, "__class__", _adapted(type(module)))  # past the search of nn.Module's own
    module._modules["undula"] = slot
    if slot.training != module.training:
        slot.train(module.training)


def remove(slot: Slot) -> None:
    """Makes the slot's layer what it was."""
    if isinstance(slot.layer, Read):
        mounted.unmount(slot)
        return
    module = slot.layer.module
    del module._modules["undula"]
    object.__setattr__(module, "__class__", type(module).original)
    if slot.layer.override is not None:
        module.__dict__["forward"] = slot.layer.override
