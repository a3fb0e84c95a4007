"""quantise: an adapter stored as integers of 8 or 4 bits, with the error at every site.  The form on disk:
`undula.io.packing`.

Reading makes numbers of the integers: whatever takes an adapter takes this one, computes as fast as before, and holds
as much memory.  What is saved or exported from there holds numbers again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Additive, Factors, LowRank
from ..host.sharded import check_whole
from ..host.views import outline
from ..io.native import Once
from ..io.packing import SCALE, Packing, is_packed
from ..io.reading import key_of
from ..io.sites import Opened, Writer
from ..kernels import svd
from ..kernels.svd import without
from .squeezing import InFull, Seen, files_of, padding_of, relative
from .updates import blocks_of, check_finite, inside


@dataclass(frozen=True)
class Quantised:
    """A quantised adapter as it is read, and what that cost.

    errors[site] = ||dW' - dW|| / ||dW||, of DoRA of the update inside; at the sites in `by_factors`, whose methods have
    no update dW, the same of the factors.  `error` is that of all sites together.
    """

    adapter: Adapter
    errors: dict[str, float]
    error: float
    by_factors: tuple[str, ...]
    packing: Packing
    given: Adapter | None = field(default=None, repr=False)  # None: it stands in a directory

    def save(self, path: str | Path) -> int:
        """Writes the directory with the integers; returns the bytes of its files."""
        if self.given is None:
            raise ValueError("this one stands in the directory that it was written to")
        with PackedWriter(path, self.packing) as writer:
            for site in self.given.methods:
                writer.add(self.given.site(site))
            writer.finish(self.given.full, self.given.about, self.given.weight)
        return files_of(path)


def quantise(adapter: Adapter, bits: int, group: int, seen: Seen | None) -> Quantised:
    """See `undula.compress.quantise`."""
    adapter.check_usable()
    check_whole(adapter.parameters(), "quantising")
    how = Packing(bits, group, _dtype(adapter))
    rounded = Rounding(how, kept=True)
    costs = _Costs(adapter)
    factors = {}
    for site, f in adapter.factors.items():
        factors[site] = rounded(f, worth(adapter, site, f))
        costs.add(site, f, factors[site], seen)
    return Quantised(replace(adapter, factors=factors), *costs.told(), how, adapter)


def quantise_directory(
    path: str | Path, out: str | Path, bits: int = 8, group: int = 64, seen: Seen | None = None
) -> Quantised:
    """`quantise` of the adapter in a directory into another one, in the memory of a layer and what layers share.  What
    comes back holds the outline of the adapter."""
    with Opened(path) as opened:
        whole, costs = opened.outline, _Costs(opened.outline)
        whole.check_usable()
        how = Packing(bits, group, _dtype(whole))
        rounded = Rounding(how, kept=False)
        with PackedWriter(out, how) as writer:
            for site in whole.methods:
                part = opened.site(site)
                f = part.factors[site]
                costs.add(site, f, rounded(f, worth(part, site, f)), seen)
                writer.add(part)
            made = writer.finish(InFull(opened), whole.about, whole.weight)
    return Quantised(made, *costs.told(), how)


def worth(adapter: Adapter, site: str, f: Factors) -> set[str]:
    """The factors of a site that become integers: large ones that no seed makes."""
    seeded = adapter.methods[site].rebuilt(outline(site, adapter.shapes[site]))
    return {name for name, t in f.items() if name not in seeded and is_packed(t, adapter.shapes[site])}


class Rounding:
    """(factors of a site, those that are worth it) -> the factors as they are read again.  Of a tensor that sites share
    the first site decides, as in the file; where `kept`, what was made of one is one."""

    def __init__(self, how: Packing, kept: bool):
        self.how, self.kept = how, kept
        self.worth = False
        self.decided = Once(lambda _: self.worth)
        self.made: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, f: Factors, names: set[str]) -> dict[str, Tensor]:
        found = {}
        for name, t in f.items():
            self.worth = name in names
            found[name] = self._one(name, t) if self.decided(t) else t
        return found

    def _one(self, name: str, t: Tensor) -> Tensor:
        if id(t) in self.made:
            return self.made[id(t)]
        made = self.how.unpack(*self.how.pack(t), t.shape, name).requires_grad_(t.requires_grad)
        if self.kept:
            self.made[id(t)] = made
        return made


def _dtype(adapter: Adapter) -> torch.dtype:
    """The type in which the numbers are read again: the widest that is there."""
    found = [f[name].dtype for site, f in adapter.factors.items() for name in worth(adapter, site, f)]
    return functools.reduce(torch.promote_types, found) if found else torch.float32


class _Costs:
    """What quantising costs, site by site."""

    def __init__(self, outline: Adapter):
        self.outline = outline
        self.missed: dict[str, tuple[float, float]] = {}
        self.by_factors: list[str] = []

    @torch.no_grad()
    def add(self, site: str, f: Factors, g: Factors, seen: Seen | None) -> None:
        check_finite(site, f)
        try:
            law = inside(site, self.outline.methods[site])
        except TypeError:
            self.by_factors.append(site)
            pairs = [(f[k].double(), g[k].double()) for k in f if f[k].is_floating_point()]
            sizes = [(float((a - b).square().sum()), float(a.square().sum())) for a, b in pairs]
            self.missed[site] = sum(m for m, _ in sizes), sum(w for _, w in sizes)
        else:
            self.missed[site] = self._of_update(site, law, f, g)
        if seen is not None:
            seen(site)

    def _of_update(self, site: str, law: Additive, f: Factors, g: Factors) -> tuple[float, float]:
        """(||dW' - dW||^2, ||dW||^2)."""
        f, g = ({k: t.double() if t.is_floating_point() else t for k, t in each.items()} for each in (f, g))
        padding, shape = padding_of(self.outline, site), self.outline.shapes[site]
        if isinstance(law, LowRank):
            (B, A), (C, D) = law.pair(f), law.pair(g)
            A, D = without(A, padding), without(D, padding)
            difference = svd.factored_values(torch.cat([B, C], 1), torch.cat([A, -D]))
            return float(difference.square().sum()), float(svd.factored_values(B, A).square().sum())
        blocks = [blocks_of(law, each, shape, padding) for each in (f, g)]
        missed = sum(float((a - b).square().sum()) for (_, a), (_, b) in zip(*(m.each() for m in blocks), strict=True))
        return missed, blocks[0].square()

    def told(self) -> tuple[dict[str, float], float, tuple[str, ...]]:
        """(errors of the sites, of all together, which of them are of factors)."""
        whole = relative(sum(m for m, _ in self.missed.values()), sum(w for _, w in self.missed.values()))
        return {s: relative(*pair) for s, pair in self.missed.items()}, whole, tuple(self.by_factors)


class PackedWriter(Writer):
    """A `Writer` whose large factors become integers."""

    def __init__(self, path: str | Path, how: Packing):
        super().__init__(path)
        self.how = how
        self.packed: set[str] = set()

    def add(self, part: Adapter) -> None:
        for site, f in part.factors.items():
            self.packed = {key_of(site, name) for name in worth(part, site, f)}
            super().add(part.site(site))

    def _put(self, t: Tensor) -> Tensor:
        if self.next not in self.packed:
            return super()._put(t)
        check_finite(self.next, {"numbers": t})
        q, scale = self.how.pack(t)
        self.spool.put(self.next, q)
        self.spool.put(self.next + SCALE, scale)
        return torch.empty(t.shape, dtype=t.dtype, device="meta").requires_grad_(t.requires_grad)

    def _stored(self, config: dict[str, Any], keys: set[str]) -> set[str]:
        scales = {key + SCALE for key in keys} & set(self.spool.outlines)
        tied = {k: v for k, v in config["undula"]["tied"].items() if v + SCALE in scales}
        config["undula"]["tied"] |= {k + SCALE: v + SCALE for k, v in tied.items()}
        config["undula"]["quantised"] = self.how.encode()
        return keys | scales
