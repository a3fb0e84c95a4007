"""What is kept of a row makes up for what goes: least squares on the inputs that the layer sees.

    min over V of  tr (W - V) H (W - V)',   H = sum_t x_t x_t' + c I,   V zero outside the kept groups

c is a hundredth of the mean of H's diagonal.  Each row is a problem of its own with the same H; all are solved together
by conjugate gradients, preconditioned by the diagonal (Hestenes and Stiefel 1952), so that nothing is inverted.  Every
iteration lowers the sum, from that of W without its groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import gqsa as kernel

DAMPED = 0.01
ITERATIONS = 20


def refitted(W_OI: Tensor, H_II: Tensor, index_OK: Tensor, group: int, iterations: int = ITERATIONS) -> Tensor:
    """The kept groups (O, K, G) of V, in the type of H."""
    H_II = H_II + DAMPED * H_II.diagonal().mean() * torch.eye(len(H_II), dtype=H_II.dtype, device=H_II.device)
    W_OI = W_OI.to(H_II.dtype)
    ones = torch.ones((*index_OK.shape, group), dtype=H_II.dtype, device=W_OI.device)
    kept_OI, d_I = kernel.spread(ones, index_OK, W_OI.shape[1]), H_II.diagonal()
    tiny = torch.finfo(H_II.dtype).tiny
    V = W_OI * kept_OI
    R = (W_OI - V) @ H_II * kept_OI
    Z = R / d_I
    P, size = Z, (R * Z).sum(1, keepdim=True)
    for _ in range(iterations):
        Q = P @ H_II * kept_OI
        a = size / (P * Q).sum(1, keepdim=True).clamp_min(tiny)
        V, R = V + a * P, R - a * Q
        Z, before = R / d_I, size
        size = (R * Z).sum(1, keepdim=True)
        P = Z + size / before.clamp_min(tiny) * P
    return kernel.gathered(V, index_OK, group)
