"""The value: per site a method and its factors, and the few parameters trained in full beside them."""

from __future__ import annotations

import copy
import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from .method import RUNGS, Additive, Factors, Method
from .sketch import page

# What an adapter does with files and with methods, which stand above it: put here by these.
ABOVE: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True, eq=False)
class Adapter:
    """methods[site] is the law of a site, factors[site][name] its tensors, shapes[site] the layer's (O, I);
    full[name] replaces a parameter of the model (a classification head, a norm).  These mappings are the value's own
    and read-only; what is attached to a model is a `Live` one.  kernels[site] is there for layers that are not linear,
    which other formats write differently: (C_in/groups, kh, kw) of a convolution in two dimensions, () of an
    embedding, (i,) of one whose row i is padding, which stays the base's whatever dW says.  `about` is what a
    directory says beside (`base_model_name_or_path`, `task_type`, a head's `classes` in order, `created_by`, the
    `training` in figures): it comes with loading and goes with saving.  apart[site] says why no plain LoRA of PEFT's
    computes W + dW at that layer, or that the factors are such a LoRA's (see `undula.host.apart`).  `weight` is the
    sum of the weights of the adapters that a combination is made of: what is in `full` has a meaning where it is 1, an
    average."""

    methods: Mapping[str, Method]
    factors: Mapping[str, Factors]
    shapes: Mapping[str, tuple[int, int]]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0

    def __post_init__(self) -> None:
        own = {s: MappingProxyType(dict(f)) for s, f in self.factors.items()}
        object.__setattr__(self, "factors", MappingProxyType(own))
        for name in ("methods", "shapes", "full", "kernels", "about", "apart"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        if not set(self.methods) == set(self.factors) == set(self.shapes):
            odd = sorted(set(self.methods) ^ set(self.factors) | set(self.methods) ^ set(self.shapes))
            raise ValueError(f"methods, factors and shapes name different sites: {', '.join(odd[:5])}")

    def __reduce__(self) -> Any:
        return _value, tuple(_plain(getattr(self, f.name)) for f in fields(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        return _value(*(copy.deepcopy(_plain(getattr(self, f.name)), memo) for f in fields(self)))

    def __repr__(self) -> str:
        return f"Adapter({', '.join(f'{name}: {value}' for name, value in self._told().items())})"

    def _repr_html_(self) -> str:
        return page(self.methods, self.factors, self._told())

    def _told(self) -> dict[str, str]:
        """What a person wants to know of it at a glance."""
        kinds = Counter(self.methods.values()).most_common()
        told = {"methods": ", ".join(f"{m!r} at {n} layers" for m, n in kinds[:3]) + (", ..." if kinds[3:] else "")}
        if not kinds:
            del told["methods"]
        sites = list(self.methods)
        if sites:
            told["layers"] = ", ".join(sites[:3]) + (f" ... {sites[-1]}" if len(sites) > 3 else "")
        if self.full:
            more = f" and {len(self.full) - 3} more" if len(self.full) > 3 else ""
            told["in full"] = ", ".join(list(self.full)[:3]) + more
        return told | {"parameters": f"{self.num_parameters():,} train"}

    @property
    def method(self) -> Method:
        """The method of most sites."""
        return Counter(self.methods.values()).most_common(1)[0][0]

    @property
    def rung(self) -> type[Method]:
        """The highest rung that every site stands on."""
        return next(r for r in RUNGS if all(isinstance(m, r) for m in self.methods.values()))

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(site, factor, tensor) for every factor."""
        for site, f in self.factors.items():
            for name, t in f.items():
                yield site, name, t

    def parameters(self) -> list[Tensor]:
        """The trainable tensors, each once."""
        every = [t for _, _, t in self.tensors()] + list(self.full.values())
        return list({id(t): t for t in every if t.requires_grad}.values())

    def num_parameters(self) -> int:
        """How many numbers train."""
        return sum(t.numel() for t in self.parameters())

    def map(self, fn: Callable[[Factors], Factors]) -> Adapter:
        """The same adapter with `fn` applied to every site's factors."""
        return replace(self, factors={s: fn(f) for s, f in self.factors.items()})

    def copy(self) -> Adapter:
        """A detached copy that no training changes; tensors that sites share stay shared."""
        return self._with(_copied)

    def _with(self, fn: Callable[[Tensor], Tensor]) -> Adapter:
        """A value with fn(t) in the place of each tensor t; those that are one stay one."""
        made: dict[int, Tensor] = {}

        def once(t: Tensor) -> Tensor:
            if id(t) not in made:
                made[id(t)] = fn(t)
            return made[id(t)]

        factors = {s: {k: once(t) for k, t in f.items()} for s, f in self.factors.items()}
        full = {k: once(t) for k, t in self.full.items()}
        others = {f.name: getattr(self, f.name) for f in fields(self)}
        return Adapter(**{**others, "factors": factors, "full": full})

    def site(self, name: str) -> Adapter:
        """The part of one layer, without parameters in full.  Raises LookupError."""
        if name not in self.methods:
            close = ", ".join(difflib.get_close_matches(name, self.methods, 3) or list(self.methods)[:3])
            raise LookupError(f"the adapter has nothing at {name!r}; it adapts {len(self.methods)} layers: {close} ...")
        there: Mapping[str, Any] = {
            part: {k: v for k, v in getattr(self, part).items() if k == name}
            for part in ("methods", "factors", "shapes", "kernels", "apart")
        }
        return replace(self, full={}, **there)

    @torch.no_grad()
    def delta(self, site: str) -> Tensor:
        """dW (O, I) of one site.  Needs the Additive rung."""
        return self.additive(site).delta(self.factors[site])

    def additive(self, site: str) -> Additive:
        """The method of one site.  Raises TypeError where it has no update dW."""
        method = self.methods[site]
        if not isinstance(method, Additive):
            raise TypeError(
                f"{method!r} at {site} stands on the rung {method.rung()}: it has no update dW that could be added, "
                "subtracted or truncated. `undula.collapse` fits a LowRank adapter to it"
            )
        return method

    def at_rank(self, b: int) -> Adapter:
        """The first b ranks of an adapter that was trained at every rank (DyLoRA), as plain LoRA.  Raises TypeError
        for other methods, ValueError for a rank that is not there."""
        methods: dict[str, Method] = {}
        factors: dict[str, Factors] = {}
        for site, f in self.factors.items():
            if (cut := self.methods[site].at_rank(f, b)) is None:
                raise TypeError(
                    f"{self.methods[site]!r} at {site} was not trained to be cut at any rank: "
                    f"collapse(Truncate({b})) makes the best adapter of rank {b} and reports the error"
                )
            methods[site], factors[site] = cut
        return replace(self, methods=methods, factors=factors)

    def save(self, path: str | Path, base: str | None = None, task: str | None = None) -> None:
        """Writes a PEFT adapter directory (see `undula.io.native.save`); `base` and `task` are for its readers, and
        default to what `about` says.  Shards (FSDP2) are gathered: all processes call this, the first writes."""
        ABOVE["save"](self, path, base, task)

    @staticmethod
    def load(path: str | Path) -> Adapter:
        """The adapter in a directory: undula's own, or a plain PEFT LoRA.  Strict; see `undula.io.native.load`."""
        return ABOVE["load"](path)

    def check_usable(self) -> None:
        """Raises ValueError for a combination whose parameters in full are not an average."""
        if self.full and not math.isclose(self.weight, 1.0, abs_tol=1e-6):
            raise ValueError(
                f"this combination holds {', '.join(list(self.full)[:5])} in full with weights that sum to "
                f"{self.weight:g}: parameters in full have an average, with weights that sum to 1, and no other sum. "
                "Drop them (dataclasses.replace(adapter, full={}); undula combine --drop-full), or give weights that "
                "sum to 1"
            )

    # Arithmetic: exact, on the Additive rung; lazily, as a Sum of the parts.

    def __add__(self, other: Adapter) -> Adapter:
        return _combined([(1.0, self), (1.0, other)])

    def __sub__(self, other: Adapter) -> Adapter:
        return _combined([(1.0, self), (-1.0, other)])

    def __mul__(self, weight: float) -> Adapter:
        return _combined([(float(weight), self)])

    __rmul__ = __mul__

    def __radd__(self, other: object) -> Adapter:
        """`sum` begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __neg__(self) -> Adapter:
        return self * -1.0


class Live(Adapter):
    """An adapter on a model: its tensors are the model's own parameters, and what an allocator changes changes here.
    What is made of it (`copy`, `dataclasses.replace`, sums) is a value that later training does not touch.  Detached,
    it can be attached again as the object that it is, for an optimiser that knows its parameters."""

    attached = False
    _methods: dict[str, Method]  # what `host.change` writes into
    factors: dict[str, dict[str, Tensor]]  # a layer's own dictionary, see `host.Slot`
    full: Mapping[str, Tensor]

    def __new__(cls, *parts: Any, **named: Any) -> Any:
        """What `dataclasses.replace` makes of a live adapter: a value that shares no memory with it.  Computed tensors
        stay what they are, with their graphs."""
        return Adapter(*parts, **named)._with(_apart_from) if parts or named else object.__new__(cls)

    __setattr__ = object.__setattr__
    __reduce__ = object.__reduce__
    __deepcopy__ = None  # type: ignore[assignment]  # as any object's: a copied model's adapter is its own

    @classmethod
    def of(cls, adapter: Adapter) -> Self:
        """A live adapter with the tensors of `adapter`."""
        live = object.__new__(cls)
        for f in fields(adapter):
            setattr(live, "_methods" if f.name == "methods" else f.name, _plain(getattr(adapter, f.name)))
        return live

    @property
    def methods(self) -> Mapping[str, Method]:
        return MappingProxyType(self._methods)

    def resumed(self, new: Live) -> Self:
        """This adapter, detached before, as `new`, which was made of it: its parameters go on with the new numbers."""
        own: dict[tuple[str, str], Tensor] = {(s, k): t for s, k, t in self.tensors()}
        own |= {("", n): t for n, t in self.full.items()}

        def going_on(key: tuple[str, str], t: Tensor) -> Tensor:
            if not isinstance(own[key], torch.nn.Parameter):
                return t
            own[key].data = t.data
            return own[key]

        factors = {s: {k: going_on((s, k), t) for k, t in f.items()} for s, f in new.factors.items()}
        full = {n: going_on(("", n), t) for n, t in new.full.items()}
        vars(self).update({**vars(new), "factors": factors, "full": full})
        return self

    def __copy__(self) -> Adapter:
        return self.copy()


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)


def _apart_from(t: Tensor) -> Tensor:
    """A copy of t, which may be a live adapter's parameter or share its memory; computed tensors keep their graphs, and
    those of torch.func's transforms are left to them."""
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        return t
    if t.grad_fn is not None:
        return t.clone() if t._is_view() else t
    copy = t.detach().clone()
    return copy.requires_grad_() if t.requires_grad else copy


def _plain(part: Any) -> Any:
    """A field of an adapter with dictionaries in the place of read-only mappings."""
    return {k: _plain(v) for k, v in part.items()} if isinstance(part, MappingProxyType) else part


def _value(*parts: Any) -> Adapter:
    return Adapter(*parts)


def _combined(terms: list[tuple[float, Adapter]]) -> Adapter:
    return ABOVE["combined"](terms)
