"""y = (W + S) x + b for an S that is zero almost everywhere: K entries of their own, whole rows, or whole columns.

No (O, I) tensor outlives a call.  S as entries is added to W in blocks of rows that stay in the cache, forward and
backward; the gradient of its values is g' x at K places.  Measured on one thread of a CPU, 512 tokens, float32, K that
of a rank-8 LoRA (ms):

    layer         frozen product   all of g' x, then gather   sampled products   gathered rows, multiplied, summed
    576 x 576     3.4              3.6                        1.1                16
    576 x 1536    17               18                         2.2                26
    4096 x 4096   390              418                        21                 138

So the K products are sampled (`torch.sparse.sampled_addmm`: one dot product of length T per entry, no copies); above
one entry in ten all of g' x is cheaper.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..core.layer import Layer
from . import compiled, reference
from .autocast import exact_backward, hand_written
from .bottleneck import fusible
from .elementwise import blocks, product, scratch

DENSE = 10  # at more than one entry in so many, all products cost less than the sampled ones


def offsets(index_K: Tensor, O: int, I: int) -> Tensor:
    """Where each row begins among sorted flat indices, and where the last ends (O + 1)."""
    return torch.searchsorted(index_K, torch.arange(0, O * I + 1, I, device=index_K.device))


def multiplied(x_TI: Tensor, start_O: Tensor, column_K: Tensor, values_K: Tensor) -> Tensor:
    """x S' (T, O) for S in rows of entries that begin at `start`."""
    x_IT = x_TI.t().contiguous()  # runs along the tokens: several times faster
    return F.embedding_bag(column_K, x_IT, start_O, mode="sum", per_sample_weights=values_K).t()


def sampled(g_TO: Tensor, x_TI: Tensor, index_K: Tensor) -> Tensor:
    """The entries of g' x at sorted flat indices (K)."""
    if g_TO.dtype != torch.float64 and compiled.chosen(g_TO.device):
        from . import triton_sparse

        return triton_sparse.sampled(g_TO, x_TI, index_K)
    O, I = g_TO.shape[1], x_TI.shape[1]
    narrow = g_TO.dtype.itemsize < 4  # torch samples no products of bf16 or fp16
    if narrow or index_K.numel() * DENSE > O * I or g_TO.device.type not in ("cpu", "cuda"):
        return torch.mm(g_TO.t(), x_TI).view(-1)[index_K]
    silence_beta_warning()
    zero_K = g_TO.new_zeros(index_K.shape)
    at = torch.sparse_csr_tensor(offsets(index_K, O, I), index_K % I, zero_K, (O, I))
    return torch.sparse.sampled_addmm(at, g_TO.t(), x_TI, beta=0.0).values()


@functools.cache
def silence_beta_warning() -> None:
    """torch says once per process that its compressed sparse tensors are in beta: here, to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def changed(W_OI: Tensor, index_K: Tensor, values_K: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W + S there), block by block; a block's numbers last until the next one."""
    O, I = W_OI.shape
    # whose entries are in which block only a look at them tells, and a step on an accelerator would wait for it
    parts = list(blocks(O, I)) if index_K.device.type == "cpu" else [slice(0, O)]
    bounds = [0, len(index_K)]
    if len(parts) > 1:
        edges = torch.tensor([rows.start * I for rows in parts] + [O * I], device=index_K.device)
        bounds = torch.searchsorted(index_K, edges).tolist()
    for rows, start, stop in zip(parts, bounds, bounds[1:], strict=False):
        (M,) = scratch(1, rows, W_OI)
        M.copy_(W_OI[rows]).view(-1).index_add_(0, index_K[start:stop] - rows.start * I, values_K[start:stop])
        yield rows, M


class _Entries(Function):
    """(x, W, b, index, values) -> (W + S) x + b."""

    @staticmethod
    def forward(ctx, x_TI, W_OI, bias, index_K, values_K):
        ctx.save_for_backward(x_TI, W_OI, index_K, values_K)
        return product(x_TI, changed(W_OI, index_K, values_K), W_OI.shape[0], bias)

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        x_TI, W_OI, index_K, values_K = ctx.saved_tensors
        dx = dv = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x_TI)
            for rows, M in changed(W_OI, index_K, values_K):
                dx.addmm_(g_TO[:, rows], M, beta=0 if rows.start == 0 else 1)
        if ctx.needs_input_grad[4]:
            dv = sampled(g_TO, x_TI, index_K)
        return dx, None, None, None, dv


