"""FedSVD (Lee et al. 2025, arXiv:2505.12805): FFA whose A follows the data: the server factorises anew.

    B A = U S V' (rank r):   A <- V' (orthonormal rows),   B <- U S:   the product is kept

From a QR of B and the SVD of R A (r x I): no O x I matrix, and exact, since the rank is at most r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Factors, Method
from .aggregation import Aggregation, Client
from .ffa import FFA
from .pairs import pairs_of


@Aggregation.register
@dataclass(frozen=True)
class FedSVD(Aggregation):
    """Clients train B from an A that all of them share; their mean is exact as in FFA, and A becomes the right singular
    vectors of the mean.  Where B is 0 (before the first round) A stays; where the product has lost rank, A's rows are
    completed from the old A's, orthonormally.  What an optimiser knows of B has no meaning after it.

    Post-processing: computed from the clients' mean alone, so it costs no privacy.  Raises TypeError for a method that
    is no pair of factors.
    """

    source = "Lee et al. 2025, arXiv:2505.12805"
    trains = "linear"
    remakes = True

    def at(self, site: str, clients: Sequence[Client], before: Factors | None) -> tuple[Method, Factors]:
        pairs_of(site, clients, "FedSVD")  # which refuses what has none
        method, mean = FFA().at(site, clients, None)
        pairs = pairs_of(site, [Client(0, 1.0, method, mean)], "FedSVD")
        (B_OR,), (A_RI,) = pairs.B, pairs.A
        return method, pairs.factors(*refactorised(B_OR, A_RI))


def refactorised(B_OR: Tensor, A_RI: Tensor) -> tuple[Tensor, Tensor]:
    """(U S, V') of B A; the pair itself where B is 0."""
    if not B_OR.any():
        return B_OR, A_RI
    Q_OK, R_KR = torch.linalg.qr(B_OR)
    U, s, Vh = torch.linalg.svd(R_KR @ A_RI, full_matrices=False)
    r, I = A_RI.shape
    kept = s > s[0] * torch.finfo(s.dtype).eps * max(B_OR.shape[0], I)
    B, A = (Q_OK @ U[:, kept]) * s[kept], Vh[kept]
    if missing := r - A.shape[0]:
        A = torch.cat([A, complement(A, A_RI, missing)])
        B = torch.cat([B, B.new_zeros(B.shape[0], r - B.shape[1])], 1)
    return B, A


def complement(A_KI: Tensor, old_RI: Tensor, number: int) -> Tensor:
    """Orthonormal rows beside those of A, of what the old A's rows span beside them; 0 where they span no more."""
    _, s, Vh = torch.linalg.svd(old_RI - (old_RI @ A_KI.T) @ A_KI, full_matrices=False)
    found = Vh[s > s[0] * torch.finfo(s.dtype).eps * max(old_RI.shape)][:number]
    return torch.nn.functional.pad(found, (0, 0, 0, number - len(found)))
