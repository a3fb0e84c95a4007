"""FFA-LoRA (Sun, Li, Liu, Xu, Zhang, Ge, Sun 2024, arXiv:2403.12313): A stays as the server drew it, clients train B.

B = sum_k p_k B_k,   A = A_0:   sum_k p_k B_k A_0 = B A_0, the mean of the updates itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.method import Factors, Method
from .aggregation import Aggregation, Client
from .fedit import check_frozen
from .pairs import weighted


@Aggregation.register
@dataclass(frozen=True)
class FFA(Aggregation):
    """The average of the one factor in which the law is linear (`Method.linear_in`), all else equal to the bit among
    clients: so the mean of what the clients' layers compute is what the averaged layer computes, also of AuroRA, whose
    nonlinearity stays as it began.  Raises TypeError for a method that is linear in no factor (LoRAN), ValueError where
    what should have stayed differs."""

    source = "Sun et al. 2024, arXiv:2403.12313"
    trains = "linear"

    def at(self, site: str, clients: Sequence[Client], before: Factors | None) -> tuple[Method, Factors]:
        method, like = clients[0].method, clients[0].factors
        name = linear_factor(method, site)
        for client in clients[1:]:
            if client.method != method:
                raise ValueError(
                    f"{site} is {method!r} in client {clients[0].number} and {client.method!r} in client "
                    f"{client.number}: the frozen factors would not be the same"
                )
            check_frozen(site, clients[0], client, set(like) - {name})
        if before is not None:
            check_frozen(site, Client(0, 0.0, method, before), clients[0], set(like) - {name})
        mean = weighted([c.share for c in clients], [c.factors[name].detach().double() for c in clients])
        return method, {**like, name: mean.to(like[name].dtype).requires_grad_(like[name].requires_grad)}


def linear_factor(method: Method, site: str) -> str:
    """Raises TypeError for a method that has none."""
    if method.linear_in is None:
        raise TypeError(
            f"{method!r} at {site} (rung {method.rung()}) is linear in none of its factors: no average of one is the "
            "mean of what clients compute. FedIT averages all factors, with a bias"
        )
    return method.linear_in
