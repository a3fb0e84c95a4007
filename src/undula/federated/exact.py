"""The mean of the updates itself, cut to a rank: stacked as in FLoRA (Wang et al. 2024, arXiv:2409.05976), truncated by
its singular values as in FlexLoRA (Bai et al. 2024, arXiv:2402.11505).

    D = sum_k p_k dW_k = [p_1 B_1 ... p_K B_K] [A_1; ...; A_K] = U S V',   B A = U_r S_r V_r'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Additive, Factors, LowRank, Method
from ..core.ranges import Rank
from ..kernels import svd
from ..methods.lora import Fixed, LoRA
from ..methods.sum import as_pair
from .aggregation import Aggregation, Client
from .fedsvd import complement
from .pairs import are_pairs, pairs_of


@Aggregation.register
@dataclass(frozen=True)
class Exact(Aggregation):
    """The nearest update of the clients' highest rank (or `rank`) to the mean of theirs, whatever their ranks, scales,
    methods and layers, on the Additive rung.  Where all clients have LoRA, the result is LoRA of the same scale, of
    which clients can go on; else a plain LoRA.  Raises TypeError below the Additive rung."""

    source = "Wang et al. 2024, arXiv:2409.05976; Bai et al. 2024, arXiv:2402.11505"
    needs_each = True

    rank: Rank | None = None

    def at(self, site: str, clients: Sequence[Client], before: Factors | None) -> tuple[Method, Factors]:
        if are_pairs(clients):
            pairs = pairs_of(site, clients, "Exact")
            B = torch.cat([p * B for p, B in zip(pairs.shares, pairs.B, strict=True)], 1)
            rank = pairs.rank if self.rank is None else self.rank
            made = nearest(B, torch.cat(pairs.A), rank)
            if rank == pairs.rank:
                return pairs.method, pairs.factors(*made)
            return plain_lora(*made, pairs.scale, pairs.like[pairs.names[1]].dtype)
        parts = [own_pair(site, client) for client in clients]
        rank = max(rank_of(site, c) for c in clients) if self.rank is None else self.rank
        kind = next(t.dtype for t in clients[0].factors.values() if t.is_floating_point())
        return plain_lora(
            *nearest(torch.cat([B for B, _ in parts], 1), torch.cat([A for _, A in parts]), rank), 1.0, kind
        )


def nearest(B_OK: Tensor, A_KI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B (O, rank), A (rank, I)), the nearest of that rank to B A.  Ranks that this does not fill (all,
    before the first step) get directions of A's rows that are left, of their size, with B = 0: zero now, able to
    learn."""
    U, s, V = svd.factored(B_OK, A_KI)
    carries = s > s[0] * torch.finfo(s.dtype).eps * max(B_OK.shape[0], A_KI.shape[1])
    number = min(int(carries.sum()), rank)
    B, A = svd.halves(U[:, :number], s[:number], V[:, :number])
    size = A_KI.norm(dim=1).mean()
    free = size * complement(V[:, :number].T, A_KI, rank - number)
    return torch.nn.functional.pad(B, (0, rank - number)), torch.cat([A, free])


def plain_lora(B_OR: Tensor, A_RI: Tensor, scale: float, dtype: torch.dtype) -> tuple[Method, Factors]:
    made = {"A": A_RI.to(dtype).requires_grad_(), "B": B_OR.to(dtype).requires_grad_()}
    return LoRA(r=A_RI.shape[0], alpha=1.0, scaling=Fixed(scale)), made


def own_pair(site: str, client: Client) -> tuple[Tensor, Tensor]:
    """p_k dW_k as a pair.  Raises TypeError below the Additive rung."""
    method, p = client.method, client.share
    if not isinstance(method, Additive):
        raise TypeError(
            f"Exact adds updates dW; {method!r} at {site} (client {client.number}) stands on the rung {method.rung()}, "
            "which has none: FedIT averages factors of any method"
        )
    if isinstance(method, LowRank):
        B, A = method.pair(client.factors)
        return p * B.detach().double(), A.detach().double()
    _, pair = as_pair(p * method.delta(client.factors).detach().double())
    return pair["B"].detach(), pair["A"].detach()


def rank_of(site: str, client: Client) -> int:
    """The rank that a client's method has.  Raises ValueError for one without."""
    if isinstance(client.method, LowRank):
        return client.method.pair(client.factors)[1].shape[0]
    if isinstance(r := getattr(client.method, "r", None), int):
        return r
    raise ValueError(f"{client.method!r} at {site} (client {client.number}) has no rank: say which, Exact(rank=8)")
