"""The singular values of the updates of an adapter, and who gets how many of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Spectrum:
    """Singular values of one site's update dW, falling, in float64: all of them, or the first ones and a way to more.

    `whole` is ||dW||^2, `most` the largest rank that carries anything (1 at least: an update that is zero keeps one),
    `bytes` what a rank takes on disk.  `more(k)` gives the first k.
    """

    def __init__(
        self, values: Tensor, whole: float, most: int, bytes: int, more: Callable[[int], Tensor] | None = None
    ):
        self.values, self.whole, self.most, self.bytes, self.more = values, whole, most, bytes, more

    def first(self, k: int) -> Tensor:
        """The first k values, or all that there are."""
        k = min(k, self.most)
        if len(self.values) < k and self.more is not None:
            self.values = self.more(k)
        return self.values[:k]

    def tails(self) -> Tensor:
        """(K + 1): ||dW - its first k triples||^2 for k = 0 ... K, of the K values that are known.  Of all values the
        sum of the others, which does not cancel; of the first ones what they leave of `whole`."""
        squares = self.values.square()
        after = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        if self.more is None or len(squares) >= self.most:
            return after
        return (self.whole - torch.cat([squares.new_zeros(1), squares.cumsum(0)])).clamp_min(0)

    def least(self, missed: float) -> int:
        """The least rank, 1 or more, whose error is at most `missed` (squared)."""
        k = min(len(self.values), self.most) or 1
        while True:
            self.first(k)
            found = (self.tails() <= missed).nonzero()
            if len(found) or k >= self.most:
                return min(max(1, int(found[0, 0]) if len(found) else self.most), self.most)
            k = min(4 * k, self.most)


def poured(spectra: Mapping[str, Spectrum], room: float, costs: Mapping[str, float] | None = None) -> dict[str, int]:
    """Ranks of all sites from one budget: singular triples in the order of sigma^2 per cost until `room` is spent,
    equal ones in the order of the sites.

    With equal costs (None: a rank costs 1) that is the best there is: of all choices of so many ranks it misses least,
    sum_s sum_{i > k_s} sigma_si^2, since at each site the values fall.  With others it is the greedy rule of the
    knapsack, and what no longer fits is passed over, with its site.
    """
    for spectrum in spectra.values():
        spectrum.first(64)
    while True:
        found = _poured(spectra, room, costs)
        short = [s for s, k in found.items() if k == len(spectra[s].values) < spectra[s].most]
        if not short:
            return found
        for s in short:
            spectra[s].first(4 * found[s])


def _poured(spectra: Mapping[str, Spectrum], room: float, costs: Mapping[str, float] | None) -> dict[str, int]:
    names = list(spectra)
    values = [spectra[s].first(len(spectra[s].values)) for s in names]
    each = [1.0 if costs is None else costs[s] for s in names]
    worth = torch.cat([v.square() / c for v, c in zip(values, each, strict=True)])
    of = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(v) for v in values]))
    order = of[torch.sort(worth, descending=True, stable=True).indices].tolist()
    ranks, closed = [0] * len(names), [False] * len(names)
    for i in order:
        if closed[i]:
            continue
        if each[i] > room:
            closed[i] = True
        else:
            ranks[i], room = ranks[i] + 1, room - each[i]
    return dict(zip(names, ranks, strict=True))
