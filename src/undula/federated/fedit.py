"""FedIT (Zhang et al. 2024, arXiv:2305.05644): federated averaging of the factors, each by itself.

    A = sum_k p_k A_k / sum_k p_k (of the clients that have the layer),   B = sum_k p_k B_k

Not the mean of the updates: sum_k p_k B_k A_k - B A is the covariance of the clients' factors, see `bias`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.method import Factors, Method
from .aggregation import Aggregation, Client
from .pairs import are_pairs, pairs_of, weighted


@Aggregation.register
@dataclass(frozen=True)
class FedIT(Aggregation):
    """The plain average of what clients train.  On every rung: methods without a pair are averaged factor by factor,
    and have then to be the same in all clients, what is frozen to the bit.  LoRAs may have different ranks and scales:
    those of fewer ranks count as zero in the rest (Cho et al. 2024, arXiv:2401.06432)."""

    source = "Zhang et al. 2024, arXiv:2305.05644; ranks: Cho et al. 2024, arXiv:2401.06432"

    def at(self, site: str, clients: Sequence[Client], before: Factors | None) -> tuple[Method, Factors]:
        if are_pairs(clients):
            pairs = pairs_of(site, clients, "FedIT")
            whole = math.fsum(pairs.shares)
            A = weighted([p / whole for p in pairs.shares] if whole else [1 / len(clients)] * len(clients), pairs.A)
            return pairs.method, pairs.factors(weighted(pairs.shares, pairs.B), A)
        return factor_by_factor(site, clients)


def factor_by_factor(site: str, clients: Sequence[Client]) -> tuple[Method, Factors]:
    """The mean of what trains.  Raises ValueError where clients differ in what cannot be averaged."""
    method, like = clients[0].method, clients[0].factors
    for client in clients[1:]:
        if client.method != method:
            raise ValueError(
                f"{site} is {method!r} in client {clients[0].number} and {client.method!r} in client {client.number}"
            )
        check_frozen(site, clients[0], client, {name for name, t in like.items() if not t.requires_grad})
    whole = math.fsum(client.share for client in clients)
    if not math.isclose(whole, 1.0):
        raise ValueError(
            f"some clients have nothing at {site}: the mean of {method!r} with nothing is no {type(method).__name__}. "
            "Let all adapt the same layers"
        )
    made = {
        name: weighted([c.share for c in clients], [c.factors[name].detach().double() for c in clients])
        .to(t.dtype).requires_grad_() if t.requires_grad else t
        for name, t in like.items()
    }  # fmt: skip
    return method, made


def check_frozen(site: str, one: Client, other: Client, names: set[str]) -> None:
    """Raises ValueError unless these factors are the same to the bit."""
    for name in sorted(names):
        a, b = one.factors[name], other.factors.get(name)
        if b is None or a.shape != b.shape or not torch.equal(a, b):
            raise ValueError(
                f"{site}.{name} is frozen and not the same in client {one.number} and client {other.number}: all "
                "clients begin with one adapter, that of the server"
            )
