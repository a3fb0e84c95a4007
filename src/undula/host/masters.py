"""Wide copies of parameters that train in full over a base of a narrow type (Micikevicius et al. 2018, section 3.1).

An optimiser's step of 1e-4 on a bfloat16 weight of 0.05 rounds to nothing.  So what trains is a float32 master; the
module computes with the master cast to the base's type, and the gradient comes back through that cast.  The module
stays the object that it was: its class is a subclass of its own, whose attributes of the masters' names are the casts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which a parameter of this type trains: float64 stays, everything else is float32."""
    return dtype if dtype == torch.float64 else torch.float32


class Cast:
    """Mixed into the class of a module that computes with casts of its own parameters `leaves`."""

    narrow: type[nn.Module]  # the class without this
    leaves: tuple[str, ...]
    undula_types: dict[str, torch.dtype]  # of the casts, by the parameter's name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A model that is moved or changes its type (`.float()`) takes the casts along."""
        moved = super()._apply(fn, recurse)  # type: ignore[misc]
        self.undula_types = {
            leaf: fn(torch.empty(0, dtype=t, device="cpu")).dtype for leaf, t in self.undula_types.items()
        }
        return moved

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (self.narrow, self.leaves), self.__getstate__()


def cast_class(narrow: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `narrow` whose parameters `leaves` are masters; `narrow` itself without any."""
    if not leaves:
        return narrow
    if (narrow, leaves) not in _classes:
        own = {"narrow": narrow, "leaves": leaves, **{leaf: property(_reader(leaf)) for leaf in leaves}}
        _classes[narrow, leaves] = type(f"Cast{narrow.__name__}", (Cast, narrow), own)
    return _classes[narrow, leaves]


def _reader(leaf: str) -> Callable[[Any], Tensor]:
    return lambda module: module._parameters[leaf].to(module.undula_types[leaf])


def _revive(narrow: type[nn.Module], leaves: tuple[str, ...]) -> nn.Module:
    cls = cast_class(narrow, leaves)
    return cls.__new__(cls)


def parts(cls: type[nn.Module]) -> tuple[type[nn.Module], tuple[str, ...]]:
    """(the class, its masters) of which `cast_class` makes this one."""
    return (cls.narrow, cls.leaves) if issubclass(cls, Cast) else (cls, ())


def widen(module: nn.Module, leaf: str, dtype: torch.dtype) -> None:
    """The module's parameter `leaf` is a master from now on, used as `dtype`."""
    narrow, leaves = parts(type(module))
    types = getattr(module, "undula_types", {})
    module.__class__ = cast_class(narrow, tuple(sorted({*leaves, leaf})))
    module.undula_types = {**types, leaf: dtype}  # type: ignore[assignment]


def narrow(module: nn.Module, leaf: str) -> None:
    """Undoes `widen`, where it was done."""
    was, leaves = parts(type(module))
    if leaf in leaves:
        types = {k: t for k, t in module.undula_types.items() if k != leaf}  # type: ignore[union-attr,operator]
        module.__class__ = cast_class(was, tuple(name for name in leaves if name != leaf))
        module.undula_types = types  # type: ignore[assignment]
        if not types:
            del module.undula_types
