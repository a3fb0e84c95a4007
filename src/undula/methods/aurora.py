"""AuroRA (Dong, Zhu, Song, Wang 2025, arXiv:2505.18738, NeurIPS 2025).

    sigma(z) = tanh(H tanh z) + S(z),   H (r x r),   S a learned cubic B-spline
    AuroRA        y = W x + s B sigma(A x)                             trained and used as it is: dynamic
    AuroRAStatic  W' = W + s B (sigma(kappa A) - sigma(0)),            a matrix: merges exactly

The paper trains the first and deploys W + s B sigma(A).  That is another function: the two agree only where sigma is
nearly affine and the inputs have mean zero.  Here `AuroRA` does not merge; `undula.collapse` turns it into a plain
low-rank adapter, by the paper's substitution or by least squares, and reports the error.

Open in the paper and settled here (after arXiv:2505.18738, interpretation): s = alpha / r (the equations have no scale,
the tables give alpha = 4); S with intervals = 5, order = 3 on [-1, 1]; H Xavier-normal, spline weights uniform within
0.1, A Kaiming-uniform, B = 0.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..core.bend import Bend, Bottleneck
from ..core.choice import Choice
from ..core.method import (
    Factors,
    Layer,
    LowRank,
    Method,
    Settled,
    Site,
)
from ..core.ranges import Finite, Positive, Range, Rank
from ..kernels import reference
from ..kernels.autocast import exact, wide
from ..kernels.bottleneck import bottleneck, fusible
from ..kernels.spline import basis
from ..starts import Kaiming, Start
from .lora import Classic, Scaling


class Spline(Choice):
    """How the learned spline combines the coordinates of z; weights S (R, K)."""

    @abc.abstractmethod
    def __call__(self, b_TRK: Tensor, S_RK: Tensor) -> Tensor: ...


@Spline.register
@dataclass(frozen=True)
class SharedSum(Spline):
    """S(z) = W_s sum_i b(z_i): every coordinate sees the summed basis (what other implementations do)."""

    def __call__(self, b_TRK: Tensor, S_RK: Tensor) -> Tensor:
        return torch.nn.functional.linear(b_TRK.sum(-2), S_RK)


@Spline.register
@dataclass(frozen=True)
class PerChannel(Spline):
    """S(z)_i = w_i . b(z_i): a spline of its own per coordinate (as in Kolmogorov-Arnold networks)."""

    def __call__(self, b_TRK: Tensor, S_RK: Tensor) -> Tensor:
        return (b_TRK * S_RK).sum(-1)


Intervals = Annotated[int, Range(least=1, most=1024)]
Order = Annotated[int, Range(least=1, most=64)]


class _Bend:
    """The fields, factors and function that the two methods share.  Annotated by each dataclass."""

    intervals: Intervals
    order: Order
    low: Finite
    high: Finite
    r: Rank
    spline: Spline

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"a spline needs low < high; found low={self.low}, high={self.high}")

    def init(self, site: Site, start: Start = Kaiming()) -> dict[str, Tensor]:
        B_OR, A_RI = start(site, self.r)
        H_RR = site.normal(self.r, self.r, std=1 / math.sqrt(self.r))  # Xavier-normal of a square matrix
        S_RK = site.uniform(self.r, self.intervals + self.order, bound=0.1)
        return {k: t.requires_grad_() for k, t in {"A": A_RI, "B": B_OR, "H": H_RR, "S": S_RK}.items()}

    @property
    def linear_in(self) -> str:
        return "B"

    def sigma(self, z: Tensor, f: Factors) -> Tensor:
        """tanh(H tanh z) + S(z) for z (..., R), computed in float32 or wider and returned in z's type."""
        dtype = wide(z.dtype)
        u, H_RR, S_RK = z.to(dtype), f["H"].to(dtype), f["S"].to(dtype)
        with exact(z.device):
            projected = torch.tanh(torch.nn.functional.linear(torch.tanh(u), H_RR))
            curved = self.spline(basis(u, self.intervals, self.order, self.low, self.high), S_RK)
            return (projected + curved).to(z.dtype)


