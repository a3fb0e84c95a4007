"""LoRA-Pro (Wang, Liang, He, Wang, Tan 2024, arXiv:2407.18242, ICLR 2025): gradients of A and B as close as two factors
can come to full fine-tuning's.

    min over g_A, g_B of |s B g_A + s g_B A - g|^2,   g = dL/dW

    g_A = (B'B)^-1 dL/dA / s^2 + X A
    g_B = (I - P_B) dL/dB (A A')^-1 / s^2 - B X,      P_B = B (B'B)^-1 B'

The change of W does not depend on X; the X taken keeps both nearest to the gradients that they replace,

    (B'B) X + X (A A') = -(B'B)^-1 dL/dA A' / s^2,

a Sylvester equation, solved by the eigenvectors of B'B and A A'.  Its change of W is g - (I - P_B) g (I - P_A), the
projection of g on what a pair can follow.  g itself is never formed.

Damping.  B begins at 0 and after the first step B'B is of the order lr^2: the authors' constant 1e-8 is larger than
that for small rates and then up to half of the step is wrong.  Here it is relative, damping tr(B'B) / r.  While B is 0
(or A, on an embedding) the equations above give g_A = 0 and g_B = dL/dB (A A')^-1 / s^2, which is right.

A penalty's gradient of the factors themselves (`paired.pull`) is no part of g: it is added as it is.

Clipping, of gradients of another size, comes after this: `max_norm` here, and none before.  With a gate g (GatedLoRA)
B stands for B diag(g) in what multiplies g_A, and A for diag(g) A in what multiplies g_B.

Source: the authors' "efficient" form, AdamW's moments on the changed gradients; their "full" form, whose moments are of
W's size as full fine-tuning's are, is `lorapro_full`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .paired import Paired, Params, gradients
from .pairs import Stacked, alike


class LoRAPro(Paired):
    """See the module.  damping: relative, of B'B and A A'; other options as of `Paired`."""

    def __init__(self, params: Params, adapted: nn.Module, *, damping: float = 1e-6, **options: Any):
        if not damping >= 0:
            raise ValueError(f"LoRAPro.damping is at least 0, found {damping}")
        self.damping = damping
        super().__init__(params, adapted, **options)

    def adjust(self) -> None:
        for those in alike(self.following()):
            (g_A, g_B), (own_A, own_B) = gradients(those), self.apart(those)
            g_A, g_B = corrected(Stacked.of(those), g_A - own_A, g_B - own_B, self.damping)
            self.follow([p.A for p in those], g_A + own_A)
            self.follow([p.B for p in those], g_B + own_B)


def corrected(pair: Stacked, g_A: Tensor, g_B: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(g_A (N, R, I), g_B (N, O, R)) of the module's formulae from dL/dA and dL/dB."""
    B, A, s2 = pair.left, pair.right, pair.scale.square()
    (l_B, Q_B), (l_A, Q_A) = _spectrum(B.mT @ B), _spectrum(A @ A.mT)
    inverse_B, inverse_A = _inverse(l_B, Q_B, damping), _inverse(l_A, Q_A, damping)
    free_A = inverse_B @ g_A / s2
    outside = g_B - B @ (inverse_B @ (B.mT @ g_B))
    free_B = outside @ inverse_A / s2
    C = -(Q_B.mT @ (free_A @ A.mT) @ Q_A)
    sums = l_B[..., :, None] + l_A[..., None, :]
    X = Q_B @ torch.where(sums > 0, C / torch.where(sums > 0, sums, 1), 0) @ Q_A.mT
    return free_A + X @ A, free_B - B @ X


def _spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues, eigenvectors) of Gram matrices, rounding's negative ones as 0."""
    exact = gram if gram.device.type == "mps" else gram.double()
    values, vectors = torch.linalg.eigh(exact)
    return values.clamp_min(0).to(gram.dtype), vectors.to(gram.dtype)


def _inverse(values: Tensor, vectors: Tensor, damping: float) -> Tensor:
    """(M + damping tr(M) / r)^-1 of M with this spectrum, on its range: the gradient has nothing outside."""
    floor = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
    damped = values + damping * values.mean(-1, keepdim=True)
    inverted = torch.where(values > floor, 1 / torch.where(values > floor, damped, 1), 0)
    return (vectors * inverted[..., None, :]) @ vectors.mT
