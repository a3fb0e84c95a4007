"""The value: per site a method and its factors, and the few parameters trained in full beside them."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .method import RUNGS, Additive, Factors, Method
from .methods.dropout import bare
from .methods.sum import Sum


@dataclass(frozen=True, eq=False)
class Adapter:
    """methods[site] is the law of a site, factors[site][name] its tensors, shapes[site] the layer's (O, I);
    full[name] replaces a parameter of the model (a classification head, a norm).  A live adapter's tensors are the
    model's own trainable parameters.  kernels[site] is there for layers that are not linear, which other formats write
    differently: (C_in/groups, kh, kw) of a convolution, () of an embedding, (i,) of one whose row i is padding, which
    stays the base's whatever dW says.  `about` is what a directory says beside
    (`base_model_name_or_path`, `task_type` ...): it comes with loading and goes with saving.  apart[site] says why no
    plain LoRA of PEFT's computes W + dW at that layer, or that the factors are such a LoRA's (see `undula.apart`)."""

    methods: Mapping[str, Method]
    factors: Mapping[str, Factors]
    shapes: Mapping[str, tuple[int, int]]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "full", dict(self.full))  # of its own: a live one's is read in the model
        if not set(self.methods) == set(self.factors) == set(self.shapes):
            odd = sorted(set(self.methods) ^ set(self.factors) | set(self.methods) ^ set(self.shapes))
            raise ValueError(f"methods, factors and shapes name different sites: {', '.join(odd[:5])}")

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
        return replace(self, methods=dict(self.methods), factors={s: fn(f) for s, f in self.factors.items()})

    def copy(self) -> Adapter:
        """A detached copy that no training changes; tensors that sites share stay shared."""
        fresh: dict[int, Tensor] = {}

        def once(t: Tensor) -> Tensor:
            return fresh.setdefault(id(t), t.detach().clone().requires_grad_(t.requires_grad))

        factors = {s: {k: once(t) for k, t in f.items()} for s, f in self.factors.items()}
        full = {k: once(t) for k, t in self.full.items()}
        return replace(self, methods=dict(self.methods), factors=factors, full=full)

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
        from .io.native import save
        from .sharded import gathered, writes

        whole = gathered(self)
        if writes(self):
            save(whole, path, base, task)

    @staticmethod
    def load(path: str | Path) -> Adapter:
        """The adapter in a directory: undula's own, or a plain PEFT LoRA.  Strict; see `undula.io.native.load`."""
        from .io.native import load

        return load(path)

    # Arithmetic: exact, on the Additive rung; lazily, as a Sum of the parts.

    def __add__(self, other: Adapter) -> Adapter:
        return _sum([(1.0, self), (1.0, other)])

    def __sub__(self, other: Adapter) -> Adapter:
        return _sum([(1.0, self), (-1.0, other)])

    def __mul__(self, weight: float) -> Adapter:
        return _sum([(float(weight), self)])

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0


def _sum(terms: list[tuple[float, Adapter]]) -> Adapter:
    held = [a for _, a in terms if a.full]
    if held:
        raise ValueError(
            f"adapters that train parameters in full cannot be added: {', '.join(sorted(held[0].full)[:5])}. "
            "Their updates are relative to no common base; drop `full` first (dataclasses.replace(adapter, full={}))"
        )
    methods: dict[str, Method] = {}
    factors: dict[str, Factors] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for site in dict.fromkeys(s for _, a in terms for s in a.factors):
        found = {a.shapes[site] for _, a in terms if site in a.factors}
        if len(found) > 1:
            raise ValueError(f"the adapters are for different models: {site} is {' and '.join(map(str, found))} (O, I)")
        shapes[site] = found.pop()
        parts = [(w, a._additive(site), a.factors[site]) for w, a in terms if site in a.factors]
        methods[site] = Sum(tuple(m for _, m, _ in parts), tuple(w for w, _, _ in parts))  # type: ignore[abstract]
        factors[site] = {f"{i}_{k}": t for i, (_, _, f) in enumerate(parts) for k, t in f.items()}
    kernels = {site: kernel for _, a in terms for site, kernel in a.kernels.items()}
    apart = {site: why for _, a in terms for site, why in a.apart.items()}
    first = terms[0][1].about
    agreed = {k: v for k, v in first.items() if all(k in a.about and a.about[k] == v for _, a in terms)}
    return Adapter(methods, factors, shapes, kernels=kernels, about=agreed, apart=apart)
