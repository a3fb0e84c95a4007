"""Privacy of whole clients (McMahan, Ramage, Talwar, Zhang 2018, arXiv:1710.06963): the server clips what each client
changes and adds noise to the mean.

    D = (1 / m) (sum_k D_k min(1, clip / |D_k|) + N(0, (noise clip)^2)),   |D_k| over all numbers that train

m is the number of clients that are asked in a round, whoever answers; all clients count alike.  The server itself sees
what clients send: it is trusted.  Who is asked follows from the federation's seed, so nothing is gained from those who
are not.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.adapter import Adapter
from ...core.ranges import Inside, NotNegative, Positive, Seed
from ..flat import flat, unflat
from ..privacy import Federation, Privacy
from . import accounting
from .accounting import PRV
from .dpsgd import _Budget, rounds_with


@Privacy.register
@dataclass(frozen=True)
class ClientLevel(_Budget, Privacy):
    """epsilon: the target over all rounds, by which the noise is set; or noise: the multiplier itself.  delta: far
    below 1 / clients.  accountant, seed: as of `DPSGD`."""

    epsilon: Positive | None = None
    delta: Inside = 1e-5
    clip: Positive = 1.0
    noise: NotNegative | None = None
    accountant: str = PRV
    seed: Seed | None = None

    def multiplier(self, rounds: int) -> float:
        """The noise of so many rounds."""
        if self.noise is not None:
            return self.noise
        assert self.epsilon is not None
        return accounting.noise_for(self.epsilon, self.delta, 1.0, rounds, self.accountant)

    def mean(
        self, sent: Adapter, adapters: Sequence[Adapter], number: int, noise: float, key: Sequence[object] = ()
    ) -> Adapter:
        """`sent`, moved by the mean of the clients' clipped changes with noise on every number; `number`: m."""
        start = flat(sent)
        total = torch.zeros_like(start)
        for adapter in adapters:
            change = flat(adapter, sent) - start
            total += change * min(1.0, self.clip / max(float(change.norm()), 1e-30))
        source = accounting.generator(self.seed, "noise", *key)
        drawn = torch.randn(4, *start.shape, generator=source, dtype=torch.float64).sum(0) / 2  # as Opacus draws it
        return unflat(sent, start + (total + noise * self.clip * drawn) / number)

    def refusals(self, federation: Federation) -> Iterator[str]:
        if federation.how.needs_each:
            yield (
                f"how: {federation.how!r} needs the update of each client, and under ClientLevel a mean with noise is "
                "all that there is: take FedIT, FFA, FedSVD or FLASC"
            )
        if federation.weights != "alike":
            yield 'weights: by rows, a client counts for as many as it says it has: take weights = "alike"'
        if self.delta * len(federation.names) >= 1:
            yield f"privacy: delta={self.delta:g} with {len(federation.names)} clients allows to tell of one outright"

    def noise_of(self, federation: Federation, name: str, rows: int) -> float | None:
        if federation.party(name).epsilon is not None and federation.planned[name] and not self.most(federation, name):
            raise ValueError(
                f"its own epsilon of {federation.party(name).epsilon:g} allows no round: one alone costs "
                f"{self._after(federation, 1):.3g}"
            )
        return self.multiplier(max(federation.planned.values()))

    def pooled(
        self, sent: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], federation: Federation, seed: int
    ) -> tuple[Sequence[Adapter], Sequence[float]]:
        noise = self.multiplier(max(federation.planned.values()))
        return [self.mean(sent, adapters, len(federation.chosen(1)), noise, (seed,))], [1.0]

    def spent(self, federation: Federation, asked: Mapping[str, int], rows: Mapping[str, int]) -> dict[str, Any]:
        times = [min(n, self.most(federation, name)) for name, n in asked.items()]
        return self.told(self._after(federation, max(times, default=0)), federation)

    def most(self, federation: Federation, name: str) -> int:
        """The rounds that a client's own budget allows, of those that are planned."""
        most, own = federation.planned[name], federation.party(name).epsilon
        if own is None:
            return most
        return bisect.bisect_right(range(1, most + 1), own, key=lambda rounds: self._after(federation, rounds))

    def _after(self, federation: Federation, rounds: int) -> float:
        """Epsilon of a client that was in so many rounds."""
        noise = self.multiplier(max(federation.planned.values()))
        return accounting.epsilon(((noise, 1.0, rounds),), self.delta, self.accountant)

    def declined(self, federation: Federation, name: str, round: int) -> str:
        own, times = federation.party(name).epsilon, rounds_with(federation, name, round)
        if own is None or times <= (most := self.most(federation, name)):
            return ""
        return f"{name}: its own epsilon of {own:g} allows {most} rounds, which are over: it takes no part"
