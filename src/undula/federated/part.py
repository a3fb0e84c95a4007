"""What a client has of the server's adapter, where that is not all of it: its first ranks, some of its layers.

    of(adapter)         B[:, :r], A[:r] at these layers, with the scale that they have in the whole
    into(adapter, p)    the whole, with the numbers of p in their places; the rest is as it was

So a client that has less leaves what it has not as it is, and the mean over clients is one of adapters of one form: no
aggregation has to know.  Parameters in full (heads, norms) all clients have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Factors, Method
from ..methods.lora import Fixed, LoRA


@dataclass(frozen=True)
class Part:
    """r: so many ranks, the first; sites: layers by name.  None: all."""

    r: int | None = None
    sites: frozenset[str] | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of an adapter."""
        return self.r is None and self.sites is None

    def of(self, adapter: Adapter) -> Adapter:
        """Raises TypeError for a method that is not cut at a rank (`check_cut`)."""
        if self.whole:
            return adapter
        made: dict[int, Tensor] = {}  # what layers share stays shared
        there = [site for site in adapter.methods if self.sites is None or site in self.sites]
        cut = {site: self._at(site, adapter.methods[site], adapter.factors[site], made) for site in there}
        kept: dict[str, Any] = {
            name: {site: value for site, value in getattr(adapter, name).items() if site in cut}
            for name in ("shapes", "kernels", "apart")
        }
        methods, factors = {s: method for s, (method, _) in cut.items()}, {s: f for s, (_, f) in cut.items()}
        return replace(adapter, methods=methods, factors=factors, **kept)

    def _at(self, site: str, method: Method, f: Factors, made: dict[int, Tensor]) -> tuple[Method, Factors]:
        if self.r is None:
            return method, f
        scale, B, A = check_cut(method, site)
        if self.r >= f[A].shape[0]:
            return method, f
        own = {**f, B: _first(f[B], (f[B].shape[0], self.r), made), A: _first(f[A], (self.r, f[A].shape[1]), made)}
        return method.around(LoRA(r=self.r, alpha=1.0, scaling=Fixed(scale))), own

    def into(self, adapter: Adapter, part: Adapter) -> Adapter:
        """`part`: made by `of`, with other numbers."""
        if self.whole:
            return part
        made: dict[int, Tensor] = {}
        for site, f in part.factors.items():
            for name, t in f.items():
                made.setdefault(id(old := adapter.factors[site][name]), _placed(old, t))
        factors = {s: {name: made.get(id(t), t) for name, t in f.items()} for s, f in adapter.factors.items()}
        return replace(adapter, factors=factors, full=part.full)


WHOLE = Part()


def check_cut(method: Method, site: str) -> tuple[float, str, str]:
    """(s, B, A) of a LoRA, in dropout or not.  Raises TypeError for any other method."""
    alone = method.undropped()
    if type(alone) is not LoRA:
        raise TypeError(
            f"{method!r} at {site} (rung {method.rung()}) is not cut at a rank, so no client has fewer ranks of it: "
            "take LoRA, or leave out the client's r"
        )
    return alone.plain()


def most_ranks(adapter: Adapter, sites: frozenset[str] | None) -> int:
    """Of the layers that are cut, the most ranks that one has.  Raises TypeError for a method that is not cut."""
    there = [(site, method) for site, method in adapter.methods.items() if sites is None or site in sites]
    return max((adapter.factors[site][check_cut(method, site)[2]].shape[0] for site, method in there), default=0)


def unreached(parts: Iterable[Part], adapter: Adapter) -> Iterator[str]:
    """What of an adapter none of these has: a sentence for layers, and one for ranks."""
    own, layers, ranks = list(parts), list[str](), list[str]()
    for site in adapter.methods:
        there = [p.r for p in own if p.sites is None or site in p.sites]
        known = [r for r in there if r is not None]
        if not there:
            layers.append(site)
        elif len(known) == len(there) and max(known) < most_ranks(adapter, frozenset({site})):
            ranks.append(site)
    for sites, told in (
        (layers, "{}: nothing trains there"),
        (ranks, "all ranks of {}: the last ones stay as they begin"),
    ):
        if sites:
            yield "no client has " + told.format(", ".join(sites[:3]) + (", ..." if len(sites) > 3 else ""))


def of_layers(sites: Sequence[str], found: set[str]) -> frozenset[str] | None:
    """Those that a client has; None where it has all."""
    own = frozenset(site for site in sites if site in found)
    return None if len(own) == len(sites) else own


def _first(t: Tensor, shape: tuple[int, int], made: dict[int, Tensor]) -> Tensor:
    if id(t) not in made:
        made[id(t)] = t.detach()[: shape[0], : shape[1]].clone().requires_grad_(t.requires_grad)
    return made[id(t)]


def _placed(old: Tensor, new: Tensor) -> Tensor:
    """`old` with `new` in its first rows and columns."""
    if new.shape == old.shape:
        return new
    whole = old.detach().clone()
    whole[tuple(slice(n) for n in new.shape)] = new.detach()
    return whole.requires_grad_(old.requires_grad)
