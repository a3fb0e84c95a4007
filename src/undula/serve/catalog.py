"""What is registered by name: which directory it is, whether it is pinned, and what the parts of a request mean."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..io.outline import head
from ..io.tensorfile import Layouts
from .form import Forms
from .request import Part, Refused, Unknown
from .version import Source, Version, stamp

LARGEST = 1e6  # a scale: sums of them, and products with weights, stay finite in float32


@dataclass(frozen=True)
class Described:
    """One registered adapter, as a person wants to see it."""

    name: str
    id: str
    digest: str | None
    method: str
    rank: int | None
    bytes: int
    state: str  # registered, waiting, loading, loaded, in use, failed
    pinned: bool
    hits: int  # requests that found it in memory
    misses: int  # requests that it was read for


class Catalog:
    """Adapters by name, as they were registered, within the budget of a pool; who calls holds the pool's lock, but for
    `read` and `check_free`."""

    def __init__(self, forms: Forms, budget: int):
        self.forms, self.budget = forms, budget
        self.layouts = Layouts()
        self.sources: dict[str, Source] = {}
        self.pinned: set[Source] = set()
        self.sums: weakref.WeakValueDictionary[tuple, Version] = weakref.WeakValueDictionary()

    def read(self, name: str, path: Path, pin: bool) -> Source:
        """A directory as it is now, its configuration and header checked against the model.  Raises as
        `Pool.register`."""
        before = stamp(path)
        form = self.forms.of(head(path, self.layouts))
        if stamp(path) != before:
            raise ValueError(f"{path} was written to while it was read: register {name!r} again")
        return Source(name, path, before, form, pinned=pin)

    def put(self, source: Source) -> bool:
        """From now on its name means this source; whether it meant another one before.  Raises ValueError where it does
        not fit."""
        old = self.sources.get(source.name)
        self.check_fits(source.form.bytes, repr(source.name), {old} if source.pinned else set())
        if old is not None:
            self._forget(old)
        self.sources[source.name] = source
        if source.pinned:
            self.pinned.add(source)
        return old is not None

    def remove(self, name: str) -> None:
        """Raises Unknown."""
        self._forget(self.source(name))
        del self.sources[name]

    def pin(self, name: str, on: bool) -> Source:
        """Raises Unknown, and ValueError where the pinned ones do not fit together."""
        source = self.source(name)
        if on:
            self.check_fits(source.form.bytes, repr(name), {source})
        source.pinned = on
        (self.pinned.add if on else self.pinned.discard)(source)
        return source

    def source(self, name: str) -> Source:
        if name not in self.sources:
            raise Unknown(f"no adapter called {name!r:.80} is registered")
        return self.sources[name]

    def check_free(self, name: str) -> None:
        if name in self.sources:
            raise FileExistsError(
                f"an adapter called {name!r} is registered already (replace=True: another takes its place)"
            )

    def check_fits(self, size: int, names: str, among: set[Source | None]) -> None:
        """Raises ValueError for what would never fit beside the pinned ones that are not `among` it."""
        others = sum(source.form.bytes for source in self.pinned if source not in among)
        if size > self.budget - others:
            beside = f", of which pinned adapters take {others:,}" if others else ""
            budget = f"the pool's budget is {self.budget:,}{beside}"
            raise ValueError(f"{names} takes {size:,} bytes; {budget} (--memory)")

    def version(self, scales: Mapping[str, float]) -> Version | None:
        """What the names with these scales mean now.  Raises as `Pool.version`."""
        found = {name: self.source(name) for name in sorted(scales)}
        terms = tuple((scales[name], source) for name, source in found.items() if scales[name])
        if not terms:
            return None
        plain = len(terms) == 1 and terms[0][0] == 1.0
        version = terms[0][1].version if plain else self._sum(terms)
        try:
            self.check_fits(version.bytes, version.names, {source for _, source in terms} if plain else set())
        except ValueError as error:
            raise Refused(str(error)) from None
        return version

    def _forget(self, source: Source) -> None:
        """No name means it any more."""
        source.current = False
        self.pinned.discard(source)

    def _sum(self, terms: tuple[tuple[float, Source], ...]) -> Version:
        for _, source in terms:
            what = source.form.lacking or (f"it holds {source.form.full[0]} in full" if source.form.full else None)
            if what is not None:
                raise Refused(
                    f"{source.name!r} is served alone and with the scale 1, not scaled and not beside others: {what}"
                )
        key = tuple((source.number, weight) for weight, source in terms)
        version = self.sums.get(key)
        if version is None:
            parts = tuple(Part(source.name, weight) for weight, source in terms)
            version = Version(parts, terms)
            self.sums[key] = version
        return version


def total(parts: Sequence[Part]) -> dict[str, float]:
    """The scale of each name, of one that stands twice the sum.  Raises Refused for what is no scale."""
    scales: dict[str, float] = {}
    for part in parts:
        scale = part.scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= LARGEST:
            raise Refused(f"a scale is a finite number up to {LARGEST:g}; that of {part.name!r:.80} is {scale!r:.40}")
        scales[part.name] = scales.get(part.name, 0.0) + float(scale)
    return scales
