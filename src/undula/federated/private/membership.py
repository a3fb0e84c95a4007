"""How well losses tell rows that were trained on from others: the loss-threshold attack (Yeom, Giacomelli, Fredrikson,
Jha 2018, arXiv:1709.01604), as an area under its curve with an interval (DeLong, DeLong, Clarke-Pearson 1988)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.959963984540054  # of 95 %


@dataclass(frozen=True)
class Membership:
    """auc: the chance that a row that was trained on has the lower loss, ties one half; 0.5 tells nothing.  low, high:
    its interval of 95 %.  found: the share of the trained rows that a threshold finds which takes at most 1 in 100
    others for one.  members, others: how many rows were asked."""

    auc: float
    low: float
    high: float
    found: float
    members: int
    others: int


def membership(members: Sequence[float] | Tensor, others: Sequence[float] | Tensor) -> Membership:
    """The attack on the losses of rows that were trained on, and of rows of the same kind that were not.  Raises
    ValueError for fewer than 2 of either, or losses that are not finite."""
    inside, outside = (torch.as_tensor(t, dtype=torch.float64).flatten().cpu() for t in (members, others))
    for name, t in (("rows that were trained on", inside), ("other rows", outside)):
        if len(t) < 2 or not t.isfinite().all():
            raise ValueError(f"an attack takes the finite losses of 2 {name} or more, found {len(t)}")
    of_members, of_others = _placed(inside, outside), 1 - _placed(outside, inside)
    auc = float(of_members.mean())
    spread = math.sqrt(float(of_members.var() / len(inside) + of_others.var() / len(outside)))
    threshold = outside.sort().values[math.floor(0.01 * len(outside))]
    return Membership(
        auc,
        max(0.0, auc - Z * spread),
        min(1.0, auc + Z * spread),
        float((inside < threshold).double().mean()),
        len(inside),
        len(outside),
    )


def _placed(losses: Tensor, among: Tensor) -> Tensor:
    """Of each the share of the others that lie above, ties one half."""
    order = among.sort().values
    below, upto = torch.searchsorted(order, losses), torch.searchsorted(order, losses, right=True)
    return 1 - (below + upto).double() / (2 * len(order))


def most(epsilon: float, delta: float = 0.0) -> float:
    """The greatest area under a curve that any attack on one row can have: an (epsilon, delta)-private training keeps
    hits <= exp(epsilon) false alarms + delta, and the same of their complements (Kairouz, Oh, Viswanath 2015,
    arXiv:1311.0776)."""
    if math.isinf(epsilon):
        return 1.0
    alarms = (1 - delta) / (1 + math.exp(epsilon))
    hits = 1 - alarms
    return alarms * (delta + hits) / 2 + (1 - delta - alarms) * (hits + 1) / 2 + delta
