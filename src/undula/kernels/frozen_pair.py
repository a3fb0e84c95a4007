"""y = layer(x) + B A x + B_K A_K x, where the pair (B_K, A_K) is frozen, fused for plain linear layers.

The two pairs are one stacked pair in every product but those of the gradients: a frozen pair has none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..core.layer import Layer
from .autocast import exact_backward
from .bottleneck import bottleneck, fusible

Pair = tuple[Tensor, Tensor]  # (B (O, R), A (R, I))


class _Stacked(Function):
    """(x, W, b, A, B, A_K, B_K) -> W x + b + B A x + B_K A_K x, rows of x (T, I).  Gradients for x, A and B.  The
    orientation of the skinny products is explained in `bottleneck`."""

    @staticmethod
    def forward(ctx, x_TI, W_OI, bias, A_RI, B_OR, A_KI, B_OK):
        A_SI, B_OS = torch.cat([A_RI, A_KI]), torch.cat([B_OR, B_OK], 1)
        z_ST = torch.mm(A_SI, x_TI.t())
        # its own R rows alone are kept: those of the frozen pair serve no gradient
        ctx.save_for_backward(x_TI, W_OI, A_SI, B_OS, z_ST[: len(A_RI)].clone())
        return F.linear(x_TI, W_OI, bias).addmm_(z_ST.t(), B_OS.t())

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        x_TI, W_OI, A_SI, B_OS, z_RT = ctx.saved_tensors
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            gz_ST = torch.mm(B_OS.t(), g_TO.t())
            dx = torch.mm(g_TO, W_OI).addmm_(gz_ST.t(), A_SI)
        if ctx.needs_input_grad[3]:
            own = gz_ST[: len(z_RT)] if dx is not None else torch.mm(B_OS[:, : len(z_RT)].t(), g_TO.t())
            dA = torch.mm(own, x_TI)
        if ctx.needs_input_grad[4]:
            dB = torch.mm(z_RT, g_TO).t()
        return dx, None, None, dA, dB, None, None


def beside_frozen(x: Tensor, layer: Layer, pair: Pair, frozen: Pair) -> Tensor:
    """y = layer(x) + B A x + B_K A_K x, shapes (..., I) -> (..., O)."""
    (B_OR, A_RI), (B_OK, A_KI) = pair, frozen
    if A_KI.requires_grad or B_OK.requires_grad or not fusible(x, layer, A_RI, B_OR, A_KI, B_OK):
        return bottleneck(x, layer, torch.cat([A_RI, A_KI]), torch.cat([B_OR, B_OK], 1))
    y_TO = _Stacked.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, A_RI, B_OR, A_KI, B_OK)
    return y_TO.view(*x.shape[:-1], B_OR.shape[0])
