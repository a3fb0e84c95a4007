"""Privacy of whole clients (McMahan, Ramage, Talwar, Zhang 2018, arXiv:1710.06963): the server clips what each client
changes and adds noise to the mean.

    D = (1 / m) (sum_k D_k min(1, clip / |D_k|) + N(0, (noise clip)^2)),   |D_k| over all numbers that train

m is the number of clients that are asked in a round, whoever answers; all clients count alike.  The server itself sees
what clients send: it is trusted.  Who is asked follows from the federation's seed, so nothing is gained from those who
are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.adapter import Adapter
from ...core.ranges import Inside, NotNegative, Positive, Seed
from ..exact import Exact
from ..fair import FAIR
from ..flat import flat, unflat
from ..privacy import Federation, Privacy
from . import accounting
from .accounting import PRV
from .dpsgd import _Budget, planned


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
        if isinstance(federation.how, Exact | FAIR):
            yield (
                f"how: {federation.how!r} needs the update of each client, and under ClientLevel a mean with noise is "
                "all that there is: take FedIT, FFA, FedSVD or FLASC"
            )
        if federation.weights != "alike":
            yield 'weights: by rows, a client counts for as many as it says it has: take weights = "alike"'
        if self.delta * len(federation.names) >= 1:
            yield f"privacy: delta={self.delta:g} with {len(federation.names)} clients allows to tell of one outright"

    def noise_of(self, federation: Federation, name: str, rows: int) -> float | None:
        return self.multiplier(max(planned(federation).values()))

    def pooled(
        self, sent: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], federation: Federation, seed: int
    ) -> tuple[Sequence[Adapter], Sequence[float]]:
        noise = self.multiplier(max(planned(federation).values()))
        return [self.mean(sent, adapters, len(federation.chosen(1)), noise, (seed,))], [1.0]

    def spent(self, federation: Federation, asked: Mapping[str, int], rows: Mapping[str, int]) -> dict[str, Any]:
        noise = self.multiplier(max(planned(federation).values()))
        history = ((noise, 1.0, max(asked.values(), default=0)),)
        return self.told(accounting.epsilon(history, self.delta, self.accountant))
