"""Uniform B-splines in closed form, for any order, without recursion or indexing.

    N_k(d) = 1/k! * sum_{i <= (k+1)/2} (-1)^i C(k+1, i) max((k+1)/2 - i - |d|, 0)^k

is the cardinal B-spline of order k at distance d (in grid steps) from its centre: equal to the Cox-de Boor recursion
on a uniform knot vector, in two powers for a cubic one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cardinal(d: Tensor, k: int) -> Tensor:
    """N_k(d), elementwise."""
    reach = d.abs().neg().add((k + 1) / 2)
    total = torch.relu(reach) ** k
    for i in range(1, (k + 1) // 2 + (k + 1) % 2):
        total = total + (-1) ** i * math.comb(k + 1, i) * torch.relu(reach - i) ** k
    return total / math.factorial(k)


def basis(z: Tensor, intervals: int, k: int, low: float, high: float) -> Tensor:
    """All intervals + k basis functions at z: shape (..., intervals + k).  Their sum is 1 on [low, high]; they vanish
    beyond (k intervals-widths) outside."""
    step = (high - low) / intervals
    first = low + ((k + 1) / 2 - k) * step  # centre of basis 0: its knots start k steps before `low`
    centres = torch.arange(intervals + k, dtype=z.dtype, device=z.device)
    return cardinal((z.unsqueeze(-1) - first) / step - centres, k)
