"""(adapters, weights) -> adapter: what merging, soups and federated averaging have in common."""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from ..core.adapter import Adapter, Live
from ..core.choice import Choice
from ..io.sites import Opened, walk
from .update import Layer, Made, layer_of
from .weighted import agreed, averaged

Source = Adapter | Opened
LARGEST = 1e12  # of a weight: squares of what it makes larger are beyond float32
SameBase = Callable[[str, str], bool]


def equal_names(one: str, other: str) -> bool:
    """Whether two names of a base are one."""
    return one.rstrip("/") == other.rstrip("/")


class Combiner(Choice):
    """Several adapters of one base as one.  It works on values in memory, and layer by layer on directories (`steps`)
    without the base.  A layer that an adapter has not counts as an update of zero there, with a `Missing` warning."""

    @torch.no_grad()
    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
        """The combination; without weights each counts 1.  Parameters in full are averaged, by weights that sum to 1.

        Raises ValueError for no adapters, adapters of other bases, weights that do not go with them or with this way;
        TypeError for an adapter below the Additive rung.
        """
        values = [a.copy() if isinstance(a, Live) else a for a in adapters]
        weights = self.weights(weights, len(values))
        shares = self.shares(weights)
        full = averaged(list(zip(shares, values, strict=True)))
        parts = [made.part for made in self.steps(values, weights)]
        named = ("methods", "factors", "shapes", "kernels", "apart")
        merged = {n: {k: v for part in parts for k, v in getattr(part, n).items()} for n in named}
        return Adapter(**merged, full=full, about=agreed(values), weight=math.fsum(shares) if full else 1.0)

    def steps(
        self, adapters: Sequence[Source], weights: Sequence[float] | None = None, same_base: SameBase = equal_names
    ) -> Iterator[Made]:
        """The combination one layer at a time, of adapters or opened directories, and what each layer misses."""
        weights = self.weights(weights, len(adapters))
        check_one_base(adapters, same_base)
        for told in missing(adapters):
            warnings.warn(told, Missing, stacklevel=3)
        with torch.no_grad():
            for site, parts in walk(adapters):
                yield self.at(layer_of(site, parts, weights))

    @abc.abstractmethod
    def at(self, layer: Layer) -> Made:
        """The combination at one layer."""

    def shares(self, weights: Sequence[float]) -> list[float]:
        """The weights of parameters in full, whatever becomes of the updates."""
        return list(weights)

    def weights(self, weights: Sequence[float] | None, number: int) -> tuple[float, ...]:
        """One finite weight per adapter, not all of them 0.  Raises ValueError."""
        given = one_each(weights, number)
        if not any(given):
            raise ValueError(f"with weights that are all 0 nothing is left of the adapters: {list(given)}")
        return given


def one_each(weights: Sequence[float] | None, number: int) -> tuple[float, ...]:
    """One finite weight per adapter, 1 each by default.  Raises ValueError."""
    if not number:
        raise ValueError("there is nothing to combine: give at least one adapter")
    given = tuple(1.0 for _ in range(number)) if weights is None else tuple(map(float, weights))
    if len(given) != number:
        raise ValueError(f"{number} adapters take {number} weights, found {len(given)}: {list(given)}")
    if not all(abs(w) <= LARGEST for w in given):
        raise ValueError(f"weights are finite numbers of at most {LARGEST:g} in size, found {list(given)}")
    return given


class Missing(UserWarning):
    """An adapter has nothing at layers that others adapt: its update there counts as zero."""


def missing(adapters: Sequence[Source]) -> list[str]:
    """What to say of layers that some of the adapters have not."""
    every = dict.fromkeys(site for a in adapters for site in a.methods)
    told = []
    for name, a in zip(_names(adapters), adapters, strict=True):
        lacks = [site for site in every if site not in a.methods]
        if lacks:
            shown = ", ".join(lacks[:3]) + (" ..." if lacks[3:] else "")
            told.append(
                f"{name} has nothing at {len(lacks)} of {len(every)} layers: its update is zero there ({shown})"
            )
    return told


def bases(adapters: Sequence[Source]) -> list[tuple[str, str]]:
    """(adapter, the base that it says it is for), of those that say one."""
    said = [(a.outline if isinstance(a, Opened) else a).about.get("base_model_name_or_path") for a in adapters]
    return [(name, str(base)) for name, base in zip(_names(adapters), said, strict=True) if base]


def check_one_base(adapters: Sequence[Source], same: SameBase = equal_names) -> None:
    """Raises ValueError for adapters that say they are for different models."""
    said = bases(adapters)
    for name, base in said[1:]:
        if not same(said[0][1], base):
            raise ValueError(
                f"{said[0][0]} is for {said[0][1]} and {name} for {base}: adapters of one base can be combined. Where "
                "both names mean one model, let both say the same (base_model_name_or_path in adapter_config.json)"
            )


def _names(adapters: Sequence[Source]) -> list[str]:
    return [str(a.path) if isinstance(a, Opened) else f"adapter {i}" for i, a in enumerate(adapters, 1)]
