"""Added products of a batch whose rows belong to different low-rank adapters.

Rows come sorted by adapter.  Where every adapter has the same number of rows and the same rank (the usual case when
decoding) one batched product does it, twice; else one pair of products per adapter.  Nothing is padded or gathered
per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import compiled

Pair = tuple[Tensor, Tensor]  # (B (O, R), A (R, I))


def stacked(pairs: Sequence[Pair], counts: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """(A (K, R, I), B' (K, R, O)) where one batched product serves, else None."""
    if len({A.shape[0] for _, A in pairs}) > 1 or len(set(counts)) > 1:
        return None
    return torch.stack([A for _, A in pairs]), torch.stack([B.t() for B, _ in pairs])


def grouped(
    x_NTI: Tensor, pairs: Sequence[Pair], counts: Sequence[int], stacks: tuple[Tensor, Tensor] | None
) -> Tensor:
    """B_k A_k x for the rows of adapter k: counts[k] rows in turn, x (N, T, I) -> (N, T, O)."""
    N, T, I = x_NTI.shape
    if stacks is not None:
        A_KRI, B_KRO = stacks
        z_KTR = torch.bmm(x_NTI.reshape(len(counts), -1, I), A_KRI.transpose(1, 2))
        return torch.bmm(z_KTR, B_KRO).view(N, T, B_KRO.shape[2])
    if x_NTI.dtype != torch.float64 and compiled.chosen(x_NTI.device):
        from .triton_segments import grouped as in_segments
        from .triton_segments import where

        segments = where(tuple(T * n for n in counts), tuple(A.shape[0] for _, A in pairs), x_NTI.device)
        A_CI, B_CO = torch.cat([A for _, A in pairs]), torch.cat([B.t() for B, _ in pairs])
        return in_segments(x_NTI.reshape(N * T, I), A_CI, B_CO, segments).view(N, T, B_CO.shape[1])
    parts = x_NTI.split(list(counts))
    return torch.cat([p @ A_RI.t() @ B_OR.t() for p, (B_OR, A_RI) in zip(parts, pairs, strict=True)])
