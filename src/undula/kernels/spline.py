"""Uniform B-splines in closed form, for any order, without recursion or indexing.

    N_k(d) = 1/k! * sum_{i <= (k+1)/2} (-1)^i C(k+1, i) max((k+1)/2 - i - |d|, 0)^k
    N_k'(d) = N_{k-1}(d + 1/2) - N_{k-1}(d - 1/2)

is the cardinal B-spline of order k at distance d (in grid steps) from its centre: equal to the Cox-de Boor recursion
on a uniform knot vector, in two powers for a cubic one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import Function

from .autocast import exact_backward, hand_written


def cardinal(d: Tensor, k: int) -> Tensor:
    """N_k(d), elementwise."""
    reach = (k + 1) / 2 - d.abs()
    if k == 0:  # the box
        return (reach > 0).to(d.dtype)
    terms = ((-1) ** i * math.comb(k + 1, i) * torch.relu(reach - i) ** k for i in range(k // 2 + 1))
    return sum(terms, torch.zeros_like(d)) / math.factorial(k)


class _Basis(Function):
    """z -> N_k(z - centre_j) for every j; keeps z alone, a K-th of what autograd would keep many times over."""

    @staticmethod
    def forward(ctx, z, count, k):
        ctx.save_for_backward(z)
        ctx.count, ctx.k = count, k
        return cardinal(z.unsqueeze(-1) - torch.arange(count, dtype=z.dtype, device=z.device), k)

    @staticmethod
    @exact_backward
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        d = z.unsqueeze(-1) - torch.arange(ctx.count, dtype=z.dtype, device=z.device)
        slope = cardinal(d + 0.5, ctx.k - 1).sub_(cardinal(d.sub_(0.5), ctx.k - 1))
        return (g * slope).sum(-1), None, None


def basis(z: Tensor, intervals: int, k: int, low: float, high: float) -> Tensor:
    """All intervals + k basis functions at z: shape (..., intervals + k).  Their sum is 1 on [low, high]; they vanish
    from k grid steps outside it."""
    step = (high - low) / intervals
    first = low + ((k + 1) / 2 - k) * step  # centre of basis 0: its knots start k steps before `low`
    d = ((z - first) / step).contiguous()
    if hand_written():
        return _Basis.apply(d, intervals + k, k)
    return cardinal(d.unsqueeze(-1) - torch.arange(intervals + k, dtype=z.dtype, device=z.device), k)
