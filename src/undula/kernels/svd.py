"""Singular values and best approximations of update matrices, without forming what the factors already tell.

Best means Eckart-Young: of all matrices of rank r, the first r singular triples are nearest in the Frobenius norm, and
miss by sqrt(sum of the remaining s_i^2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]  # U (O, K), s (K) falling, V (I, K): M = U diag(s) V'


def factored(B_OR: Tensor, A_RI: Tensor) -> Triple:
    """SVD of B A from the factors: a QR of each and the SVD of an (R x R) core, in float64.  Exact; O x I is never
    formed."""
    Q_O, R_B = torch.linalg.qr(B_OR.to(torch.float64))
    Q_I, R_A = torch.linalg.qr(A_RI.to(torch.float64).T)
    U, s, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_O @ U, s, Q_I @ Vh.T


def factored_values(B_OR: Tensor, A_RI: Tensor) -> Tensor:
    """The singular values of B A from the factors, falling: min(O, R, I) of them, in float64.  Their norm is ||B A||_F,
    without the cancellation of a Gram matrix."""
    R_B = torch.linalg.qr(B_OR.to(torch.float64), mode="r").R
    R_A = torch.linalg.qr(A_RI.to(torch.float64).T, mode="r").R
    return torch.linalg.svdvals(R_B @ R_A.T)


def exact(M_OI: Tensor, r: int) -> Triple:
    """The first r singular triples, from the full decomposition: O(O I min(O, I)) time."""
    U, s, Vh = torch.linalg.svd(M_OI, full_matrices=False)
    return U[:, :r], s[:r], Vh[:r].T


def randomised(M_OI: Tensor, r: int, oversample: int, iterations: int, seed: int) -> Triple:
    """About the first r singular triples: a seeded Gaussian sketch of k columns, k = r + the larger of r and
    `oversample`, and power iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4), O(O I k) time.

    The miss exceeds the best one by a factor that goes to 1 as (s_{k+1}/s_r)^(2 iterations).  It is worst on pure
    noise, which has no leading directions: found there, with the defaults of `Randomised`, at most 1.003; at most
    1.0003 where s_i falls as i^-0.3.  Where a sketch would save nothing (4 k >= min(O, I)) this is `exact`.  The global
    random state is neither used nor changed.
    """
    if sketches_all(M_OI.shape, r, oversample):
        return exact(M_OI, r)
    return _sketched(lambda X: M_OI @ X, lambda Y: M_OI.T @ Y, M_OI, r, oversample, iterations, seed)


def sketches_all(shape: tuple[int, ...], r: int, oversample: int) -> bool:
    """Whether a sketch for r triples would save nothing."""
    return 4 * (r + max(r, oversample)) >= min(shape)


Product = Callable[[Tensor], Tensor]


def _sketched(
    times: Product, back: Product, like: Tensor | Blocks, r: int, oversample: int, iterations: int, seed: int
) -> Triple:
    """Algorithm 4.4, of a matrix by its products M X and M' Y."""
    generator = torch.Generator().manual_seed(seed)
    shape = (like.shape[1], r + max(r, oversample))  # drawn on the CPU: the same sketch on every device
    sketch_IK = torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
    Q_OK = torch.linalg.qr(times(sketch_IK)).Q
    for _ in range(iterations):
        Q_OK = torch.linalg.qr(times(torch.linalg.qr(back(Q_OK)).Q)).Q
    U, s, Vh = torch.linalg.svd(back(Q_OK).T, full_matrices=False)
    return Q_OK @ U[:, :r], s[:r], Vh[:r].T


@dataclass(frozen=True)
class Blocks:
    """A matrix (O, I) that is computed `step` rows at a time and never held as a whole; in float64."""

    shape: tuple[int, int]
    rows: Callable[[slice], Tensor]
    step: int
    device: torch.device
    dtype: torch.dtype = torch.float64

    def each(self) -> Iterator[tuple[slice, Tensor]]:
        """(which rows, their numbers)."""
        for first in range(0, self.shape[0], self.step):
            some = slice(first, min(first + self.step, self.shape[0]))
            yield some, self.rows(some).to(self.dtype)

    def whole(self) -> Tensor:
        """M itself."""
        return torch.cat([M for _, M in self.each()])

    def held(self) -> Blocks:
        """The same, computed once: its products take what is there."""
        M = self.whole()
        return replace(self, rows=lambda some: M[some])

    def times(self, X_IK: Tensor) -> Tensor:
        """M X (O, K)."""
        return torch.cat([M @ X_IK for _, M in self.each()])

    def back(self, Y_OK: Tensor) -> Tensor:
        """M' Y (I, K)."""
        total = Y_OK.new_zeros(self.shape[1], Y_OK.shape[1])
        for some, M in self.each():
            total.addmm_(M.T, Y_OK[some])
        return total

    def square(self) -> float:
        """||M||^2."""
        return float(sum(M.square().sum() for _, M in self.each()))

    def leading(self, r: int, oversample: int, iterations: int, seed: int) -> Triple:
        """As `randomised`: where a sketch would save nothing, the matrix is formed."""
        if sketches_all(self.shape, r, oversample):
            return exact(self.whole(), r)
        return _sketched(self.times, self.back, self, r, oversample, iterations, seed)


def balanced(B_OR: Tensor, A_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with |column i of B| = |row i of A|: kind to low precision and to further training."""
    b, a = B_OR.norm(dim=0), A_RI.norm(dim=1)
    gain = torch.where((b > 0) & (a > 0), (a / b).sqrt(), torch.ones_like(a))
    return B_OR * gain, A_RI / gain[:, None]


def without(M_KI: Tensor, column: int | None) -> Tensor:
    """M with zeros in this column."""
    if column is None:
        return M_KI
    return M_KI.index_fill(1, torch.tensor([column], device=M_KI.device), 0.0)


def halves(U_OR: Tensor, s_R: Tensor, V_IR: Tensor) -> tuple[Tensor, Tensor]:
    """U diag(s) V' as a pair (B (O, R), A (R, I)) of equal norms: U sqrt(s) and sqrt(s) V'."""
    root = s_R.sqrt()
    return (U_OR * root).contiguous(), (V_IR * root).T.contiguous()


def values(M_OI: Tensor, exact_below: int = 2048, leading: int = 64) -> Tensor:
    """The singular values of M, falling.  Where min(O, I) > `exact_below` the first `leading` are computed and the rest
    is taken as flat: its energy is right, its shape is not known."""
    n = min(M_OI.shape)
    if n <= exact_below:
        return torch.linalg.svdvals(M_OI)
    _, s, _ = randomised(M_OI, leading, oversample=16, iterations=4, seed=0)
    rest = (M_OI.square().sum() - s.square().sum()).clamp_min(0) / (n - leading)
    return torch.cat([s, rest.sqrt().expand(n - leading)])
