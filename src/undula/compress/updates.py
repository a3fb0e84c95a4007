"""The update dW of one site as its singular triples: from the factors where there are two, else block by block."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..core.method import Additive, Factors, LowRank, Method, Reweight
from ..kernels import svd
from ..kernels.solver import Solver
from ..kernels.svd import without
from .spectrum import Spectrum

BLOCK = 1 << 22  # numbers of a block: 32 MiB of float64


class Update(abc.ABC):
    """dW of one site.  `whole` is ||dW||^2, `most` the largest rank that carries anything, 1 at least."""

    whole: float
    most: int
    known: Tensor  # singular values that cost nothing more

    @abc.abstractmethod
    def leading(self, k: int) -> svd.Triple:
        """The first k singular triples, float64; less where there are less."""

    def spectrum(self, bytes: int) -> Spectrum:
        """Its singular values; a rank takes so many bytes on disk."""
        return Spectrum(self.known, self.whole, self.most, bytes, lambda k: self.leading(k)[1])

    def tail(self, s: Tensor) -> float:
        """||dW||^2 without its first singular values, which are `s`."""
        return max(self.whole - float(s.square().sum()), 0.0)

    def missed(self, triple: svd.Triple, B_OR: Tensor, A_RI: Tensor) -> float:
        """||dW - B A||^2, B A being the truncation `triple` as it is stored: the tail of the singular values, and in
        types narrower than 32 bits the rounding of B and A, which is orthogonal to it but for rounding."""
        tail = self.tail(triple[1])
        if B_OR.dtype.itemsize >= 4:
            return tail
        U, s, V = triple
        wrong = svd.factored_values(torch.cat([U * s, B_OR.double()], 1), torch.cat([V.T, -A_RI.double()]))
        return tail + float(wrong.square().sum())


class Pair(Update):
    """dW = B A.  Exact, and no O x I matrix is formed."""

    def __init__(self, B_OR: Tensor, A_RI: Tensor):
        self.triple = svd.factored(B_OR, A_RI)
        self.known = self.triple[1]
        self.whole = float(self.known.square().sum())
        self.most = carrying(self.known, max(B_OR.shape[0], A_RI.shape[1]))

    def leading(self, k: int) -> svd.Triple:
        U, s, V = self.triple
        return U[:, :k], s[:k], V[:, :k]

    def tail(self, s: Tensor) -> float:
        return float(self.known[len(s) :].square().sum())  # a sum, which does not cancel


class Computed(Update):
    """dW of an Additive method, by a randomised decomposition of the operator, a block of rows at a time."""

    def __init__(self, M: svd.Blocks, solver: Solver):
        self.M, self.solver = M, solver
        self.whole = M.square()
        self.found: svd.Triple | None = None
        self.most = min(M.shape) if self.whole > 0 else 1
        self.known = torch.zeros(0, dtype=torch.float64, device=M.device)

    def leading(self, k: int) -> svd.Triple:
        k = min(k, self.most)
        if self.found is None or len(self.found[1]) < k:
            self.found = self.solver.leading(self.M, k)
        U, s, V = self.found
        return U[:, :k], s[:k], V[:, :k]


def carrying(s: Tensor, size: int) -> int:
    """How many of these singular values are more than rounding; 1 at least."""
    limit = float(s[0]) * torch.finfo(s.dtype).eps * size if len(s) else 0.0
    return max(1, int((s > limit).sum()))


def inside(site: str, method: Method) -> Additive:
    """The method whose update is truncated: what dropout and DoRA's magnitudes are around.  Raises TypeError where
    there is none."""
    law = method.inside()
    if isinstance(law, Additive):
        return law
    if isinstance(law, Reweight):
        raise TypeError(
            f"{law!r} at {site} stands on the rung {law.rung()}: its update W' - W is known only together with "
            "the base. undula.collapse(model, Truncate(r)) truncates it there"
        )
    raise TypeError(
        f"{law!r} at {site} stands on the rung {law.rung()}: it has no update dW to squeeze. undula.collapse "
        "fits a LowRank adapter to what it does: collapse(model, LeastSquares(r, calibration))"
    )


def update_of(
    site: str, method: Method, f: Factors, shape: tuple[int, int], padding: int | None, solver: Solver
) -> Update:
    """The update of a site; column `padding` of it stays the base's.  Raises TypeError below the Additive rung,
    ValueError for NaN or infinity."""
    law = inside(site, method)
    check_finite(site, f)
    f = {k: t.detach().double() if t.is_floating_point() else t for k, t in f.items()}
    read = method.reads(f)  # what the layer does without is no part of the update
    if isinstance(law, LowRank):
        B_OR, A_RI = law.pair(f)
        return Pair(B_OR, without(A_RI if read is None else A_RI * read, padding))
    M = blocks_of(law, f, shape, padding)
    return Computed(M if read is None else replace(M, rows=_reading(M.rows, read)), solver)


def _reading(rows: Callable[[slice], Tensor], read_I: Tensor) -> Callable[[slice], Tensor]:
    """The rows of a matrix whose other columns are zero."""
    return lambda some: rows(some) * read_I


def check_finite(site: str, f: Factors) -> None:
    """Raises ValueError for NaN or infinity."""
    for name, t in f.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError(
                f"{site}: the factor {name} holds NaN or infinity; the adapter is damaged or diverged, and nothing can "
                "be made of it"
            )


def blocks_of(law: Additive, f: Factors, shape: tuple[int, int], padding: int | None) -> svd.Blocks:
    """dW a block of rows at a time; a method that cannot compute some rows alone gives them all."""
    step = max(1, BLOCK // max(1, shape[1])) if type(law).rows is not Additive.rows else shape[0]
    device = next(iter(f.values())).device
    return svd.Blocks(shape, lambda some: without(law.rows(f, some), padding), step, device)
