"""The largest eigenvalue of a loss's Hessian in a scaled basis, by Lanczos (1950) on products with it.

    S H S u,   (H d)_i = (g_i(theta + h d) - g_i(theta - h d)) / 2h,   d = S u,   g = dL/dtheta,   S = diag(s) > 0

With s = p^(-1/2) the eigenvalue is that of P^-1 H, P = diag(p): what a step -lr P^-1 g meets.

Central differences of gradients serve every kernel.  The second derivative does not: fused attention has none, and
torch.autograd.grad(..., allow_unused=True) takes what a kernel that is differentiable once hides for zero, without a
word.  A product takes two gradients either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Vectors = list[Tensor]  # one for each parameter, of its shape
Product = Callable[[Vectors], Vectors]


def top_eigenvalue(product: Product, like: Sequence[Tensor], steps: int, generator: torch.Generator) -> float:
    """The largest eigenvalue of a symmetric `product`, after `steps` products at most, from a random start.

    Three vectors are kept, whatever `steps` is.  Not finite where a product is not.
    """
    q = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in like]
    q = _scaled(q, 1 / _norm(q))
    before, beta = [torch.zeros_like(t) for t in q], 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(steps):
        w = product(q)
        alpha = _dot(w, q)
        if not math.isfinite(alpha):
            return alpha
        diagonal.append(alpha)
        w = [a - alpha * b - beta * c for a, b, c in zip(w, q, before, strict=True)]
        beta = _norm(w)
        if beta <= 1e-10 * max(map(abs, diagonal)):  # all that the start has a part of
            break
        beside.append(beta)
        before, q = q, _scaled(w, 1 / beta)
    return _largest(diagonal, beside[: len(diagonal) - 1])


def differences(gradient: Callable[[], Vectors], parameters: Sequence[Tensor], scale: Vectors, size: float) -> Product:
    """Products by central differences.  size: the root mean square of theta's change, h d.  Afterwards the parameters
    hold what they held, to the bit."""

    @torch.no_grad()
    def product(u: Vectors) -> Vectors:
        d = [s * v for s, v in zip(scale, u, strict=True)]
        h = size * math.sqrt(sum(t.numel() for t in d)) / max(_norm(d), 1e-300)
        kept = [p.detach().clone() for p in parameters]
        found = []
        try:
            for sign in (h, -h):
                for p, t, k in zip(parameters, d, kept, strict=True):
                    p.copy_(k + sign * t)
                with torch.enable_grad():
                    found.append(gradient())
        finally:
            for p, k in zip(parameters, kept, strict=True):
                p.copy_(k)
        return [s * (a - b) / (2 * h) for s, a, b in zip(scale, *found, strict=True)]

    return product


def _dot(a: Vectors, b: Vectors) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _norm(a: Vectors) -> float:
    return math.sqrt(_dot(a, a))


def _scaled(a: Vectors, by: float) -> Vectors:
    return [t * by for t in a]


def _largest(diagonal: list[float], beside: list[float]) -> float:
    """Of the tridiagonal matrix."""
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, beta in enumerate(beside):
        T[i, i + 1] = T[i + 1, i] = beta
    return float(torch.linalg.eigvalsh(T)[-1])
