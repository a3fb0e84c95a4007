"""The grouped product of segments in Triton: rows of adapter k take B_k A_k x, whatever the ranks and counts.

    z_t = A_k x_t,   y_t = B_k z_t,   dz = B' g,   dx = A' dz,   dA_k = dz_k' x_k,   dB_k = g_k' z_k

(The product of Punica, Chen et al. 2023, arXiv:2310.18547, with gradients.)  All A_k stand in one table (C, I), all
B_k' in another (C, O), C the sum of the ranks; a tile is a few rows of one segment.  Sums are taken in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from .autocast import exact_backward
from .compiled import width

ROWS = 16  # of a tile


@dataclass(frozen=True)
class Segments:
    """Where the rows and the ranks of K adapters begin, on the device."""

    tiles: Tensor  # (tiles, 2): which adapter, its first row
    rows: Tensor  # (K + 1)
    ranks: Tensor  # (K + 1)
    widest: int  # rank


@functools.lru_cache(64)  # a batch's are those of all its layers: they are copied to the device
def where(counts: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> Segments:
    """Adapter k has counts[k] rows in turn and ranks[k] ranks."""
    rows, cells = [0], [0]
    for count, rank in zip(counts, ranks, strict=True):
        rows.append(rows[-1] + count)
        cells.append(cells[-1] + rank)
    tiles = [(k, at) for k in range(len(counts)) for at in range(rows[k], rows[k + 1], ROWS)]
    at_tiles, at_rows, at_cells = (torch.tensor(t, dtype=torch.int32, device=device) for t in (tiles, rows, cells))
    return Segments(at_tiles, at_rows, at_cells, widest=max(ranks, default=1))


@triton.jit
def _down(X, A, Z, TILES, ROW, CELL, I, TALL: tl.constexpr, WIDE: tl.constexpr, RANKS: tl.constexpr):
    """z (T, RANKS): rows of a tile times the ranks of its adapter, the rest 0."""
    k, first = tl.load(TILES + 2 * tl.program_id(0)), tl.load(TILES + 2 * tl.program_id(0) + 1)
    last, cell = tl.load(ROW + k + 1), tl.load(CELL + k)
    rank = tl.load(CELL + k + 1) - cell
    t, r = (first + tl.arange(0, TALL)).to(tl.int64), tl.arange(0, RANKS)
    total = tl.zeros((TALL, RANKS), dtype=tl.float32)
    for start in range(0, I, WIDE):
        i = start + tl.arange(0, WIDE)
        x = tl.load(X + t[:, None] * I + i[None, :], mask=(t < last)[:, None] & (i < I)[None, :], other=0.0)
        at = (cell + r)[None, :].to(tl.int64) * I + i[:, None]
        a = tl.load(A + at, mask=(r < rank)[None, :] & (i < I)[:, None], other=0.0)
        total += tl.dot(x, a, input_precision="ieee")
    tl.store(Z + t[:, None] * RANKS + r[None, :], total.to(Z.dtype.element_ty), mask=(t < last)[:, None])


@triton.jit
def _up(Z, B, Y, TILES, ROW, CELL, O, TALL: tl.constexpr, WIDE: tl.constexpr, RANKS: tl.constexpr):
    """y (T, O): z of a tile's rows times the table's rows of its adapter."""
    k, first = tl.load(TILES + 2 * tl.program_id(0)), tl.load(TILES + 2 * tl.program_id(0) + 1)
    last, cell = tl.load(ROW + k + 1), tl.load(CELL + k)
    rank = tl.load(CELL + k + 1) - cell
    t, r = (first + tl.arange(0, TALL)).to(tl.int64), tl.arange(0, RANKS)
    o = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    z = tl.load(Z + t[:, None] * RANKS + r[None, :], mask=(t < last)[:, None], other=0.0)
    at = (cell + r)[:, None].to(tl.int64) * O + o[None, :]
    b = tl.load(B + at, mask=(r < rank)[:, None] & (o < O)[None, :], other=0.0)
    y = tl.dot(z, b, input_precision="ieee")
    here = (t < last)[:, None] & (o < O)[None, :]
    tl.store(Y + t[:, None] * O + o[None, :], y.to(Y.dtype.element_ty), mask=here)


@triton.jit
def _table(Z, X, D, ROW, CELL, I, TALL: tl.constexpr, WIDE: tl.constexpr, RANKS: tl.constexpr):
    """Rows of adapter k of a table's gradient (C, I): z_k' x_k."""
    k = tl.program_id(0)
    first, last, cell = tl.load(ROW + k), tl.load(ROW + k + 1), tl.load(CELL + k)
    rank = tl.load(CELL + k + 1) - cell
    i, r = tl.program_id(1) * WIDE + tl.arange(0, WIDE), tl.arange(0, RANKS)
    total = tl.zeros((RANKS, WIDE), dtype=tl.float32)
    for start in range(first, last, TALL):
        t = (start + tl.arange(0, TALL)).to(tl.int64)
        z = tl.load(Z + t[None, :] * RANKS + r[:, None], mask=(t < last)[None, :], other=0.0)
        x = tl.load(X + t[:, None] * I + i[None, :], mask=(t < last)[:, None] & (i < I)[None, :], other=0.0)
        total += tl.dot(z, x, input_precision="ieee")
    at = (cell + r)[:, None].to(tl.int64) * I + i[None, :]
    tl.store(D + at, total.to(D.dtype.element_ty), mask=(r < rank)[:, None] & (i < I)[None, :])


def _shape(s: Segments) -> dict[str, int]:
    return {"TALL": ROWS, "WIDE": 64, "RANKS": width(s.widest)}


def down(x_TI: Tensor, A_CI: Tensor, s: Segments) -> Tensor:
    T, I = x_TI.shape
    z_TR = x_TI.new_zeros(T, width(s.widest))
    _down[len(s.tiles),](x_TI, A_CI, z_TR, s.tiles, s.rows, s.ranks, I, **_shape(s))
    return z_TR


def up(z_TR: Tensor, B_CO: Tensor, s: Segments) -> Tensor:
    y_TO = z_TR.new_zeros(z_TR.shape[0], B_CO.shape[1])
    grid = (len(s.tiles), triton.cdiv(B_CO.shape[1], 64))
    _up[grid](z_TR, B_CO, y_TO, s.tiles, s.rows, s.ranks, B_CO.shape[1], **_shape(s))
    return y_TO


def table(z_TR: Tensor, x_TI: Tensor, like_CI: Tensor, s: Segments) -> Tensor:
    d_CI = torch.empty_like(like_CI)
    grid = (len(s.rows) - 1, triton.cdiv(x_TI.shape[1], 64))
    _table[grid](z_TR, x_TI, d_CI, s.rows, s.ranks, x_TI.shape[1], **_shape(s))
    return d_CI


class _Grouped(Function):
    """(x, A, B', where) -> B A x by segments."""

    @staticmethod
    def forward(ctx, x_TI, A_CI, B_CO, segments):
        z_TR = down(x_TI, A_CI, segments)
        ctx.save_for_backward(x_TI, A_CI, B_CO, z_TR)
        ctx.segments = segments
        return up(z_TR, B_CO, segments)

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        x_TI, A_CI, B_CO, z_TR = ctx.saved_tensors
        s, g_TO = ctx.segments, g_TO.contiguous()
        dz_TR = down(g_TO, B_CO, s)
        dx = up(dz_TR, A_CI, s) if ctx.needs_input_grad[0] else None
        dA = table(dz_TR, x_TI, A_CI, s) if ctx.needs_input_grad[1] else None
        dB = table(z_TR, g_TO, B_CO, s) if ctx.needs_input_grad[2] else None
        return dx, dA, dB, None


def grouped(x_TI: Tensor, A_CI: Tensor, B_CO: Tensor, segments: Segments) -> Tensor:
    """B_k A_k x for the rows of each adapter in turn: x (T, I) -> (T, O), all of one dtype, with gradients."""
    return _Grouped.apply(x_TI.contiguous(), A_CI.contiguous(), B_CO.contiguous(), segments)
