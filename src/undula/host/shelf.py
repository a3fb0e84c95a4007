"""Adapters that serve and do not train, side by side in tables: what makes a batch of hundreds cheap.

Adapters with the same sites lie on one shelf.  At each site it has a table of rows A (I wide) and one of rows B (O
wide), in which an adapter of rank r has a run of r rows, at the same place at all sites, whatever the ranks of the
others are.  What else its law needs (a gain of the outputs, the parameters of a bend: see `core.method.Settled`) lies
in tables beside.  Nothing but the host holds them, so entering a batch costs its rows, and no forward looks whether
anybody trained.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Live
from ..core.method import Factors, LowRank
from .tables import Mark, Placing, Shelf, Spot, give_back
from .views import LinearView

LARGER = 4  # a pair that an adapter does not have itself is kept where it is so many times its factors at most


def marked(layer: LinearView) -> Mark:
    """What tells that a layer's weight is another one, or was written into."""
    W = layer.module.weight
    return id(W), W.data_ptr(), W._version, W.dtype


def placed(adapter: Adapter, layers: Mapping[str, LinearView]) -> dict[str, Placing]:
    """What of an adapter can lie on a shelf: plain pairs as they are, unless sites share them; of other methods what
    `settled` makes of them, where that is not much larger."""
    uses = Counter(id(t) for _, _, t in adapter.tensors())
    found: dict[str, Placing] = {}
    for path, method in adapter.methods.items():
        f = adapter.factors[path]
        plain = method.plain() if isinstance(method, LowRank) else None
        if plain is not None and uses[id(f[plain[1]])] == uses[id(f[plain[2]])] == 1:
            found[path] = Placing({"A": f[plain[2]], "B": f[plain[1]]}, plain[0], plain[1:], drops=method.drops)
            continue
        settled = method.settled(layers[path], f)
        if settled is None or settled.A.numel() + settled.B.numel() > LARGER * sum(t.numel() for t in f.values()):
            continue
        B_OR, gain = settled.B, settled.gain
        if gain is not None:  # it lies among the rows of B
            both = torch.promote_types(B_OR.dtype, gain.dtype)
            B_OR, gain = B_OR.to(both), gain.to(both)
        parts = {"A": settled.A, "B": B_OR, **({} if gain is None else {"gain": gain}), **settled.bent}
        found[path] = Placing(parts, bend=method.undropped() if settled.bent else None, drops=method.drops)
    return found


def lying(placing: Mapping[str, Placing]) -> set[tuple[str, str]]:
    """(site, factor) of the factors that lie in the tables themselves."""
    return {(path, name) for path, placed in placing.items() for name in placed.own or ()}


class OnShelf(Mapping[str, Any]):
    """The factors of an adapter on a shelf: plain pairs as parameters that lie in its tables, and `rest`."""

    def __init__(
        self, shelf: Shelf | None, spots: Mapping[str, Spot], rest: Mapping[str, Factors], sites: Sequence[str]
    ):
        self.shelf, self.spots, self.rest, self.sites = shelf, spots, rest, sites

    def __getitem__(self, path: str) -> Factors:
        spot = self.spots.get(path)
        if self.shelf is None or spot is None or spot.own is None:
            return self.rest[path]
        (B, A), tables = spot.own, self.shelf.tables[path]
        pair = {A: tables[spot.A][spot.a : spot.a + spot.r], B: tables[spot.B][spot.b : spot.b + spot.r].t()}
        return {**{name: nn.Parameter(t, requires_grad=False) for name, t in pair.items()}, **self.rest.get(path, {})}

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


