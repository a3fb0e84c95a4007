"""What a federation lets others learn of single rows, or of single clients: where privacy takes part in the rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..core.adapter import Adapter
from ..core.choice import Choice

Federation = Any  # a `spec.Federation`, which holds one of these


class Privacy(Choice):
    """Each of these does nothing where a kind does not need it."""

    def refusals(self, federation: Federation) -> Iterator[str]:
        """Why a federation cannot be private so: sentences that begin with the name of the setting they are about."""
        return iter(())

    def fit(self, fitter: Any, federation: Federation, rows: int, name: str, round: int) -> Any:
        """A client's training of one round on so many rows, by a Trainer that is ready: what `fitter.train()` gives."""
        return fitter.train()

    def noise_of(self, federation: Federation, name: str, rows: int) -> float | None:
        """The multiplier of the noise for a client that says it has so many rows; None where it is never asked.  Raises
        ValueError where it cannot be private so."""
        return None

    def declined(self, federation: Federation, name: str, round: int) -> str:
        """Why a client takes no part in a round that it is asked in; empty where it does."""
        return ""

    def reply(self, sent: Adapter, trained: Adapter) -> Adapter:
        """What a client lets out of where it has come to from what it was sent."""
        return trained

    def said(self, counts: dict[str, int | float]) -> dict[str, int | float]:
        """What a client lets out of {"num-examples", "loss", "steps"}."""
        return counts

    def pooled(
        self, sent: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], federation: Federation, seed: int
    ) -> tuple[Sequence[Adapter], Sequence[float]]:
        """What the server's aggregation gets in the place of the clients' adapters; all noise of the round follows the
        seed."""
        return adapters, weights

    def spent(self, federation: Federation, asked: Mapping[str, int], rows: Mapping[str, int]) -> dict[str, Any] | None:
        """{"epsilon", "delta", ...} where clients were asked so many times, `rows` being those that they have said."""
        return None
