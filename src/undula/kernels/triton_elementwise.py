"""LoRAN's block function in Triton: u = B A, f(u) and f'(u) in one pass, nothing of the size of W kept between.

    f(u) = p u + (q u + v) sin(w u)          Sinter: (1, a, 0, w), Sine: (0, 0, 1, w)

    fold:  M = W + s f(u)                    pull:  M = W + s f(u),  G <- G f'(u)

u is summed in float32 without the shortcuts of tensor cores (at w = 1e4 these would lose the phase).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiled import width

Wave = tuple[float, float, float, float]  # p, q, v, w


@triton.jit
def _fold(
    W, A, B, M, G, O, I, R, p, q, v, w, s,
    W_row, W_column, A_row, A_column, B_row, B_column,
    HAS_W: tl.constexpr, PULL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANKS)
    here = (o < O)[:, None] & (i < I)[None, :]
    b = tl.load(B + o[:, None] * B_row + r[None, :] * B_column, mask=(o < O)[:, None] & (r < R)[None, :], other=0.0)
    a = tl.load(A + r[:, None] * A_row + i[None, :] * A_column, mask=(r < R)[:, None] & (i < I)[None, :], other=0.0)
    u = tl.dot(b, a, input_precision="ieee")
    wave = tl.sin(w * u)
    f = p * u + (q * u + v) * wave
    at = o[:, None] * I + i[None, :]
    if PULL:
        slope = p + q * wave + (q * u + v) * w * tl.cos(w * u)
        g = tl.load(G + at, mask=here, other=0.0)
        tl.store(G + at, g * slope, mask=here)
    m = s * f
    if HAS_W:
        m += tl.load(W + o[:, None] * W_row + i[None, :] * W_column, mask=here, other=0.0)
    tl.store(M + at, m, mask=here)


def _launch(W_OI: Tensor | None, A_RI: Tensor, B_OR: Tensor, wave: Wave, s: float, M_OI: Tensor, G_OI: Tensor) -> None:
    (O, R), I, W = B_OR.shape, A_RI.shape[1], A_RI if W_OI is None else W_OI
    rows, columns = 32, 64
    grid = (triton.cdiv(O, rows), triton.cdiv(I, columns))
    strides = (*W.stride(), *A_RI.stride(), *B_OR.stride())
    flags = {"HAS_W": W_OI is not None, "PULL": G_OI is not M_OI, "ROWS": rows, "COLUMNS": columns, "RANKS": width(R)}
    _fold[grid](W, A_RI, B_OR, M_OI, G_OI, O, I, R, *wave, s, *strides, **flags)


def fold(W_OI: Tensor | None, A_RI: Tensor, B_OR: Tensor, wave: Wave, s: float) -> Tensor:
    """W + s f(B A), or s f(B A) where W is None: (O, I) in float32."""
    M_OI = A_RI.new_empty(B_OR.shape[0], A_RI.shape[1])
    _launch(W_OI, A_RI, B_OR, wave, s, M_OI, M_OI)
    return M_OI


def pull(W_OI: Tensor | None, A_RI: Tensor, B_OR: Tensor, wave: Wave, s: float, G_OI: Tensor) -> Tensor:
    """The same, and the contiguous G becomes G f'(B A) in place."""
    M_OI = torch.empty_like(G_OI)
    _launch(W_OI, A_RI, B_OR, wave, s, M_OI, G_OI)
    return M_OI