class Held(Live):
    """A live adapter that does not train, on a shelf."""

    shelf: Shelf | None  # None: nothing of it can lie on one
    spots: dict[str, Spot]
    copies: dict[str, Any]  # {site: the weight that the adapter makes there}, see `host.copies`
    trained: frozenset[tuple[str, str]]  # (site or "", factor or parameter): what may train again once it is off
    pooled: bool = False  # whether it came by `ready.put`, and goes by `ready.take`

    @classmethod
    @torch.no_grad()
    def on(
        cls,
        adapter: Adapter,
        layers: Mapping[str, LinearView],
        shelves: list[Shelf],
        placing: Mapping[str, Placing] | None = None,
        reserve: int = 0,
    ) -> Self:
        """Puts `adapter`, whose tensors are nobody else's, on one of the shelves or on a new one of them, for which
        `reserve` see `Shelf`; `placing` is what `placed` says of it, where that is known."""
        held, placing = cls.of(adapter), placed(adapter, layers) if placing is None else placing
        held.shelf, held.spots, held.copies = None, {}, {}
        if placing:
            sites = tuple((path, len(p.parts["B"]), p.parts["A"].shape[1]) for path, p in sorted(placing.items()))
            held.shelf = next((s for s in shelves if s.sites == sites), None)
            if held.shelf is None:
                held.shelf = Shelf(sites, {path: layers[path].device for path in placing}, reserve)
                shelves.append(held.shelf)
            held.spots = held.shelf.put(placing)
            held.shelf.marks |= {path: marked(layers[path]) for path, p in placing.items() if "gain" in p.parts}
        named = [*adapter.tensors(), *(("", n, t) for n, t in adapter.full.items())]
        held.trained = frozenset((site, name) for site, name, t in named if t.requires_grad)
        there = lying(placing)
        rest: dict[str, dict[str, Tensor]] = {}
        for path, name, t in named:
            t.requires_grad_(False)
            if path and (path, name) not in there:
                rest.setdefault(path, {})[name] = t
        held.factors = OnShelf(held.shelf, held.spots, rest, list(adapter.factors))  # type: ignore[assignment]
        return held

    @functools.cached_property
    def alike(self) -> bool:
        """Whether it lies at one spot at all of its sites."""
        return len({id(spot) for spot in self.spots.values()}) == 1

    @torch.no_grad()
    def settle(self, layers: Mapping[str, LinearView]) -> None:
        """Makes anew what depends on the weights of these layers, which were written into since."""
        assert self.shelf is not None
        for path, layer in layers.items():
            spot = self.spots[path]
            if not spot.gain:
                continue
            settled = self.methods[path].settled(layer, self.factors[path])
            if settled is None or settled.gain is None:
                raise RuntimeError(
                    f"the weight of {path} was changed since {self.methods[path]!r} was attached with frozen=True, so "
                    "that its norms cancel now: detach it and attach it again"
                )
            self.shelf.tables[path][spot.B][spot.b + spot.r] = settled.gain

    def check_own(self, name: str | None, verb: str) -> None:
        """Raises RuntimeError where a pool holds it: requests count on its being there, and what it is."""
        if self.pooled:
            raise RuntimeError(
                f"{name!r} is held by a pool, which puts adapters onto this model and takes them off: nobody else may "
                f"{verb} it. Unregister it there, or load the adapter once more and attach it under another name"
            )

    def off(self, shelves: list[Shelf]) -> Adapter:
        """Takes it off its shelf.  Returns what was attached, as a value of its own."""
        made = self.copy()
        for site, name, t in [*made.tensors(), *(("", n, t) for n, t in made.full.items())]:
            t.requires_grad_((site, name) in self.trained)
        self.leave(shelves)
        return made

    @property
    def nbytes(self) -> int:
        """What it takes: its rows in the tables, and what lies beside."""
        rest = self.factors.rest if isinstance(self.factors, OnShelf) else {}
        beside = {id(t): t.nbytes for f in rest.values() for t in f.values()} | {
            id(t): t.nbytes for t in self.full.values()
        }
        copies = sum(copy.W_OI.nbytes for copy in self.copies.values())
        return (
            copies
            + sum(beside.values())
            + sum(
                (self.shelf.tables[path][kind][0].nbytes if self.shelf else 0) * n
                for path, s in self.spots.items()
                for kind, _, n in s.rows()
            )
        )

    def leave(self, shelves: list[Shelf]) -> None:
        """Makes its places free."""
        if self.shelf is not None:
            self.shelf.take(self.spots)
            if not self.shelf.there:
                shelves.remove(self.shelf)
                self.shelf.tables = {}
                give_back()