@dataclass(frozen=True)
class AuroRA(_Bend, Method):
    """y = W x + s B sigma(A x).  Does not merge: see `collapse`."""

    formula = "y = W x + s B (tanh(H tanh(A x)) + S(A x))"
    parameters = "r*(O + I) + r*r + r*(intervals + order)"
    source = "Dong et al. 2025, arXiv:2505.18738"
    grade = "interpretation"

    r: Rank = 2
    alpha: Positive = 4.0
    intervals: Intervals = 5
    order: Order = 3
    low: Finite = -1.0
    high: Finite = 1.0
    spline: Spline = SharedSum()
    scaling: Scaling = Classic()

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        A_RI, B_OR = f["A"], self.scaling(self.r, self.alpha) * f["B"]
        if fusible(x, layer, A_RI, B_OR) and A_RI.dtype == wide(A_RI.dtype):
            return bottleneck(x, layer, A_RI, B_OR, lambda z: self.sigma(z, f))
        dtype = wide(A_RI.dtype)
        with exact(x.device):  # z too: what a narrow product has rounded, no spline brings back
            z = reference.project(x, layer, A_RI.to(dtype))
            change = torch.nn.functional.linear(self.sigma(z, f), B_OR.to(dtype))
        return reference.added(layer(x), reference.restore(change, layer))

    def settled(self, layer: Layer, f: Factors) -> Settled:
        A_RI, B_OR = (f[name].to(wide(f[name].dtype)) for name in "AB")
        return Settled(self.scaling(self.r, self.alpha) * B_OR, A_RI, bent={"H": f["H"], "S": f["S"]})

    def bent(self, z_TR: Tensor, f: Factors) -> Tensor:
        return self.sigma(z_TR, f)

    def static_pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        """(s B, sigma(A)): the paper's substitution for deployment.  Not the same function as `forward`."""
        return self.scaling(self.r, self.alpha) * f["B"], self.sigma(f["A"].T, f).T

    def bend(self, f: Factors) -> Bend:
        return Bottleneck(lambda z: self.sigma(z, f), None, f["A"], self.low, self.high)


@dataclass(frozen=True)
class AuroRAStatic(_Bend, LowRank):
    """W' = W + s B (sigma(kappa A) - sigma(0)): AuroRA's function on the columns of A, merged exactly.

    kappa = sqrt(I) brings the entries of A (at most 1/sqrt(I) at the start) onto the spline's range; without it and
    without the centring, sigma(A) is affine to within 1 % and almost all of it one constant column: this project's
    proposal.  `kappa=1, centred=False` is the form of arXiv:2608.05250.
    """

    formula = "W' = W + s B (sigma(kappa A) - sigma(0))"
    parameters = "r*(O + I) + r*r + r*(intervals + order)"
    source = "after Dong et al. 2025, arXiv:2505.18738"
    grade = "interpretation"

    r: Rank = 2
    alpha: Positive = 4.0
    intervals: Intervals = 5
    order: Order = 3
    low: Finite = -1.0
    high: Finite = 1.0
    spline: Spline = SharedSum()
    kappa: Positive | None = None
    centred: bool = True
    scaling: Scaling = Classic()

    def points(self, f: Factors) -> Tensor:
        """kappa A' (I, R): where sigma is taken."""
        kappa = math.sqrt(f["A"].shape[1]) if self.kappa is None else self.kappa
        return kappa * f["A"].T

    def bend(self, f: Factors) -> Bend:
        return Bottleneck(lambda z: self.sigma(z, f), self.points(f), None, self.low, self.high)

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        bent = self.sigma(self.points(f), f)
        if self.centred:
            bent = bent - self.sigma(f["A"].new_zeros(1, self.r), f)
        return self.scaling(self.r, self.alpha) * f["B"], bent.T
