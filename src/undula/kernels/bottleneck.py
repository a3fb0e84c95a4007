"""y = layer(x) + B bend(A x), fused for plain linear layers.

What a low-rank step costs on a CPU is not its arithmetic (about 4 % of a frozen layer's at rank 8) but extra passes
over (T, O) and (T, I) tensors and skinny products in an unlucky layout.  So: the two branches are summed inside the
products (`addmm_`), forward and backward; and each skinny product is written in the orientation that BLAS runs fast
(`(z' g)'` instead of `g' z` is four to seven times faster at rank 8).

Over a bfloat16 base with float32 factors `rounded` rounds the factors to bfloat16 in each step: all products are
bfloat16's (sums inside them are float32), x is not copied to float32, and units for bfloat16 are used where there are
some.  float16 stays with the plain law: B' g would vanish below 6e-8 while B is small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..core.layer import Layer
from . import reference
from .autocast import casts, exact_backward, hand_written

Bend = Callable[[Tensor], Tensor]


def straight(z: Tensor) -> Tensor:
    """No bend: the linear bottleneck, LoRA."""
    return z


def down(factor: Tensor, x: Tensor) -> Tensor:
    """A factor in the type of the products with x."""
    return factor if factor.dtype == x.dtype else factor.to(x.dtype)


def up(gradient: Tensor, factor: torch.dtype) -> Tensor:
    """The gradient of a factor in the type in which it trains."""
    return gradient if gradient.dtype == factor else gradient.to(factor)


def _by_few(x: Tensor, M: Tensor) -> Tensor:
    """x M of a matrix of few columns: in float32 as (M' x')', twice as fast; on units for bfloat16 as it stands."""
    return torch.mm(x, M) if x.dtype == torch.bfloat16 else torch.mm(M.t(), x.t()).t()


class _Tap(Function):
    """(x, W, b, A) -> (W x + b, A x), rows of x (T, I).  W and b are frozen: they get no gradient."""

    @staticmethod
    def forward(ctx, x_TI, W_OI, bias, A_RI):
        ctx.factor, A_RI = A_RI.dtype, down(A_RI, x_TI)
        ctx.save_for_backward(x_TI, W_OI, A_RI)
        return F.linear(x_TI, W_OI, bias), _by_few(x_TI, A_RI.t())

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO, gz_TR):
        x_TI, W_OI, A_RI = ctx.saved_tensors
        dx = dA = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(g_TO, W_OI).addmm_(gz_TR, A_RI)
        if ctx.needs_input_grad[3]:
            dA = up(torch.mm(gz_TR.t(), x_TI), ctx.factor)
        return dx, None, None, dA


class _Lift(Function):
    """(y, h, B) -> y + B h, in place on y; rows of y (T, O) and h (T, R)."""

    @staticmethod
    def forward(ctx, y_TO, h_TR, B_OR):
        ctx.factor, B_OR = B_OR.dtype, down(B_OR, y_TO)
        ctx.save_for_backward(h_TR, B_OR)
        ctx.mark_dirty(y_TO)
        return y_TO.addmm_(h_TR, B_OR.t())

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        h_TR, B_OR = ctx.saved_tensors
        dh = dB = None
        if ctx.needs_input_grad[1]:
            dh = _by_few(g_TO, B_OR)
        if ctx.needs_input_grad[2]:
            dB = up(torch.mm(h_TR.t(), g_TO).t(), ctx.factor)
        return g_TO, dh, dB


class _Straight(Function):
    """(x, W, b, A, B) -> W x + b + B A x: both of the above in one, where nothing stands between them."""

    @staticmethod
    def forward(ctx, x_TI, W_OI, bias, A_RI, B_OR):
        ctx.factors = A_RI.dtype, B_OR.dtype
        A_RI, B_OR = down(A_RI, x_TI), down(B_OR, x_TI)
        h_TR = _by_few(x_TI, A_RI.t())
        ctx.save_for_backward(x_TI, W_OI, A_RI, B_OR, h_TR)
        return F.linear(x_TI, W_OI, bias).addmm_(h_TR, B_OR.t())

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        x_TI, W_OI, A_RI, B_OR, h_TR = ctx.saved_tensors
        dx = dA = dB = None
        gh_TR = _by_few(g_TO, B_OR)
        if ctx.needs_input_grad[0]:
            dx = torch.mm(g_TO, W_OI).addmm_(gh_TR, A_RI)
        if ctx.needs_input_grad[3]:
            dA = up(torch.mm(gh_TR.t(), x_TI), ctx.factors[0])
        if ctx.needs_input_grad[4]:
            dB = up(torch.mm(h_TR.t(), g_TO).t(), ctx.factors[1])
        return dx, None, None, dA, dB


def fusible(x: Tensor, layer: Layer, *factors: Tensor) -> bool:
    """Whether the fused products apply: a plain linear layer whose weight and bias are frozen, one dtype throughout, no
    autocast, and nothing at work that differentiates by itself (see `hand_written`)."""
    if not layer.plain or casts(x.device) or not hand_written():
        return False
    if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
        return False  # trained in full beside the factors
    return all(t.dtype == x.dtype for t in (layer.weight, *factors))


def fusible_rounded(x: Tensor, layer: Layer, *factors: Tensor) -> bool:
    """Whether they apply with float32 factors rounded to x's bfloat16."""
    narrow = x.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in factors)
    return narrow and fusible(x, layer)


def bottleneck(x: Tensor, layer: Layer, A_RI: Tensor, B_OR: Tensor, bend: Bend = straight) -> Tensor:
    """y = layer(x) + B bend(A x), shapes (..., I) -> (..., O).  Equal to `reference.bottleneck`; not twice
    differentiable where it is fused (a second backward raises)."""
    if not fusible(x, layer, A_RI, B_OR):
        return reference.bottleneck(x, layer, A_RI, bend, B_OR)
    return _fused(x, layer, A_RI, B_OR, bend)


def rounded(x: Tensor, layer: Layer, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """`bottleneck` without a bend, whose factors are rounded to x's type where that is bfloat16 and they are float32.

    The change B A x is so rounded to about 2^-8 of its terms, under the rounding of the output that it is added to; the
    gradients of the factors are float32, rounded once to bfloat16.  Not for pairs whose terms all but cancel."""
    if not fusible_rounded(x, layer, A_RI, B_OR):
        return bottleneck(x, layer, A_RI, B_OR)
    return _fused(x, layer, A_RI, B_OR, straight)


def _fused(x: Tensor, layer: Layer, A_RI: Tensor, B_OR: Tensor, bend: Bend) -> Tensor:
    x_TI = x.reshape(-1, x.shape[-1])
    if bend is straight:
        y_TO = _Straight.apply(x_TI, layer.weight, layer.bias, A_RI, B_OR)
    else:
        y_TO, z_TR = _Tap.apply(x_TI, layer.weight, layer.bias, A_RI)
        y_TO = _Lift.apply(y_TO, bend(z_TR), B_OR)
    return y_TO.view(*x.shape[:-1], B_OR.shape[0])
