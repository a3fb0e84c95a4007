"""y = (W + s f(B A)) x + b for an elementwise f, keeping only x, A and B for the backward pass.

Autograd would keep two or three (O, I) tensors per layer (1.5 times LoRA's memory on a 7B model).  Here forward and
backward walk over blocks of rows that fit a cache: rebuild X = B A, bend it, use it, forget it.

    G = gy' x (the weight-gradient product), dX = s G * f'(X), dB = dX A', dA = B' dX, dx = gy (W + s f(X))

Without W (dropout, a quantised or low-precision base) it is y = s f(B A) x, to be added to the frozen layer's output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Bend = Callable[..., Tensor]  # (X, *constants) -> f(X)
BLOCK = 1 << 18  # elements of W per block: 1 MiB in float32


def blocks(O: int, I: int):
    """Row ranges of about BLOCK elements."""
    rows = max(16, BLOCK // I)
    return [slice(i, min(i + rows, O)) for i in range(0, O, rows)]


def bent(bend: Bend, scale: float, B_OR: Tensor, A_RI: Tensor, constants: tuple[Tensor, ...]) -> Tensor:
    """s f(B A), the reference: the product and f in float32 at least, whatever autocast says."""
    with torch.autocast(A_RI.device.type, enabled=False):
        wide = torch.promote_types(A_RI.dtype, torch.float32)
        return scale * bend(B_OR.to(wide) @ A_RI.to(wide), *constants)


class _Bent(Function):
    @staticmethod
    def forward(ctx, x, W_OI, bias, A_RI, B_OR, bend, scale, *constants):
        ctx.bend, ctx.scale, ctx.folded = bend, scale, W_OI is not None
        ctx.save_for_backward(x, A_RI, B_OR, *constants, *((W_OI,) if ctx.folded else ()))
        x_TI, (O, I) = x.reshape(-1, x.shape[-1]), (B_OR.shape[0], A_RI.shape[1])
        y_TO = x.new_empty(x_TI.shape[0], O)
        for rows in blocks(O, I):
            M = bend(B_OR[rows] @ A_RI, *constants)
            M = M.mul_(scale) if W_OI is None else torch.add(W_OI[rows], M, alpha=scale)
            if bias is None:
                torch.mm(x_TI, M.t(), out=y_TO[:, rows])
            else:
                torch.addmm(bias[rows], x_TI, M.t(), out=y_TO[:, rows])
        return y_TO.view(*x.shape[:-1], O)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, A_RI, B_OR, *rest = ctx.saved_tensors
        W_OI = rest.pop() if ctx.folded else None
        x_TI, g_TO, (O, I) = x.reshape(-1, x.shape[-1]), gy.reshape(-1, gy.shape[-1]), (B_OR.shape[0], A_RI.shape[1])
        dx = torch.zeros_like(x_TI) if ctx.needs_input_grad[0] else None
        dA, dB = torch.zeros_like(A_RI), torch.empty_like(B_OR)
        dc = [torch.zeros_like(c) for c in rest]
        trained = [c.detach().requires_grad_(n) for c, n in zip(rest, ctx.needs_input_grad[7:], strict=True)]
        for rows in blocks(O, I):
            with torch.enable_grad():
                X = torch.mm(B_OR[rows], A_RI).requires_grad_()
                M = ctx.bend(X, *trained)
            G = torch.mm(g_TO[:, rows].t(), x_TI)
            wanted = [X, *(c for c in trained if c.requires_grad)]
            dX, *grads = torch.autograd.grad(M, wanted, G.mul_(ctx.scale))
            torch.mm(dX, A_RI.t(), out=dB[rows])
            dA.addmm_(B_OR[rows].t(), dX)
            for total, grad in zip(
                (d for d, c in zip(dc, trained, strict=True) if c.requires_grad), grads, strict=True
            ):
                total.add_(grad)
            if dx is not None:
                M = M.detach()
                M = M.mul_(ctx.scale) if W_OI is None else torch.add(W_OI[rows], M, alpha=ctx.scale)
                dx.addmm_(g_TO[:, rows], M)
        dc = [d if c.requires_grad else None for d, c in zip(dc, trained, strict=True)]
        return None if dx is None else dx.view(x.shape), None, None, dA, dB, None, None, *dc


def elementwise(
    x: Tensor,
    W_OI: Tensor | None,
    bias: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    bend: Bend,
    scale: float,
    constants: tuple[Tensor, ...] = (),
) -> Tensor:
    """(W + s f(B A)) x + b, or s f(B A) x where W is None; x (..., I), all of one dtype of 32 bits or more.  Equal to
    the product with `bent`; `constants` are passed to `bend` and get gradients.  Not twice differentiable."""
    return _Bent.apply(x, W_OI, bias, A_RI, B_OR, bend, scale, *constants)
