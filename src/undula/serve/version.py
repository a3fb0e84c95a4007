"""Adapters as requests mean them: a directory as it was registered, and a version that is computed with."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.adapter import Adapter
from ..io import diffusers, files, tensorfile
from .form import Form
from .request import Part

_numbers = itertools.count(1)
LONGEST = 200
Stamp = tuple[tuple[int, ...] | None, ...]


@dataclass(eq=False)
class Source:
    """One directory as it was registered: files replaced later are another one."""

    name: str
    path: Path
    stamp: Stamp
    form: Form
    number: int = field(default_factory=lambda: next(_numbers))
    digest: str | None = None  # of what it holds; known since it was first read
    current: bool = True  # whether its name still means it
    pinned: bool = False
    hits: int = 0
    misses: int = 0

    def __post_init__(self) -> None:
        self.version = Version((Part(self.name),), ((1.0, self),))


@dataclass(frozen=True, eq=False, repr=False)
class Version:
    """What a request's adapters mean, for as long as the request lives: one directory as it was registered, or a
    weighted sum of several.

    `id` is its name on the model; no two versions of a process share one, so it tells prefix blocks apart.
    """

    parts: tuple[Part, ...]
    terms: tuple[tuple[float, Source], ...]
    id: str = ""

    def __post_init__(self) -> None:
        told = "+".join(f"{s.name}#{s.number}" + ("" if w == 1 else f"*{w!r}") for w, s in self.terms)
        object.__setattr__(self, "id", told)

    @property
    def bytes(self) -> int:
        """What it takes in memory, as far as that is known."""
        return sum(source.form.bytes for _, source in self.terms)

    def __repr__(self) -> str:
        return f"Version({self.id!r})"

    @property
    def digest(self) -> str | None:
        """The hash of its weights, configuration and scales: equal for equal contents under any name.  None before it
        was loaded."""
        if any(source.digest is None for _, source in self.terms):
            return None
        if self.plain:
            return self.terms[0][1].digest
        told = sorted((str(source.digest), weight) for weight, source in self.terms)
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def plain(self) -> bool:
        """Whether it is one adapter as it is."""
        return len(self.terms) == 1 and self.terms[0][0] == 1.0

    @property
    def names(self) -> str:
        return " + ".join(repr(part.name) for part in self.parts)


def check_name(name: str) -> None:
    """Raises ValueError for a name that an address or a file system could take for something else."""
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= LONGEST
        or name != name.strip()
        or name.startswith(".")
        or not name.isprintable()
        or any(c in name for c in "/\\:")
    ):
        raise ValueError(
            f"{name!r:.80} is no name for an adapter: 1 to {LONGEST} printable characters without / \\ and :, that "
            "neither begin with a dot nor begin or end with a space"
        )


def stamp(path: Path) -> Stamp:
    """What tells that the files of an adapter directory are others, or were written into: place on the disk, size and
    times of each that is there."""
    found: list[tuple[int, ...] | None] = []
    for name in (files.CONFIG, files.TENSORS, diffusers.WEIGHTS):
        try:
            s = os.stat(path / name)
        except OSError:
            found.append(None)
        else:
            found.append((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    return tuple(found)


def digest(adapter: Adapter) -> str:
    """The hash of an adapter's methods, sites and numbers."""
    found = hashlib.sha256()
    kinds = {m: i for i, m in enumerate(dict.fromkeys(adapter.methods.values()))}
    sites = [(s, kinds[m], adapter.shapes[s], adapter.kernels.get(s)) for s, m in adapter.methods.items()]
    found.update(json.dumps([[m.encode() for m in kinds], sites, dict(adapter.apart)]).encode())
    seen: dict[int, int] = {}
    for site, name, t in [*adapter.tensors(), *(("", n, t) for n, t in adapter.full.items())]:
        told: Mapping | list = [site, name, str(t.dtype), list(t.shape), seen.setdefault(id(t), len(seen))]
        found.update(json.dumps(told).encode())
        if seen[id(t)] == len(seen) - 1:
            found.update(tensorfile.memory(t.detach().cpu().contiguous()))
    return found.hexdigest()
