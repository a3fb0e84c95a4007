"""Weights that a model reads itself, as matrices W (O x I): those of layers that nobody calls, matrices that a module
keeps beside its layers, and matrices in a stack.  See `mounted` for how an adapter acts there."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from . import masters, quantised
from .views import LinearView, view


class Mounted:
    """Mixed into the class of a module on which weights are mounted."""

    original: type[nn.Module]


class Twin:
    """A parameter of a module, or one matrix of a stack, in the place of a layer with a `weight`."""

    bias = None

    def __init__(self, owner: nn.Module, leaf: str, at: int | None):
        self.owner, self.leaf, self.at = owner, leaf, at

    @property
    def weight(self) -> Tensor:
        W = own(self.owner, self.leaf)
        return W if self.at is None else W[self.at]

    @property
    def training(self) -> bool:
        return self.owner.training

    @property
    def _parameters(self) -> dict[str, Tensor | None]:
        return {"weight": self.owner._parameters.get(self.leaf)}


def own(owner: nn.Module, leaf: str) -> Tensor:
    """The module's own weight, whatever is mounted there."""
    return getattr(bare(owner), leaf)


def bare(owner: nn.Module) -> nn.Module:
    """The module under the class that it has without mounted weights; both share all that they hold."""
    if not isinstance(owner, Mounted):
        return owner
    other = object.__new__(owner.original)
    object.__setattr__(other, "__dict__", owner.__dict__)
    return other


class Read(LinearView):
    """Mixed into the view of a weight that a module of the class `reader` reads.  `place` is the path of the module
    that has it, `leaf` the parameter's name, `at` the position in a stack; within the forward of `scope` it is read."""

    product, plain = False, False
    owner: nn.Module = None  # type: ignore[assignment]
    scope: nn.Module
    reader: str
    place: str
    leaf = "weight"
    at: int | None = None
    seen: Any = None  # what a copy of this view sees in the place of the module

    @property
    def module(self) -> Any:
        return bare(self.owner) if self.seen is None else self.seen

    @module.setter
    def module(self, other: Any) -> None:
        self.seen = other

    def __call__(self, x: Tensor) -> Tensor:
        raise TypeError(f"{self.parameter} is a weight that {self.reader} reads: there is no layer to call")

    @property
    def parameter(self) -> str:
        """The full name of the parameter."""
        return f"{self.place}.{self.leaf}".lstrip(".")

    @property
    def key(self) -> str:
        """What the slot is called below the module."""
        return self.leaf if self.at is None else f"{self.leaf}_{self.at}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self).__mro__[2] if type(self) in _reads.values() else None,), self.__dict__

    def reread(self, weight: Tensor) -> Tensor:
        other = copy.copy(self)
        other.module = SimpleNamespace(weight=weight)
        return other.weight


class Matrix(Read):
    """A parameter of a module, or one of a stack of matrices, as W (O, I); `turned` where it is stored as (I, O)."""

    bias = None

    def __init__(self, owner: nn.Module, place: str, leaf: str, at: int | None = None):
        super().__init__(owner)
        self.owner = self.scope = owner
        self.place, self.leaf, self.at = place, leaf, at
        self.reader = masters.parts(type(bare(owner)))[0].__name__
        self.turned = at is not None and bool(getattr(owner, "is_transposed", False))  # of transformers' experts
        self.seen = Twin(owner, leaf, at)

    @property
    def weight(self) -> Tensor:
        W = quantised.dense(self.module)
        return W.T if self.turned else W

    def oriented(self, W_OI: Tensor) -> Tensor:
        return W_OI.T.contiguous() if self.turned else W_OI


_reads: dict[type[LinearView], type[Read]] = {}


def _blank(kind: type[LinearView] | None) -> Read:
    """A view of this kind that is read, with nothing in it yet; None: a Matrix."""
    if kind is None:
        return object.__new__(Matrix)
    if kind not in _reads:
        _reads[kind] = type(f"Read{kind.__name__}", (Read, kind), {})
    return object.__new__(_reads[kind])


def read(layer: LinearView, place: str, scope: nn.Module) -> Read:
    """The view of a module as one whose weight is read, within the forward of `scope`."""
    other = _blank(type(layer))
    other.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in ("module", "product")})
    other.owner, other.place, other.reader = layer.module, place, masters.parts(type(bare(scope)))[0].__name__
    other.scope = layer.module if view(scope) is not None else scope
    return other


def parameter_of(path: str, layer: LinearView) -> str:
    """The full name of a site's parameter."""
    return layer.parameter if isinstance(layer, Read) else f"{path}.weight".lstrip(".")


def placed(layer: LinearView, weight: nn.Parameter, before: nn.Parameter | None) -> nn.Parameter:
    """The parameter that holds a site's new weight, `before` that of other sites in the same stack."""
    if not isinstance(layer, Read) or layer.at is None:
        return weight
    if before is None:
        before = nn.Parameter(own(layer.owner, layer.leaf).detach().clone(), requires_grad=False)
    before.data[layer.at] = weight.data
    return before


def check_once(layers: Mapping[str, LinearView]) -> None:
    """Raises ValueError where one matrix stands under two names: as a layer and as the weight that is read."""
    names: dict[tuple[int, str, int | None], str] = {}
    for path, layer in layers.items():
        leaf, at = (layer.leaf, layer.at) if isinstance(layer, Read) else ("weight", None)
        other = names.setdefault((id(layer.owner), leaf, at), path)
        if other != path:
            raise ValueError(f"{other} and {path} are one weight: name it once")
