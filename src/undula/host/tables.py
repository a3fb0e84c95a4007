"""Tables in which frozen adapters lie: rows of one width, given out in runs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.method import Method

ROOM = 1.5  # tables that hold so many times what lies in them are packed
Mark = tuple[Any, ...]
Sites = tuple[tuple[str, int, int], ...]  # (path, O, I)


@dataclass(frozen=True)
class Kind:
    """What tables of a shelf hold: "A", "B", or the parameters of a bend of one shape."""

    name: str
    dtype: torch.dtype
    shape: torch.Size = torch.Size()

    def width(self, O: int, I: int) -> int:
        return {"A": I, "B": O}.get(self.name) or self.shape.numel()


@dataclass(frozen=True)
class Spot:
    """Where an adapter lies in the tables of a site, and its law y' = g (y - bias + s B bend(A x)) + bias: r rows of A
    and of B from `a` and `b` on, and g in the row after those of B."""

    A: Kind
    B: Kind
    a: int
    b: int
    r: int
    s: float
    gain: bool
    bend: Method | None  # whose `bent` stands between A and B
    bent: tuple[tuple[str, Kind, int], ...]  # (parameter of the bend, its kind, its row)
    own: tuple[str, str] | None  # the factors B and A that lie there themselves; None of what is made of them
    drops: bool

    def rows(self) -> list[tuple[Kind, int, int]]:
        """(kind, first row, how many) of what it has in the tables."""
        pair = [(self.A, self.a, self.r), (self.B, self.b, self.r + self.gain)]
        return [*pair, *((kind, row, 1) for _, kind, row in self.bent)]

    def at(self, starts: Mapping[Kind, int]) -> Spot:
        """The same in other rows."""
        bent = tuple((name, kind, starts[kind]) for name, kind, _ in self.bent)
        return replace(self, a=starts[self.A], b=starts[self.B], bent=bent)


@dataclass(frozen=True)
class Placing:
    """What of an adapter lies on a shelf at one site."""

    parts: Mapping[str, Tensor]  # A (R, I), B (O, R), maybe gain (O), and the parameters of a bend
    s: float = 1.0
    own: tuple[str, str] | None = None
    bend: Method | None = None
    drops: bool = False

    @property
    def r(self) -> int:
        return len(self.parts["A"])

    @property
    def bent(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.parts.items() if name not in ("A", "B", "gain")}


class Runs:
    """Numbers from 0 on, given out in runs and taken back."""

    def __init__(self) -> None:
        self.end = self.most = 0  # most: the highest end so far
        self.free: list[tuple[int, int]] = []  # (start, length), in order, none beside another or at the end

    def take(self, n: int) -> int:
        """The start of n numbers: the first free run that has so many, or the end."""
        for i, (start, length) in enumerate(self.free):
            if length >= n:
                self.free[i : i + 1] = [(start + n, length - n)] if length > n else []
                return start
        self.end += n
        self.most = max(self.most, self.end)
        return self.end - n

    @property
    def given(self) -> int:
        """How many are out."""
        return self.end - sum(length for _, length in self.free)

    def give(self, start: int, n: int) -> None:
        """Makes a run free."""
        joined: list[tuple[int, int]] = []
        for at, length in sorted([*self.free, (start, n)]):
            if joined and sum(joined[-1]) == at:
                joined[-1] = joined[-1][0], joined[-1][1] + length
            else:
                joined.append((at, length))
        if joined and sum(joined[-1]) == self.end:
            self.end = joined.pop()[0]
        self.free = joined


class Shelf:
    """Adapters with the same sites.  Tables that are to hold `reserve` bytes of pairs have the room from the beginning
    (of a CPU the addresses alone: memory is taken as rows are written), so that none is copied to grow."""

    def __init__(self, sites: Sites, devices: Mapping[str, torch.device], reserve: int = 0):
        self.sites, self.devices, self.reserve = sites, dict(devices), reserve
        self.there: list[dict[str, Spot]] = []  # where each adapter lies, by site
        self.runs: dict[Kind, Runs] = {}
        self.tables: dict[str, dict[Kind, Tensor]] = {path: {} for path, _, _ in sites}
        self.marks: dict[str, Mark] = {}  # of the weights that gains were made of

    @torch.no_grad()
    def put(self, placing: Mapping[str, Placing]) -> dict[str, Spot]:
        """Copies an adapter's parts into the tables.  Returns where, of equal places one object."""
        longest: dict[Kind, int] = {}
        for placed in placing.values():
            for kind, n in _needs(placed):
                longest[kind] = max(longest.get(kind, 0), n)
        starts = {kind: self.runs.setdefault(kind, Runs()).take(n) for kind, n in longest.items()}
        spots: list[Spot] = []
        found = {}
        for path, O, I in self.sites:
            new = _spot(placing[path], starts)
            spot = next((s for s in spots if s == new), new)
            spots += [spot] if spot is new else []
            found[path] = spot
            self._write(path, O, I, placing[path], spot)
        self.there.append(found)
        return found

    def _write(self, path: str, O: int, I: int, placed: Placing, spot: Spot) -> None:
        parts, tables = placed.parts, self.tables[path]
        for kind in (spot.A, spot.B, *(kind for _, kind, _ in spot.bent)):
            end = self.runs[kind].end
            if kind not in tables or len(tables[kind]) < end:
                tables[kind] = self._grown(tables.get(kind), path, kind, end, kind.width(O, I))
        tables[spot.A][spot.a : spot.a + spot.r] = parts["A"]
        tables[spot.B][spot.b : spot.b + spot.r] = parts["B"].t()
        if spot.gain:
            tables[spot.B][spot.b + spot.r] = parts["gain"]
        for name, kind, row in spot.bent:
            tables[kind][row] = parts[name].flatten()

    def _grown(self, table: Tensor | None, path: str, kind: Kind, end: int, width: int) -> Tensor:
        """A table with `end` rows at least, and some more where it has been in use: that it seldom grows."""
        if table is None:
            rows = end
            if kind.name in ("A", "B") and self.devices[path].type == "cpu":
                rows = max(end, self.reserve // (kind.dtype.itemsize * sum(O + I for _, O, I in self.sites)))
            return torch.empty(rows, width, dtype=kind.dtype, device=self.devices[path])
        more = max(end, len(table) + len(table) // 2) - len(table)
        return torch.cat([table, table.new_empty(more, width)])

    def take(self, spots: Mapping[str, Spot]) -> None:
        """Makes an adapter's places free; and their memory where what was written is `ROOM` times what is left."""
        self.there = [each for each in self.there if each is not spots]
        for kind, (start, n) in _lying(spots).items():
            self.runs[kind].give(start, n)
        if not self.there:
            return
        widths = {kind: kind.dtype.itemsize * sum(kind.width(O, I) for _, O, I in self.sites) for kind in self.runs}
        written = sum(width * self.runs[kind].most for kind, width in widths.items())
        if written > ROOM * sum(width * self.runs[kind].given for kind, width in widths.items()):
            self._pack()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _pack(self) -> None:
        """Moves all that lies here together, into new tables: rows that were written keep their memory else."""
        self.runs, moves = {}, []
        for spots in self.there:
            starts = {kind: self.runs.setdefault(kind, Runs()).take(n) for kind, (_, n) in _lying(spots).items()}
            moves.append({id(spot): spot.at(starts) for spot in spots.values()})
        for path, O, I in self.sites:
            old, new = self.tables[path], dict[Kind, Tensor]()
            for spots, to in zip(self.there, moves, strict=True):
                was = spots[path]
                for (kind, start, n), (_, at, _) in zip(was.rows(), to[id(was)].rows(), strict=True):
                    if kind not in new:
                        new[kind] = self._grown(None, path, kind, self.runs[kind].end, kind.width(O, I))
                    new[kind][at : at + n] = old[kind][start : start + n]
            self.tables[path] = new
        for spots, to in zip(self.there, moves, strict=True):
            spots.update({path: to[id(spot)] for path, spot in spots.items()})
        give_back()

    def to(self, path: str, device: torch.device) -> None:
        """Puts the tables of one site on a device."""
        if self.devices[path] != device:
            self.tables[path] |= {kind: t.to(device) for kind, t in self.tables[path].items()}
            self.devices[path] = device


def _lying(spots: Mapping[str, Spot]) -> dict[Kind, tuple[int, int]]:
    """(first row, how many) of each kind that an adapter has at its sites: it begins at the same row at all."""
    found: dict[Kind, tuple[int, int]] = {}
    for spot in {id(s): s for s in spots.values()}.values():
        for kind, start, n in spot.rows():
            found[kind] = start, max(n, found.get(kind, (start, 0))[1])
    return found


def _needs(placed: Placing) -> list[tuple[Kind, int]]:
    """The rows of each kind that an adapter's parts take at a site."""
    A, B = Kind("A", placed.parts["A"].dtype), Kind("B", placed.parts["B"].dtype)
    return [(A, placed.r), (B, placed.r + ("gain" in placed.parts)), *((k, 1) for k in _bent_kinds(placed).values())]


def _bent_kinds(placed: Placing) -> dict[str, Kind]:
    return {name: Kind(f"bend {name}", t.dtype, t.shape) for name, t in placed.bent.items()}


def _spot(placed: Placing, starts: Mapping[Kind, int]) -> Spot:
    (A, _), (B, _), *_ = _needs(placed)
    bent = tuple((name, kind, starts[kind]) for name, kind in _bent_kinds(placed).items())
    law = placed.s, "gain" in placed.parts, placed.bend, bent, placed.own, placed.drops
    return Spot(A, B, starts[A], starts[B], placed.r, *law)


def give_back() -> None:
    """Gives memory that was freed back to the system, where glibc's allocator would keep it: that of pieces below a
    threshold, which rises to 32 MB as larger ones are freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
