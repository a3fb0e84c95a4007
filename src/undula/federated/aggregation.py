"""(client adapters, weights) -> adapter: what the server of a federation makes of a round, without a network.

A client trains a copy of the round's adapter on rows that stay with it.  Let client k have the share p_k (its rows of
all clients' rows) and the update dW_k.  What the clients ask for together is the mean of the updates,

    D = sum_k p_k dW_k ,

and an aggregation is what takes its place in a form that clients can train on.
"""

from __future__ import annotations

import abc
import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..combine.weighted import agreed, averaged
from ..core.adapter import Adapter, Live
from ..core.choice import Choice
from ..core.method import Factors, LowRank, Method
from ..kernels import svd

State = MutableMapping[str, Tensor]


@dataclass(frozen=True)
class Client:
    """One client's part of a layer."""

    number: int
    share: float  # p_k, of all clients: those that have nothing at this layer count as an update of zero there
    method: Method
    factors: Factors


class Aggregation(Choice):
    """A way to make one adapter of the clients'.  A layer that a client has not is an update of zero there; parameters
    in full (heads, norms) are averaged by the shares."""

    sparse: ClassVar[bool] = False  # whether what is sent is zero for the most part, and travels packed, see `wire`
    remakes: ClassVar[bool] = False  # whether factors that clients do not train change all the same
    needs_each: ClassVar[bool] = False  # whether the mean of what clients send is not enough
    trains: ClassVar[str | None] = None  # what alone clients may train of each layer: "linear", see `Method.linear_in`

    @property
    def knows_start(self) -> bool:
        """Whether messages tell the difference from what the rounds began with, which clients draw themselves."""
        return False

    def told(self, adapter: Adapter, first: Adapter) -> Adapter:
        """The numbers that go down, in the places of an adapter's; first: what the rounds began with."""
        return adapter

    def sent(self, adapter: Adapter, first: Adapter) -> Adapter:
        """What clients have of the server's adapter once they are told."""
        return adapter

    def reply(self, sent: Adapter, trained: Adapter) -> Adapter:
        """What a client lets the server know of where it has come to."""
        return trained

    @torch.no_grad()
    def __call__(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None = None,
        before: Adapter | None = None,
        state: State | None = None,
    ) -> Adapter:
        """The round's adapter.  `weights` are numbers of rows or other counts, not negative (without: all alike);
        `before` is the server's adapter of this round, `state` what a way keeps from round to round.

        Raises ValueError for no adapters, weights that are none, numbers that are not finite (by client and layer),
        clients whose layers do not go together; TypeError where the method's rung does not allow it.
        """
        values, shares = checked(adapters, weights)
        methods: dict[str, Method] = {}
        factors: dict[str, Factors] = {}
        for site in dict.fromkeys(s for a in values for s in a.methods):
            there = [
                Client(k, p, a.methods[site], a.factors[site])
                for k, (p, a) in enumerate(zip(shares, values, strict=True), 1)
                if site in a.methods
            ]
            sizes = {a.shapes[site] for a in values if site in a.shapes}
            if len(sizes) > 1:
                raise ValueError(f"the clients have different models: {site} is {' and '.join(map(str, sizes))}")
            methods[site], factors[site] = self.at(site, there, None if before is None else before.factors.get(site))
        shapes, kernels, apart = (_united(values, name) for name in ("shapes", "kernels", "apart"))
        full = averaged([(p, a) for p, a in zip(shares, values, strict=True)])
        return Adapter(methods, factors, shapes, full, kernels, agreed(values), apart)

    @abc.abstractmethod
    def at(self, site: str, clients: Sequence[Client], before: Factors | None) -> tuple[Method, Factors]:
        """The method and factors of one layer."""


def checked(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> tuple[list[Adapter], list[float]]:
    """The clients' adapters as values, and their shares.  Raises ValueError."""
    values = [a.copy() if isinstance(a, Live) else a for a in adapters]
    shares = shares_of(weights, len(values))
    for number, a in enumerate(values, 1):
        check_finite(a, f"client {number}")
    return values, shares


def shares_of(weights: Sequence[float] | None, number: int) -> list[float]:
    """p_k: weights in proportion.  Raises ValueError."""
    if not number:
        raise ValueError("a round without clients has no result: at least one adapter")
    given = [1.0] * number if weights is None else [float(w) for w in weights]
    if len(given) != number:
        raise ValueError(f"{number} clients take {number} weights, found {len(given)}: {given}")
    total = math.fsum(given)
    if not all(math.isfinite(w) and w >= 0 for w in given) or not total > 0:
        raise ValueError(f"weights are counts: finite, not negative and not all 0; found {given}")
    return [w / total for w in given]


def check_finite(adapter: Adapter, who: str) -> None:
    """Raises ValueError for numbers that are none: one client's NaN would be everybody's."""
    every = [(f"{site}.{name}", t) for site, name, t in adapter.tensors()] + list(adapter.full.items())
    for name, t in every:
        if t.is_floating_point() and not t.isfinite().all():
            bad = int((~t.isfinite()).sum())
            raise ValueError(f"{who}: {bad} of {t.numel()} numbers in {name} are not finite: leave this client out")


def bias(adapters: Sequence[Adapter], weights: Sequence[float] | None, made: Adapter) -> dict[str, float]:
    """|D - dW| / |D| at each layer: how far an aggregation is from the mean of the clients' updates (0 where that is 0
    too).  From the factors where the updates have them.  Raises TypeError below the Additive rung."""
    shares = shares_of(weights, len(adapters))
    found = {}
    for site in made.methods:
        terms = [(p, a) for p, a in zip(shares, adapters, strict=True) if site in a.methods]
        if all(isinstance(a.methods[site], LowRank) for _, a in [*terms, (1.0, made)]):
            pairs = [(p * B, A) for p, (B, A) in ((p, wide_pair(a, site)) for p, a in terms)]
            B, A = wide_pair(made, site)
            whole = svd.factored_values(torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs])).norm()
            left = svd.factored_values(
                torch.cat([*(b for b, _ in pairs), -B], 1), torch.cat([*(a for _, a in pairs), A])
            ).norm()
        else:
            D = torch.stack([p * a.delta(site).double() for p, a in terms]).sum(0)
            whole, left = D.norm(), (D - made.delta(site).double()).norm()
        found[site] = float(left / whole) if whole > 0 else 0.0 if not left > 0 else math.inf
    return found


def wide_pair(adapter: Adapter, site: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a LowRank layer in float64."""
    method = adapter.methods[site]
    assert isinstance(method, LowRank)
    B, A = method.pair(adapter.factors[site])
    return B.detach().double(), A.detach().double()


def _united(values: Sequence[Adapter], name: str) -> dict[str, Any]:
    return {site: what for a in reversed(values) for site, what in getattr(a, name).items()}
