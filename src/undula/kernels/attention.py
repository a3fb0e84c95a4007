"""Attention of rows that stand behind each other in one, each to itself, on a CPU.

torch's fused attention is called for a row at a time, and in bfloat16 its backward costs a CPU several times what it
does in float32: on rows of some hundred tokens more than all products with the model's weights.  Here

    P = softmax(s Q K'),   O = P V
    dV = P' dO,   dP = dO V',   dS = s P * (dP - rowsum(dO * O)),   dQ = dS K,   dK = dS' Q

are products of whole pieces: short rows together in one, with what is not their own hidden, long ones in blocks of
queries that read no key behind them.  Scores, softmax and their gradients are float32 at least; P and dS are rounded
to the operands' type before they are multiplied, as torch's are.  Kept for the backward: q, k, v and O, nothing of
tokens x tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from . import between
from .autocast import casts, exact_backward, hand_written, wide
from .elementwise import under_mode
from .holes import drawn, holes

BLOCK = 128  # queries of a piece
TOGETHER = 64  # tokens of short rows in one piece: of more most scores would be hidden
LEAST = 1 << 14  # scores of a piece: for fewer nothing is compiled


@dataclass(frozen=True, eq=False)
class Piece:
    """Queries first .. last - 1 look at keys begin .. end - 1; each sees those from its `least` to before its `most`,
    counted from `begin` (queries,), int32; hides: (queries, keys), or None where all see all."""

    first: int
    last: int
    begin: int
    end: int
    least: Tensor
    most: Tensor
    hides: Tensor | None


@functools.lru_cache(16)  # all layers of a step ask the same
def pieces(lengths: tuple[int, ...], causal: bool) -> tuple[Piece, ...]:
    """The pieces of rows of these lengths."""
    sizes = torch.tensor(lengths, device="cpu")
    begins = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    ends = begins + sizes.repeat_interleave(sizes)
    if causal:
        ends = torch.arange(len(ends), device="cpu") + 1
    found = []
    for first, last in _parts(lengths):
        begin, end = int(begins[first:last].min()), int(ends[first:last].max())
        least, most = (t[first:last] - begin for t in (begins, ends))
        at = torch.arange(end - begin, device="cpu")
        hides = (at < least[:, None]) | (at >= most[:, None])
        found.append(Piece(first, last, begin, end, least.int(), most.int(), hides if hides.any() else None))
    return tuple(found)


@functools.lru_cache(256)
def _each(at: Piece, G: int, each: int) -> tuple[Tensor, Tensor]:
    """`least` and `most` of each row of (G, queries each, keys)."""
    least, most = (t.repeat_interleave(each).repeat(G) for t in (at.least, at.most))
    return least, most


def _parts(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Short neighbours together, long ones in blocks."""
    at = size = 0
    for n in lengths:
        if size and size + n > TOGETHER:
            yield at, at + size
            at, size = at + size, 0
        if n <= TOGETHER:
            size += n
            continue
        for first in range(at, at + n, BLOCK):
            yield first, min(first + BLOCK, at + n)
        at += n
    if size:
        yield at, at + size


