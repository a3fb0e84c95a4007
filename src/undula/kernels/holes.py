"""Dropout on a CPU that draws only where something falls out, and keeps one number for the backward pass.

A mask has an entry for each of x's, and drawing and applying it cost more than LoRA's own products.  At the usual rates
few entries fall out, and the gaps between them are geometric: floor(ln u / ln(1 - p)) entries stay before the next one
that goes, u uniform.  So p numbers an entry are drawn, from a generator of its own whose seed torch's gives
(`torch.manual_seed` holds, and so does gradient checkpointing), and drawn again in the backward pass: a layer keeps its
input, which the product needs anyway, and the seed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..core.layer import Layer
from . import draws
from .autocast import exact_backward, hand_written
from .bottleneck import down, up
from .elementwise import under_mode

MOST = 0.2  # of a greater rate a mask of bits is as cheap
SPARE = 6.0  # standard deviations of their number: how many more gaps are drawn than are needed on average


def few(x: Tensor, p: float) -> bool:
    """Whether `holes` is the way to drop p of x: on a CPU, where nothing else draws, differentiates or sees the
    operations."""
    if not hand_written() or p > MOST or x.device.type != "cpu":
        return False
    return type(x) is Tensor and not under_mode() and not draws.active()


def drawn() -> int:
    """A seed, from torch's own generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def holes(seed: int, count: int, p: float) -> Tensor:
    """The entries of `count` that fall out at the rate p, ascending (int64)."""
    generator, reach, parts = torch.Generator().manual_seed(seed), -1, []
    while reach < count:
        left = (count - reach) * p
        size = max(int(left + SPARE * math.sqrt(left)), 0) // 2 + 8
        words = torch.empty(size, dtype=torch.int64, device="cpu")
        at = gaps(words.random_(-(2**63), None, generator=generator).view(torch.int32), p).add_(1)
        at[0] += reach
        parts.append(at.cumsum_(0))
        reach = int(at[-1])
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found[: int(torch.searchsorted(found, count))]


def gaps(bits: Tensor, p: float) -> Tensor:
    """floor(ln u / ln(1 - p)) of u = (k + 1) / 2^24 in (0, 1], k the low 24 bits of an int32: float32 has each k + 1,
    so that no u is 0."""
    u = bits.bitwise_and((1 << 24) - 1).to(torch.float32).add_(1)
    return u.log_().sub_(24 * math.log(2)).mul_(1 / math.log1p(-p)).clamp_(min=0).long()


def emptied(x: Tensor, at: Tensor, scale: float = 1.0) -> Tensor:
    """A contiguous copy of s x, with zeros at `at`."""
    made = (
        torch.mul(x, scale, out=x.new_empty(x.shape)) if scale != 1 else x.clone(memory_format=torch.contiguous_format)
    )
    made.view(-1).index_fill_(0, at, 0)
    return made


class _Dropped(Function):
    """D(x) = x / (1 - p) but for the holes of `seed`."""

    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        return emptied(x, holes(seed, x.numel(), p), 1 / (1 - p))

    @staticmethod
    def backward(ctx, g):
        at = holes(ctx.seed, g.numel(), ctx.p)
        return (g / (1 - ctx.p)).reshape(-1).index_fill(0, at, 0).view(g.shape), None, None


class _Pair(Function):
    """(x, W, b, A, B) -> W x + b + B A D(x), rows of x (T, I).  The orientation of the skinny products is explained in
    `bottleneck`; 1 / (1 - p) goes onto their results."""

    @staticmethod
    def forward(ctx, x_TI, W_OI, bias, A_RI, B_OR, p, seed):
        ctx.p, ctx.seed, ctx.factors = p, seed, (A_RI.dtype, B_OR.dtype)
        A_RI, B_OR = down(A_RI, x_TI), down(B_OR, x_TI)
        D_TI = emptied(x_TI, holes(seed, x_TI.numel(), p))
        z_RT = torch.mm(A_RI, D_TI.t()).mul_(1 / (1 - p))
        ctx.save_for_backward(x_TI, W_OI, A_RI, B_OR, z_RT)
        return F.linear(x_TI, W_OI, bias).addmm_(z_RT.t(), B_OR.t())

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        x_TI, W_OI, A_RI, B_OR, z_RT = ctx.saved_tensors
        dx = dA = dB = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            at = holes(ctx.seed, x_TI.numel(), ctx.p)
            gz_RT = torch.mm(B_OR.t(), g_TO.t()).mul_(1 / (1 - ctx.p))
        if ctx.needs_input_grad[0]:
            dx = torch.mm(g_TO, W_OI)
            only = dx.view(-1).index_select(0, at)  # what fell out has the frozen layer's gradient alone
            dx.addmm_(gz_RT.t(), A_RI).view(-1).index_copy_(0, at, only)
        if ctx.needs_input_grad[3]:
            dA = up(torch.mm(gz_RT, emptied(x_TI, at)), ctx.factors[0])
        if ctx.needs_input_grad[4]:
            dB = up(torch.mm(z_RT, g_TO).t(), ctx.factors[1])
        return dx, None, None, dA, dB, None, None


def dropped(x: Tensor, p: float) -> Tensor:
    """Inverted dropout of x, where `few`."""
    return _Dropped.apply(x, p, drawn())


def pair_of_dropped(x: Tensor, layer: Layer, A_RI: Tensor, B_OR: Tensor, p: float) -> Tensor:
    """y = layer(x) + B A D(x), shapes (..., I) -> (..., O), where `few` and the fused products apply."""
    y_TO = _Pair.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, A_RI, B_OR, p, drawn())
    return y_TO.view(*x.shape[:-1], B_OR.shape[0])
