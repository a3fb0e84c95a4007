"""c_1 M_1 + ... + c_K M_K for frozen random M_i that are never held: drawn in blocks, used, and drawn again backwards.

    dL/dc_i = <dL/dM, M_i>

M_i are the numbers i n, ... (i + 1) n - 1 of a stream (see `frozen`), uniform in [-1, 1).  Each direction costs the
drawing of K n numbers, a few nanoseconds each on a CPU.  These are operators of torch, so that a compiler takes them
as they are instead of unrolling their loops.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .autocast import exact
from .frozen import floats, numbers

BLOCK = 1 << 16  # numbers drawn at a time: 256 KiB, so that the passes of the hash stay in the cache


def _blocks(words_2: Tensor, K: int, n: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(which of the K matrices, their numbers (k, n))."""
    each = max(1, BLOCK // n)
    for i in range(0, K, each):
        k = min(each, K - i)
        yield slice(i, i + k), floats(numbers(words_2, i * n, k * n)).view(k, n).to(dtype)


@torch.library.custom_op("undula::mixed", mutates_args=())
def _mixed(c_K: Tensor, words_2: Tensor, n: int) -> Tensor:
    total = c_K.new_zeros(n)
    with torch.autocast(c_K.device.type, enabled=False):
        for which, M in _blocks(words_2, len(c_K), n, c_K.dtype):
            total += c_K[which] @ M
    return total


@torch.library.custom_op("undula::mixed_back", mutates_args=())
def _mixed_back(g_n: Tensor, words_2: Tensor, K: int) -> Tensor:
    dc = g_n.new_empty(K)
    with torch.autocast(g_n.device.type, enabled=False):
        for which, M in _blocks(words_2, K, len(g_n), g_n.dtype):
            dc[which] = M @ g_n
    return dc


def _keep(ctx, inputs, output) -> None:
    c_K, words_2, _ = inputs
    ctx.K = len(c_K)
    ctx.save_for_backward(words_2)


def _backward(ctx, g_n: Tensor) -> tuple[Tensor, None, None]:
    return _mixed_back(g_n.contiguous(), *ctx.saved_tensors, ctx.K), None, None


_mixed.register_fake(lambda c_K, words_2, n: c_K.new_empty(n))
_mixed_back.register_fake(lambda g_n, words_2, K: g_n.new_empty(K))
_mixed.register_autograd(_backward, setup_context=_keep)


def mixture(c_K: Tensor, words_2: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The sum over i of c_i M_i, matrices M_i of this shape from the stream with these words."""
    if torch._C._are_functorch_transforms_active():  # `torch.func` cannot follow an operator: all M_i are held
        with exact(c_K.device):
            pieces = [c_K[which] @ M for which, M in _blocks(words_2, len(c_K), math.prod(shape), c_K.dtype)]
        return torch.stack(pieces).sum(0).view(shape)
    return _mixed(c_K, words_2, math.prod(shape)).view(shape)
