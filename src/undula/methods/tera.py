"""TeRA, after the abstract of arXiv:2509.03234 (2025, ACL 2026), interpretation.

    W' = W + (U_1 D_1 x ... x U_N D_N) C (V_1 E_1 x ... x V_N E_N)',   x the Kronecker product

The abstract gives: dW as a tensor, a Tucker-like network, large random factors that are frozen and shared by all
layers, and trained diagonals of each layer.  Settled here: O and I split into N modes of about equal sizes (of 7 rows
the first of 3 x 3); U_n, V_n (size x r) and the core C (r^N x r^N) uniform with the variances 1/r and 1/r^N, rebuilt
from ..ranges import Rank, Seed, NotZero, Range
from the seed; the diagonals D_n, E_n (r) train; D_1 starts at 0 and the others at 1/2, so that their product is near
VeRA's 0.1.  The rank of dW reaches min(r^N, O, I) with 2 N r trained numbers.

One mode at a time, a token costs about r (O + I) multiplications and r^2N for the core, instead of r^N (O + I).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..core.method import Factors, Layer, LowRank, Site
from ..core.ranges import NotZero, Range, Rank, Seed
from ..kernels import reference

DEAD = "at d = 0, with D_1 = 0 at the start, nothing has a gradient: it could never learn; the default is d=0.5"


def split(n: int, modes: int) -> tuple[int, ...]:
    """Sizes, about equal, whose product is n; or a little above it where n has no such divisors."""
    if modes == 1:
        return (n,)
    root = round(n ** (1 / modes))  # of a power exactly its root, whatever the floats say
    root += root**modes < n
    first = next((size for size in range(root, 2 * root) if n % size == 0), root)
    return (first, *split(-(-n // first), modes - 1))


def kronecker(factors: Sequence[Tensor], n: int) -> Tensor:
    """The first n rows of the Kronecker product."""
    return functools.reduce(torch.kron, factors)[:n]


def contracted(z_TK: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """z times the Kronecker product of matrices (size, to), one mode at a time."""
    z = z_TK.view(len(z_TK), *(M.shape[0] for M in factors))
    for M in factors:
        z = z.movedim(1, -1) @ M
    return z.flatten(1)


@dataclass(frozen=True)
class TeRA(LowRank):
    """W' = W + (x_n U_n D_n) C (x_n V_n E_n)': trained diagonals in a frozen tensor network."""

    formula = "W' = W + (U_1 D_1 x ... x U_N D_N) C (V_1 E_1 x ... x V_N E_N)'"
    parameters = "2*modes*r"
    source = "after arXiv:2509.03234"
    grade = "interpretation"

    r: Rank = 16  # of each mode
    modes: Annotated[int, Range(least=1, most=9)] = 2  # N, on each side
    d: Annotated[NotZero, DEAD] = 0.5  # where the diagonals start, but the first
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.r**self.modes > 1 << 16:
            raise ValueError(
                f"the core has r**modes = {self.r**self.modes:,} rows, at most {1 << 16:,}; found {self!r}"
            )

    def init(self, site: Site) -> dict[str, Tensor]:
        f = self.rebuilt(site)
        for name in (*self._names("d"), *self._names("e")):
            start = 0.0 if name == "d1" else self.d
            f[name] = torch.full((self.r,), start, dtype=site.dtype, device=site.device, requires_grad=True)
        return f

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        """U, V, the core, and `size`, which is empty: its shape tells O and I where the modes are padded."""
        O, I = site.shape
        K = self.r**self.modes

        def once(name: str, rows: int, columns: int) -> Tensor:
            key = ("TeRA", name, rows, columns)
            return site.once(
                (*key, self.seed, site.dtype, site.device),
                lambda: site.frozen(self.seed, *key, shape=(rows, columns), bound=math.sqrt(3 / columns)),
            )

        U = {name: once(name, size, self.r) for name, size in zip(self._names("U"), split(O, self.modes), strict=True)}
        V = {name: once(name, size, self.r) for name, size in zip(self._names("V"), split(I, self.modes), strict=True)}
        return {**U, **V, "core": once("core", K, K), "size": site.zeros(O, I, 0).int()}

    def _names(self, letter: str) -> list[str]:
        return [f"{letter}{n}" for n in range(1, self.modes + 1)]

    def _scaled(self, f: Factors) -> tuple[list[Tensor], list[Tensor]]:
        """U_n D_n and V_n E_n of every mode."""
        U, V, d, e = ([f[name] for name in self._names(letter)] for letter in "UVde")
        return [M * v for M, v in zip(U, d, strict=True)], [M * v for M, v in zip(V, e, strict=True)]

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        U, V = self._scaled(f)
        O, I, _ = f["size"].shape
        return kronecker(U, O), f["core"] @ kronecker(V, I).T

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        """One mode after another, where x holds the columns themselves."""
        if layer.channel != -1 or not x.is_floating_point():
            return super().forward(x, layer, f)
        U, V = self._scaled(f)
        O, I, _ = f["size"].shape
        padded = math.prod([M.shape[0] for M in V])
        x_TI = torch.nn.functional.pad(x.reshape(-1, I).to(f["core"].dtype), (0, padded - I))
        h_TK = contracted(x_TI, V) @ f["core"].T
        return reference.added(layer(x), contracted(h_TK, [M.T for M in U])[:, :O].view(*x.shape[:-1], O))
