"""FLASC (Kuo, Raje, Rajesh, Smith 2024, arXiv:2406.05233; Raje's thesis CMU-CS-24-123): sparse messages both ways,
dense training.

P: all numbers of the adapter that train, one vector of n.

    down      clients get top(P, down n), zero elsewhere; they train all of it, and end at E_k
    up        they send top(E_k - start, up n) of the change, each by its own mask
    server    the mean change, weighted by the shares, is a negative gradient for Adam on P

Which numbers are the largest is asked of all layers together; of equal ones the first counts.

With `from_start` what counts is the change since the rounds began, whose start P_0 all draw from the seed: clients get
P_0 + top(P - P_0, down n).  So a factor that begins at random keeps the numbers that nobody has sent, where the
published form has zeros in their place, and no B waits until it is larger than an A that nobody has trained
(interpretation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Factors, Method
from ..core.ranges import PartShare, Positive, SomeShare
from .aggregation import Aggregation, Client, State, checked
from .fedit import check_frozen
from .flat import flat, unflat


@Aggregation.register
@dataclass(frozen=True)
class FLASC(Aggregation):
    """`down` and `up` are the shares of numbers that are sent; 1 and 1 is federated Adam (Reddi et al. 2021,
    arXiv:2003.00295).  It sees numbers alone, so it works on every rung; clients have the server's layers and methods.
    Its moments are in the `state` of the rounds, and with `from_start` P_0."""

    source = "Kuo et al. 2024, arXiv:2406.05233"
    sparse = True

    down: SomeShare = 0.25
    up: SomeShare = 0.25
    lr: Positive = 1e-3
    beta1: PartShare = 0.9
    beta2: PartShare = 0.999
    eps: Positive = 1e-8
    from_start: bool = False

    @property
    def knows_start(self) -> bool:
        return self.from_start

    def told(self, adapter: Adapter, first: Adapter) -> Adapter:
        P = flat(adapter)
        return unflat(adapter, top(P - flat(first) if self.from_start else P, self.down))

    def sent(self, adapter: Adapter, first: Adapter) -> Adapter:
        told = self.told(adapter, first)
        return unflat(adapter, flat(first) + flat(told)) if self.from_start else told

    def reply(self, sent: Adapter, trained: Adapter) -> Adapter:
        start = flat(sent)
        return unflat(trained, start + top(flat(trained) - start, self.up))

    @torch.no_grad()
    def __call__(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None = None,
        before: Adapter | None = None,
        state: State | None = None,
    ) -> Adapter:
        """One step of Adam from `before`, the server's own adapter (not what was sent), by the clients' changes.
        Raises ValueError without it."""
        values, shares = checked(adapters, weights)
        if before is None:
            raise ValueError("FLASC moves the server's adapter by the clients' changes: give it (before=...)")
        for number, a in enumerate(values, 1):
            check_same(a, number, before)
        state = {} if state is None else state
        first = unflat(before, state.setdefault("first", flat(before))) if self.from_start else before
        start, P = flat(self.sent(before, first)), flat(before)
        change = torch.stack(
            [p * top(flat(a, before) - start, self.up) for p, a in zip(shares, values, strict=True)]
        ).sum(0)
        m, v = (state.get(name, torch.zeros_like(P)) for name in ("m", "v"))
        steps = int(state.get("steps", torch.tensor(0))) + 1
        m, v = torch.lerp(-change, m, self.beta1), torch.lerp(change.square(), v, self.beta2)
        state.update(m=m, v=v, steps=torch.tensor(steps))
        denominator = (v / (1 - self.beta2**steps)).sqrt() + self.eps
        return unflat(before, P - self.lr * m / (1 - self.beta1**steps) / denominator)

    def at(self, site: str, clients: Sequence[Client], before: Factors | None) -> tuple[Method, Factors]:
        raise NotImplementedError("all layers are one vector")


def check_same(client: Adapter, number: int, server: Adapter) -> None:
    """Raises ValueError where a client has another method at a layer, or other frozen factors: its numbers would mean
    something else."""
    for site, method in server.methods.items():
        if client.methods.get(site) != method:
            raise ValueError(
                f"{site} is {client.methods.get(site)!r} in client {number} and {method!r} in the server's adapter"
            )
        f = server.factors[site]
        frozen = {name for name, t in f.items() if not t.requires_grad}
        check_frozen(site, Client(0, 0.0, method, f), Client(number, 0.0, method, client.factors[site]), frozen)


def top(P: Tensor, share: float) -> Tensor:
    """The max(1, round(share n)) entries of P that are the largest by size, 0 elsewhere."""
    k = max(1, round(share * P.numel()))
    kept = torch.zeros_like(P)
    if k >= P.numel():
        return P.clone()
    index = torch.sort(P.abs(), descending=True, stable=True).indices[:k]
    kept[index] = P[index]
    return kept
