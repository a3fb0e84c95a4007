"""The value: per site a method and its factors, and the few parameters trained in full beside them."""

from __future__ import annotations

import copy
import html
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from ..methods.dropout import bare
from ..methods.sum import added
from .method import RUNGS, Additive, Factors, Method


@dataclass(frozen=True, eq=False)
class Adapter:
    """methods[site] is the law of a site, factors[site][name] its tensors, shapes[site] the layer's (O, I);
    full[name] replaces a parameter of the model (a classification head, a norm).  These mappings are the value's own
    and read-only; what is attached to a model is a `Live` one.  kernels[site] is there for layers that are not linear,
    which other formats write differently: (C_in/groups, kh, kw) of a convolution in two dimensions, () of an embedding,
    (i,) of one whose row i is padding, which stays the base's whatever dW says.  `about` is what a directory says
    beside (`base_model_name_or_path`, `task_type`, a head's `classes` in order ...): it comes with loading and goes
    with saving.  apart[site] says why no plain LoRA of PEFT's computes W + dW at that layer, or that the factors are
    such a LoRA's (see `undula.host.apart`).  `weight` is the sum of the weights of the adapters that a combination is
    made of: what is in `full` has a meaning where it is 1, an average."""

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
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self._told().items())
        return f"<table>{rows}</table>"

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

    @torch.no_grad()
    def delta(self, site: str) -> Tensor:
        """dW (O, I) of one site.  Needs the Additive rung."""
        return self._additive(site).delta(self.factors[site])

    def _additive(self, site: str) -> Additive:
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
            method = bare(self.methods[site])
            if not hasattr(method, "at_rank"):
                raise TypeError(
                    f"{method!r} at {site} was not trained to be cut at any rank: "
                    f"collapse(Truncate({b})) makes the best adapter of rank {b} and reports the error"
                )
            methods[site], factors[site] = method.at_rank(f, b)
        return replace(self, methods=methods, factors=factors)

    def save(self, path: str | Path, base: str | None = None, task: str | None = None) -> None:
        """Writes a PEFT adapter directory (see `undula.io.native.save`); `base` and `task` are for its readers, and
        default to what `about` says.  Shards (FSDP2) are gathered: all processes call this, the first writes."""
        from ..host.sharded import gathered, writes
        from ..io.native import save

        whole = gathered(self)
        if writes(self):
            save(whole, path, base, task)

    @staticmethod
    def load(path: str | Path) -> Adapter:
        """The adapter in a directory: undula's own, or a plain PEFT LoRA.  Strict; see `undula.io.native.load`."""
        from ..io.native import load

        return load(path)

    def check_usable(self) -> None:
        """Raises ValueError for a combination whose parameters in full are not an average."""
        if self.full and not math.isclose(self.weight, 1.0, abs_tol=1e-6):
            raise ValueError(
                f"this combination holds {', '.join(list(self.full)[:5])} in full with weights that sum to "
                f"{self.weight:g}: parameters in full have an average, with weights that sum to 1, and no other sum. "
                "Drop them (dataclasses.replace(adapter, full={})), or give weights that sum to 1"
            )

    # Arithmetic: exact, on the Additive rung; lazily, as a Sum of the parts.

    def __add__(self, other: Adapter) -> Adapter:
        return combined([(1.0, self), (1.0, other)])

    def __sub__(self, other: Adapter) -> Adapter:
        return combined([(1.0, self), (-1.0, other)])

    def __mul__(self, weight: float) -> Adapter:
        return combined([(float(weight), self)])

    __rmul__ = __mul__

    def __radd__(self, other: object) -> Adapter:
        """`sum` begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented  # type: ignore[return-value]

    def __neg__(self) -> Adapter:
        return self * -1.0


class Live(Adapter):
    """An adapter on a model: its tensors are the model's own parameters, and what an allocator changes changes here.
    What is made of it (`copy`, `dataclasses.replace`, sums) is a value that later training does not touch.  Detached,
    it can be attached again as the object that it is, for an optimiser that knows its parameters."""

    attached = False
    _methods: dict[str, Method]  # what `host.change` writes into
    factors: dict[str, dict[str, Tensor]]  # type: ignore[assignment]  # a layer's own dictionary, see `host.Slot`
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
    def methods(self) -> Mapping[str, Method]:  # type: ignore[override]
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


def combined(terms: list[tuple[float, Adapter]]) -> Adapter:
    """The weighted sum of adapters.  Sums of sums are one sum, with each part once; where its rank passes that of the
    layer it becomes the layer's own, so that no chain of averages grows without end.  Parameters in full are averaged,
    see `Adapter.weight`."""
    values = {id(a): a.copy() if isinstance(a, Live) else a for _, a in terms}
    terms = [(w, values[id(a)]) for w, a in terms]
    factors: dict[str, Factors] = {}
    methods: dict[str, Method] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for site in dict.fromkeys(s for _, a in terms for s in a.factors):
        found = {a.shapes[site] for _, a in terms if site in a.factors}
        if len(found) > 1:
            raise ValueError(f"the adapters are for different models: {site} is {' and '.join(map(str, found))} (O, I)")
        shapes[site] = found.pop()
        parts = [(w, a._additive(site), a.factors[site]) for w, a in terms if site in a.factors]
        methods[site], factors[site] = added(parts, shapes[site])
    kernels = {site: kernel for _, a in terms for site, kernel in a.kernels.items()}
    apart = {site: why for _, a in terms for site, why in a.apart.items()}
    first = terms[0][1].about
    agreed = {k: v for k, v in first.items() if all(k in a.about and a.about[k] == v for _, a in terms)}
    weight = sum(w * a.weight for w, a in terms)
    return Adapter(methods, factors, shapes, _averaged(terms, weight), kernels, agreed, apart, weight)


def _averaged(terms: list[tuple[float, Adapter]], weight: float) -> dict[str, Tensor]:
    """`full` of a combination.  Raises ValueError where it is on the way to no average."""
    names = sorted({n for _, a in terms for n in a.full})
    lacking = [n for n in names if any(n not in a.full for _, a in terms)]
    if lacking or (names and not 0 < weight < 1 + 1e-6):
        raise ValueError(
            f"adapters that train parameters in full cannot be added: {', '.join(lacking[:5] or names[:5])}. They have "
            "an average, of adapters that all have them and with weights that sum to 1 (0.5 * a + 0.5 * b); else drop "
            "`full` first (dataclasses.replace(adapter, full={}))"
        )
    orders = {tuple(a.about["classes"]) for _, a in terms if a.full and "classes" in a.about}
    if len(orders) > 1:
        raise ValueError(
            "the adapters' heads answer other classes, or the same in another order: "
            f"{' and '.join(str(list(order)[:8]) for order in sorted(orders))}. Train them with the same names "
            "(Classification(names=...)), or drop `full` first (dataclasses.replace(adapter, full={}))"
        )
    with torch.no_grad():
        sums = {n: sum((w * a.full[n] for w, a in terms[1:]), terms[0][0] * terms[0][1].full[n]) for n in names}
    return {n: t.requires_grad_(terms[0][1].full[n].requires_grad) for n, t in sums.items()}