class _Product(Function):
    """(x, index, values, O) -> S x, for layers whose own product is not to be touched."""

    @staticmethod
    def forward(ctx, x_TI, index_K, values_K, O):
        ctx.save_for_backward(x_TI, index_K, values_K)
        I = x_TI.shape[1]
        return multiplied(x_TI, offsets(index_K, O, I)[:-1], index_K % I, values_K)

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        x_TI, index_K, values_K = ctx.saved_tensors
        dx = dv = None
        if ctx.needs_input_grad[0]:
            I = x_TI.shape[1]
            column_K, order = torch.sort(index_K % I, stable=True)
            start_I = torch.searchsorted(column_K, torch.arange(I, device=index_K.device))
            dx = multiplied(g_TO, start_I, index_K[order] // I, values_K[order])
        if ctx.needs_input_grad[2]:
            dv = sampled(g_TO, x_TI, index_K)
        return dx, None, dv, None


def entries(x: Tensor, layer: Layer, index_K: Tensor, values_K: Tensor, O: int) -> Tensor:
    """y = layer(x) + S x, S (O, I) with `values` at sorted flat indices; x (..., I) of numbers, channels last.  Equal
    to `reference.additive` with S as a matrix; not twice differentiable."""
    x_TI = x.reshape(-1, x.shape[-1])
    if fusible(x, layer, values_K):
        y_TO = _Entries.apply(x_TI, layer.weight, layer.bias, index_K, values_K)
        return y_TO.view(*x.shape[:-1], O)
    if not hand_written() and not torch.compiler.is_compiling():
        S_OI = values_K.new_zeros(O * x.shape[-1]).index_add(0, index_K, values_K).view(O, -1)
        return reference.added(layer(x), F.linear(x.to(values_K.dtype), S_OI))
    change_TO = _Product.apply(x_TI.to(values_K.dtype), index_K, values_K, O)
    return reference.added(layer(x), change_TO.view(*x.shape[:-1], O))


class _Columns(Function):
    """(x, W, b, S, index) -> W x + S x[index] + b.  Of x the selected columns alone are kept for the backward pass."""

    @staticmethod
    def forward(ctx, x_TI, W_OI, bias, S_OK, index_K):
        z_TK = x_TI.index_select(1, index_K)
        ctx.save_for_backward(z_TK, W_OI, S_OK, index_K)
        return F.linear(x_TI, W_OI, bias).addmm_(z_TK, S_OK.t())

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        z_TK, W_OI, S_OK, index_K = ctx.saved_tensors
        dx = dS = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(g_TO, W_OI).index_add_(1, index_K, torch.mm(g_TO, S_OK))
        if ctx.needs_input_grad[3]:
            dS = torch.mm(z_TK.t(), g_TO).t()
        return dx, None, None, dS, None


class _Rows(Function):
    """(x, W, b, S, index) -> W x + b, and S x added at `index`.  Of g the selected columns alone meet x."""

    @staticmethod
    def forward(ctx, x_TI, W_OI, bias, S_KI, index_K):
        ctx.save_for_backward(x_TI, W_OI, S_KI, index_K)
        return F.linear(x_TI, W_OI, bias).index_add_(1, index_K, torch.mm(x_TI, S_KI.t()))

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        x_TI, W_OI, S_KI, index_K = ctx.saved_tensors
        dx = dS = None
        g_TK = g_TO.index_select(1, index_K)
        if ctx.needs_input_grad[0]:
            dx = torch.mm(g_TO, W_OI).addmm_(g_TK, S_KI)
        if ctx.needs_input_grad[3]:
            dS = torch.mm(g_TK.t(), x_TI)
        return dx, None, None, dS, None


def columns(x: Tensor, layer: Layer, S_OK: Tensor, index_K: Tensor) -> Tensor:
    """y = layer(x) + S x[index]; x (..., I) of numbers, channels last.  Equal to `reference.columns`."""
    if not fusible(x, layer, S_OK):
        return reference.columns(x, layer, S_OK, index_K)
    y_TO = _Columns.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, S_OK, index_K)
    return y_TO.view(*x.shape[:-1], S_OK.shape[0])


def rows(x: Tensor, layer: Layer, S_KI: Tensor, index_K: Tensor) -> Tensor:
    """y = layer(x), and S x added at `index`; x (..., I) of numbers, channels last.  Equal to `reference.rows`."""
    if not fusible(x, layer, S_KI):
        return reference.rows(x, layer, S_KI, index_K)
    y_TO = _Rows.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, S_KI, index_K)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])