def applies(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attended` takes them: one row on a CPU, whole groups of heads, one floating type, and nothing that sees,
    follows or casts operations."""
    if not (q.device.type == "cpu" and q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        return False
    if casts(q.device) or not hand_written() or under_mode():
        return False
    return q.shape[0] == 1 and k.shape[1] == v.shape[1] and q.shape[1] % k.shape[1] == 0 and q.shape[3] == k.shape[3]


def attended(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, causal: bool, dropout: float = 0.0
) -> Tensor:
    """softmax(scale q k') v of each row, q (1, H, T, d), k (1, G, T, d), v (1, G, T, e) -> (1, T, H, e); query head h
    reads key head h // (H / G).  `dropout`: the share of P that falls out, by a seed of torch's generator."""
    out: Tensor = _Attended.apply(q, k, v, tuple(lengths), scale, causal, dropout)
    return out


class _Attended(Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, scale, causal, dropout):
        G, (_, H, T, _) = k.shape[1], q.shape
        ctx.law = lengths, scale, causal, dropout, drawn() if dropout else 0
        Q, K = (t.to(wide(t.dtype)) for t in (_grouped(q, G), k[0]))
        o = q.new_empty(1, T, H, v.shape[3])
        O = o.view(T, G, H // G, -1)
        for i, at in enumerate(pieces(lengths, causal)):
            P = _weights(Q, K, at, scale, q.dtype)[1]
            y = torch.bmm(_kept(P, ctx.law, i), v[0, :, at.begin : at.end])
            O[at.first : at.last] = y.view(G, at.last - at.first, H // G, -1).transpose(0, 1)
        ctx.save_for_backward(q, k, v, o)
        return o

    @staticmethod
    @exact_backward
    def backward(ctx, g):
        q, k, v, o = ctx.saved_tensors
        G, (_, H, T, d) = k.shape[1], q.shape
        lengths, scale, causal, dropout, _ = ctx.law
        Q, gO, D, each = _grouped(q, G), _grouped(g.transpose(1, 2), G), _rowsum(g, o, G), H // G
        Qw, Kw, Vw, gOw = (t.to(D.dtype) for t in (Q, k[0], v[0], gO))
        dq, dk, dv = q.new_empty(T, G, each, d), torch.zeros_like(Kw), torch.zeros_like(Vw)
        for i, at in enumerate(pieces(lengths, causal)):
            rows, keys = slice(at.first * each, at.last * each), slice(at.begin, at.end)
            P, rounded = _weights(Qw, Kw, at, scale, q.dtype)
            if dropout:
                rounded = _kept(P.to(q.dtype, copy=True), ctx.law, i)
            dv[:, keys] += torch.bmm(rounded.transpose(1, 2), gO[:, rows])
            dP = _kept(torch.bmm(gOw[:, rows], Vw[:, keys].transpose(1, 2)), ctx.law, i)
            dS = _slopes(P, dP, D[:, rows], scale, q.dtype)
            dq[at.first : at.last] = torch.bmm(dS, k[0, :, keys]).view(G, -1, each, d).transpose(0, 1)
            dk[:, keys] += torch.bmm(dS.transpose(1, 2), Q[:, rows])
        return dq.view(1, T, H, d).transpose(1, 2), dk.to(k.dtype)[None], dv.to(v.dtype)[None], None, None, None, None


def _grouped(x: Tensor, G: int) -> Tensor:
    """(1, H, T, d) -> (G, T H/G, d): of each key head the queries, the heads of one token beside each other."""
    _, H, T, d = x.shape
    return x[0].view(G, H // G, T, d).transpose(1, 2).reshape(G, T * (H // G), d)


def _rowsum(g: Tensor, o: Tensor, G: int) -> Tensor:
    """rowsum(dO * O) (G, T H/G, 1) of (1, T, H, e)."""
    _, T, H, _ = o.shape
    dtype = wide(o.dtype)
    sums = (g.to(dtype) * o.to(dtype)).sum(-1)
    return sums.view(T, G, H // G).transpose(0, 1).reshape(G, T * (H // G), 1)


def _weights(Q: Tensor, K: Tensor, at: Piece, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P of a piece (G, queries H/G, keys), and the same rounded to `dtype`."""
    G, each = len(K), Q.shape[1] // K.shape[1]
    S = torch.bmm(Q[:, at.first * each : at.last * each], K[:, at.begin : at.end].transpose(1, 2))
    if _in_c(S, dtype):
        return S, between.weighed(S.view(-1, S.shape[2]), *_each(at, G, each), scale, dtype).view_as(S)
    S.mul_(scale)
    if at.hides is not None:
        S.view(G, -1, each, S.shape[2]).masked_fill_(at.hides[:, None], -torch.inf)
    return torch.softmax(S, -1, out=S), S.to(dtype)


def _slopes(P: Tensor, dP: Tensor, D: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale P (dP - D) of a piece, rounded to `dtype`; dP is written over."""
    if _in_c(P, dtype):
        width = P.shape[2]
        return between.sloped(P.view(-1, width), dP.view(-1, width), D.reshape(-1), scale, dtype).view_as(P)
    return dP.sub_(D).mul_(P).mul_(scale).to(dtype)


def _in_c(S: Tensor, dtype: torch.dtype) -> bool:
    known = S.dtype == torch.float32 and dtype in between.SUFFIX and S.numel() >= LEAST
    return known and not under_mode() and between.passes() is not None


def _kept(P: Tensor, law: tuple, i: int) -> Tensor:
    """P, in its place, with what the piece number i drops."""
    dropout, seed = law[3:]
    if dropout:
        P.mul_(1 / (1 - dropout)).view(-1).index_fill_(0, holes(seed + i, P.numel(), dropout), 0)
    return P
