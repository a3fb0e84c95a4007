"""Clients' factors as s B A with one scale and one rank: what aggregations of both factors compute with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.method import Factors, LowRank
from .aggregation import Client


@dataclass(frozen=True)
class Pairs:
    """B_k (O, R), A_k (R, I) of each client in float64, so that dW_k = scale B_k A_k; of fewer ranks than R the rest is
    zero.  `method` is the result's: that of the client with the highest rank."""

    method: LowRank
    like: Factors
    scale: float
    names: tuple[str, str]  # of B and A among the factors
    shares: tuple[float, ...]
    B: tuple[Tensor, ...]
    A: tuple[Tensor, ...]

    @property
    def rank(self) -> int:
        return self.A[0].shape[0]

    def factors(self, B_OR: Tensor, A_RI: Tensor) -> dict[str, Tensor]:
        """As the result's factors, in their type."""
        made = dict(self.like)
        for name, t in zip(self.names, (B_OR, A_RI), strict=True):
            made[name] = t.to(self.like[name].dtype).contiguous().requires_grad_(self.like[name].requires_grad)
        return made


def are_pairs(clients: Sequence[Client]) -> bool:
    """Whether the update of each is s B A of two factors as they are."""
    return all(isinstance(c.method, LowRank) and c.method.plain() is not None for c in clients)


def pairs_of(site: str, clients: Sequence[Client], what: str) -> Pairs:
    """Raises TypeError where the update is no product of two factors as they are, ValueError where clients have
    different methods."""
    told: list[tuple[Client, LowRank, tuple[float, str, str]]] = []
    for client in clients:
        plain = client.method.plain() if isinstance(client.method, LowRank) else None
        if plain is None:
            raise TypeError(
                f"{what} works on the two factors of an update s B A; {client.method!r} at {site} (client "
                f"{client.number}) stands on the rung {client.method.rung()} without such a pair: take FedIT (or, "
                "outside of rounds, Exact, which makes a LoRA of what is Additive)"
            )
        told.append((client, client.method, plain))  # type: ignore[arg-type]
    kinds = {type(client.method) for client in clients}
    if len(kinds) > 1:
        raise ValueError(f"{site} has different methods: {' and '.join(sorted(kind.__name__ for kind in kinds))}")
    R = max(client.factors[a].shape[0] for client, _, (_, _, a) in told)
    first, method, (scale, b, a) = next(each for each in told if each[0].factors[each[2][2]].shape[0] == R)
    Bs, As = [], []
    for client, _, (s, b_k, a_k) in told:
        B, A = s / scale * client.factors[b_k].detach().double(), client.factors[a_k].detach().double()
        Bs.append(nn.functional.pad(B, (0, R - B.shape[1])))
        As.append(nn.functional.pad(A, (0, 0, 0, R - A.shape[0])))
    return Pairs(method, first.factors, scale, (b, a), tuple(c.share for c in clients), tuple(Bs), tuple(As))


def weighted(shares: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_k p_k T_k."""
    return torch.stack([p * t for p, t in zip(shares, tensors, strict=True)]).sum(0)
