"""How far an adapter is squeezed: what is asked for, and the ranks that follow from the singular values."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from ..core.choice import Choice
from ..core.ranges import INT64, Count, NotNegative, Range, Rank, SomeShare
from .spectrum import Spectrum, poured

Bytes = Annotated[int, Range(least=1, most=INT64)]


class Target(Choice):
    """(spectra of all sites) -> the rank of each."""

    @abc.abstractmethod
    def ranks(self, spectra: Mapping[str, Spectrum], size: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
        """The rank of each site; 0 leaves it out.  `size` tells how many bytes the adapter with such ranks takes on
        disk.  Raises ValueError for what cannot be reached."""


class EachSite(Target):
    """A target that each site meets by itself; every site keeps one rank at least."""

    @abc.abstractmethod
    def at(self, spectrum: Spectrum) -> int:
        """The rank of a site with these singular values."""

    def ranks(self, spectra: Mapping[str, Spectrum], size: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
        return {site: self.at(spectrum) for site, spectrum in spectra.items()}


@Target.register
@dataclass(frozen=True)
class ByRank(EachSite):
    """Rank r at every site, or what its update has where that is less: no error comes from that."""

    r: Rank

    def at(self, spectrum: Spectrum) -> int:
        return min(self.r, spectrum.most)


@Target.register
@dataclass(frozen=True)
class ByEnergy(EachSite):
    """At each site the least rank k that keeps the share: sum_{i <= k} sigma_i^2 >= share ||dW||^2."""

    share: SomeShare

    def at(self, spectrum: Spectrum) -> int:
        return spectrum.least((1 - self.share) * spectrum.whole * ROUNDING)


@Target.register
@dataclass(frozen=True)
class ByError(EachSite):
    """At each site the least rank whose relative error ||dW - dW_k|| / ||dW|| is at most this; so is the whole's."""

    error: NotNegative

    def at(self, spectrum: Spectrum) -> int:
        return spectrum.least(self.error**2 * spectrum.whole * ROUNDING)


@Target.register
@dataclass(frozen=True)
class ByBudget(Target):
    """So many ranks over all sites together, where they keep most: the largest singular values of the whole adapter.
    No other choice of so many ranks has a smaller error.  Sites that get none are left out."""

    total: Count

    def ranks(self, spectra: Mapping[str, Spectrum], size: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
        return poured(spectra, self.total)


@Target.register
@dataclass(frozen=True)
class BySize(Target):
    """At most so many bytes on disk: all that `Adapter.save` writes (numbers, names, configuration, README).  The room
    is spent on the singular values that keep most for their bytes; sites that get none are left out."""

    bytes: Bytes

    def ranks(self, spectra: Mapping[str, Spectrum], size: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
        costs = {s: float(spectrum.bytes) for s, spectrum in spectra.items()}
        best: dict[str, int] = {}
        least, most = 0.0, float(self.bytes - size(dict.fromkeys(spectra, 0)))  # for numbers: names take some of it too
        while most - least >= 1:
            room = (least + most) / 2
            found = poured(spectra, room, costs)
            if size(found) > self.bytes:
                most = room
            else:
                least, best = room, found
        if any(best.values()):
            return best
        least = min(size({**dict.fromkeys(spectra, 0), s: 1}) for s in spectra)
        raise ValueError(
            f"{self.bytes:,} bytes hold no rank of this adapter: one, with its names and configuration, takes {least:,}"
        )


ROUNDING = 1 + 1e-12  # of the sums that are compared: a tail that is exactly at the bound is within it
