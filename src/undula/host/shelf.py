"""Adapters that do not train, many of one form in one stack a site: what `rows` computes with has nothing to gather.

Attached with `frozen=True` an adapter's pairs lie with those of its like, (K, R, I) and (K, O, R) at each site, and
nothing but the host holds them.  So entering a batch costs its rows, and no forward looks whether anybody trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Live
from ..core.method import Factors
from .share import Form, Plain, Share, form


class Shelf:
    """Adapters of one form and type: stacks of their A and B at each site, a place k for each adapter."""

    def __init__(self, form: Form, factors: Mapping[str, Factors]):
        self.form = form
        self.dtypes = dtypes(form, factors)
        self.free: list[int] = []
        self.stacks: dict[str, tuple[Tensor, Tensor]] = {}
        for plain in form:
            A, B = factors[plain.path][plain.A], factors[plain.path][plain.B]
            self.stacks[plain.path] = A.new_empty(0, *A.shape), B.new_empty(0, *B.shape)

    def __len__(self) -> int:
        """How many places there are, free ones among them."""
        return len(self.stacks[self.form[0].path][0])

    @torch.no_grad()
    def put(self, factors: Mapping[str, Factors]) -> int:
        """Copies an adapter's pairs to a free place, which it returns."""
        if not self.free:
            size = len(self)
            self.free = list(range(size, max(1, 2 * size)))[::-1]
            self.stacks = {path: (_grown(A, self.free), _grown(B, self.free)) for path, (A, B) in self.stacks.items()}
        k = self.free.pop()
        for plain in self.form:
            A_KRI, B_KOR = self.stacks[plain.path]
            A_KRI[k], B_KOR[k] = factors[plain.path][plain.A], factors[plain.path][plain.B]
        return k

    def take(self, k: int) -> None:
        """Makes the place free."""
        self.free.append(k)

    def to(self, path: str, device: torch.device) -> None:
        """Puts the stacks of one site on a device."""
        A_KRI, B_KOR = self.stacks[path]
        if A_KRI.device != device:
            self.stacks[path] = A_KRI.to(device), B_KOR.to(device)


def dtypes(form: Form, factors: Mapping[str, Factors]) -> tuple[torch.dtype, ...]:
    """The types of all pairs of a form."""
    return tuple(factors[p.path][name].dtype for p in form for name in (p.A, p.B))


def _grown(stack: Tensor, places: list[int]) -> Tensor:
    return torch.cat([stack, stack.new_zeros(len(places), *stack.shape[1:])])


class OfShelf(Share):
    """The rows of adapters that lie on one shelf: their stacks are there."""

    def __init__(self, shelf: Shelf, count: int):
        super().__init__(shelf.form, count)
        self.shelf = shelf
        self._places: dict[torch.device, Tensor | None] = {}

    def pairs(self, plain: Plain) -> tuple[Tensor, Tensor]:
        A_KRI, B_KOR = self.shelf.stacks[plain.path]
        places = self._on(A_KRI.device)
        return (A_KRI, B_KOR) if places is None else (A_KRI[places], B_KOR[places])

    def _on(self, device: torch.device) -> Tensor | None:
        """The places of its adapters; None: all of them in turn."""
        if device not in self._places:
            found = [a.k for a in self.adapters]
            whole = found == list(range(len(self.shelf)))
            with torch.inference_mode(False):  # a later forward of the batch may want gradients
                self._places[device] = None if whole else torch.tensor(found, device=device)
        return self._places[device]


class OnShelf(Mapping[str, Any]):
    """The factors of an adapter at place k of a shelf, as parameters that lie in its stacks, beside `rest`, those that
    are no plain pair."""

    def __init__(self, shelf: Shelf | None, k: int, rest: Mapping[str, Factors], sites: Sequence[str]):
        self.shelf, self.k, self.rest, self.sites = shelf, k, rest, sites
        self.pairs = {} if shelf is None else {plain.path: plain for plain in shelf.form}

    def __getitem__(self, path: str) -> Factors:
        if path not in self.pairs or self.shelf is None:
            return self.rest[path]
        plain, (A_KRI, B_KOR) = self.pairs[path], self.shelf.stacks[path]
        pair = {plain.A: A_KRI[self.k], plain.B: B_KOR[self.k]}
        return {**{name: nn.Parameter(t, requires_grad=False) for name, t in pair.items()}, **self.rest.get(path, {})}

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


class Held(Live):
    """A live adapter that does not train, its plain pairs on a shelf."""

    shelf: Shelf | None
    k: int
    trained: frozenset[tuple[str, str]]  # (site or "", factor or parameter): what may train again once it is off

    @classmethod
    def on(cls, adapter: Adapter, shelves: list[Shelf]) -> Self:
        """Puts `adapter`, whose tensors are nobody else's, on one of the shelves or on a new one of them."""
        held, uses = cls.of(adapter), Counter(id(t) for _, _, t in adapter.tensors())
        pairs = [(p, adapter.factors[p.path]) for p in form(adapter)]
        places = tuple(p for p, f in pairs if uses[id(f[p.A])] == uses[id(f[p.B])] == 1)  # what sites share is no pair
        held.shelf, held.k = None, 0
        if places:
            of = dtypes(places, adapter.factors)
            held.shelf = next((s for s in shelves if s.form == places and s.dtypes == of), None)
            if held.shelf is None:
                held.shelf = Shelf(places, adapter.factors)
                shelves.append(held.shelf)
            held.k = held.shelf.put(adapter.factors)
        named = [*adapter.tensors(), *(("", n, t) for n, t in adapter.full.items())]
        held.trained = frozenset((site, name) for site, name, t in named if t.requires_grad)
        paired = {(p.path, name) for p in places for name in (p.A, p.B)}
        rest: dict[str, dict[str, Tensor]] = {}
        for path, name, t in named:
            t.requires_grad_(False)
            if path and (path, name) not in paired:
                rest.setdefault(path, {})[name] = t
        held.factors = OnShelf(held.shelf, held.k, rest, list(adapter.factors))  # type: ignore[assignment]
        return held

    def off(self, shelves: list[Shelf]) -> Adapter:
        """Takes it off its shelf.  Returns what was attached, as a value of its own."""
        made = self.copy()
        for site, name, t in [*made.tensors(), *(("", n, t) for n, t in made.full.items())]:
            t.requires_grad_((site, name) in self.trained)
        if self.shelf is not None:
            self.shelf.take(self.k)
            if len(self.shelf.free) == len(self.shelf):
                shelves.remove(self.shelf)
        return made
