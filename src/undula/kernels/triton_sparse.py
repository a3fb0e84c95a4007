"""The gradient of sparse entries in Triton: (g' x) at K places, one product of length T each, nothing of (O, I) formed.

Both inputs are turned first, so that an entry reads two runs of memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sampled(G, X, INDEX, OUT, T, I, K, ENTRIES: tl.constexpr, TOKENS: tl.constexpr):
    k = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    index = tl.load(INDEX + k, mask=k < K, other=0)
    o, i = index // I, index % I
    total = tl.zeros((ENTRIES,), dtype=tl.float32)
    for start in range(0, T, TOKENS):
        t = start + tl.arange(0, TOKENS)
        here = (k < K)[:, None] & (t < T)[None, :]
        g = tl.load(G + o[:, None] * T + t[None, :], mask=here, other=0.0).to(tl.float32)
        x = tl.load(X + i[:, None] * T + t[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(g * x, 1)
    tl.store(OUT + k, total.to(OUT.dtype.element_ty), mask=k < K)


def sampled(g_TO: Tensor, x_TI: Tensor, index_K: Tensor) -> Tensor:
    """The entries of g' x at flat indices (K), summed in float32, in g's type."""
    (T, I), K = x_TI.shape, index_K.numel()
    values_K = g_TO.new_empty(K)
    if K:
        g_OT, x_IT = g_TO.t().contiguous(), x_TI.t().contiguous()
        _sampled[triton.cdiv(K, 16),](g_OT, x_IT, index_K, values_K, T, I, K, ENTRIES=16, TOKENS=128)
    return values_K
