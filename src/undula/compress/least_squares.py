"""Least squares on calibration activations: the rank-r map nearest to what an adapter really does to them.

    min over rank(M) <= r, c of   sum_t |u_t - M x_t - c|^2 + lambda |M|^2,     u(x) = forward(x) - layer(x)

Reduced-rank regression (Izenman 1975).  With S = Sxx + lambda 1 = L L', C = Sux L'^-1 and its first r singular triples
U diag(s) V':  M = U diag(s) V' L^-1.  Only moments are kept: Sxx, Sxu, the sums and the count, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Layer
from ..core.ranges import INT64, NotNegative, Range, Rank
from ..host.host import layer_at
from ..host.views import EmbeddingView, LinearView
from ..kernels import svd
from ..kernels.solver import Randomised, Solver
from ..observe.listen import Batch, batches, evaluating, listening
from ..observe.padding import kept
from .approximation import Approximation, Fit


class Moments:
    """First and second moments of pairs (x, u), and nothing else of them."""

    def __init__(self, O: int, I: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.uu = 0, zeros()
        self.x_I, self.u_O, self.xx_II, self.ux_OI = zeros(I), zeros(O), zeros(I, I), zeros(O, I)

    @staticmethod
    def bytes(O: int, I: int) -> int:
        """The memory that the moments of one site take."""
        return 8 * (I * I + O * I + O + I)

    def add(self, x_TI: Tensor, u_TO: Tensor) -> None:
        x_TI, u_TO = x_TI.to(torch.float64), u_TO.to(torch.float64)
        self.count += x_TI.shape[0]
        self.x_I += x_TI.sum(0)
        self.u_O += u_TO.sum(0)
        self.xx_II.addmm_(x_TI.T, x_TI)
        self.ux_OI.addmm_(u_TO.T, x_TI)
        self.uu += u_TO.square().sum()

    def solve(self, r: int, ridge: float, bias: bool, solver: Solver) -> Fit:
        """The best map of rank r.  lambda is `ridge` times the mean of Sxx' diagonal."""
        n = self.count
        mean_x, mean_u = self.x_I / n, self.u_O / n
        Sxx, Sux = self.xx_II / n, self.ux_OI / n
        if bias:  # a free shift: the same problem about the means
            Sxx, Sux = Sxx - torch.outer(mean_x, mean_x), Sux - torch.outer(mean_u, mean_x)
        _check_inputs(self, Sxx, Sux, bias)
        L_II = _root(Sxx, ridge, n)
        C_OI = torch.linalg.solve_triangular(L_II.T, Sux, upper=True, left=False)
        U, s, V = solver(C_OI, min(r, *C_OI.shape))
        A_RI = torch.linalg.solve_triangular(L_II, V.T, upper=False, left=False)
        B_OR, A_RI = svd.balanced(U * s, A_RI)
        miss = self.uu / n - 2 * (B_OR * (Sux @ A_RI.T)).sum() + (B_OR.T @ B_OR * (A_RI @ Sxx @ A_RI.T)).sum()
        if bias:
            miss = miss - mean_u.square().sum()
        shift_O = mean_u - B_OR @ (A_RI @ mean_x) if bias else None
        return Fit(B_OR, A_RI, shift_O, max(float(miss), 0.0) * n, float(self.uu))


def _check_inputs(seen: Moments, Sxx: Tensor, Sux: Tensor, bias: bool) -> None:
    """No ridge helps where these fail."""
    if not (Sxx.isfinite().all() and Sux.isfinite().all() and seen.uu.isfinite()):
        raise ValueError(
            "the calibration activations, or what the adapter makes of them, hold NaN or infinity: look at the batches "
            "and at the adapter (undula.diagnose)"
        )
    size, varied = float(seen.xx_II.trace()) / seen.count, float(Sxx.trace())
    if size == 0:
        raise ValueError(
            "the calibration activations are all zero: nothing can be fitted to them. Leave that layer out"
        )
    if bias and varied <= 1e-12 * size:
        raise ValueError(
            f"the calibration activations are the same at all {seen.count} positions: with bias=True nothing "
            "varies that a map could be fitted to. Give other batches, or bias=False"
        )


def _root(Sxx: Tensor, ridge: float, n: int) -> Tensor:
    """L with L L' = Sxx + lambda 1."""
    I = Sxx.shape[0]
    S = Sxx + ridge * Sxx.diagonal().mean() * torch.eye(I, dtype=Sxx.dtype, device=Sxx.device)
    L_II, failed = torch.linalg.cholesky_ex(S)
    if failed:
        raise ValueError(
            f"the calibration activations do not span their {I} dimensions ({n} positions were seen): "
            f"give more of them, or a ridge above {ridge:g}"
        )
    return L_II


def _patches(layer: Layer, x: Tensor) -> Tensor:
    """What a convolution multiplies its matrix with, position by position (..., I): padding and strides are its own."""
    I = layer.weight.shape[1]
    return layer.project(x, torch.eye(I, dtype=x.dtype, device=x.device))


@dataclass(frozen=True, eq=False)
class LeastSquares(Approximation):
    """The rank-r map from x to the adapter's own change u(x) that fits `calibration` best; works for every method, at
    linear layers and ungrouped convolutions (x is then the patch under the kernel, at every position).

    `calibration` holds batches (dicts, tuples or tensors); each goes through the adapted model once, and padding
    (attention_mask) does not count.  `ridge` is relative to the mean square of an input; where data are few, more of it
    helps (AuroRA on MiniLM, 4000 positions for up to 1536 inputs: error 0.25, 0.24, 0.21 at 1e-6, 1e-3, 1e-2).  With
    `bias` a constant shift is fitted too and goes into the layer's bias: it takes up what a non-zero sigma(0) adds.
    `memory` (bytes) bounds the moments held at a time; where they need more, `calibration` is gone through several
    times, a group of sites each (one site that alone needs more is taken alone).
    """

    known = "the calibration data, in sample: too low where there is little of it"

    r: Rank
    calibration: Iterable[Batch] = field(repr=False)
    ridge: NotNegative = 1e-3
    bias: bool = False
    solver: Solver = Randomised()
    memory: Annotated[int, Range(least=1, most=INT64)] = 4 << 30

    def fit(self, adapter: Adapter, model: nn.Module | None) -> dict[str, Fit]:
        if model is None:
            raise TypeError(
                "LeastSquares runs the adapted model: give the model with the adapter selected, not the adapter"
            )
        for site in adapter.factors:
            self._check(site, layer_at(model, site))
        groups = self.groups(adapter.shapes)
        if len(groups) > 1 and iter(self.calibration) is self.calibration:
            raise ValueError(
                f"the moments of {len(adapter.shapes)} sites exceed memory={self.memory} bytes, so calibration is gone "
                f"through {len(groups)} times: give a list or a DataLoader, not an iterator, or more memory"
            )
        fits: dict[str, Fit] = {}
        for i, sites in enumerate(groups):
            moments = self._accumulate(model, adapter, sites, f"calibration {i + 1}/{len(groups)}")
            for site in sites:
                try:
                    fits[site] = moments.pop(site).solve(self.r, self.ridge, self.bias, self.solver)
                except ValueError as error:
                    raise ValueError(f"{site or 'the model'}: {error}") from None
        return fits

    def _check(self, site: str, layer: LinearView) -> None:
        if isinstance(layer, EmbeddingView):
            raise TypeError(
                f"least squares fits linear layers and convolutions; {site} is a {layer.module.original.__name__}. "
                "Truncate(r) takes it where its method has an update dW"
            )
        if self.bias and layer.bias is None:
            raise ValueError(f"bias=True, but the layer {site} has no bias to put the shift into: use bias=False")

    def groups(self, shapes: Mapping[str, tuple[int, int]]) -> list[list[str]]:
        """The sites in order, cut so that each group's moments fit into `memory`."""
        groups: list[list[str]] = []
        room = 0
        for site, (O, I) in shapes.items():
            need = Moments.bytes(O, I)
            if not groups or need > room:
                groups.append([])
                room = self.memory
            groups[-1].append(site)
            room -= need
        return groups

    def _accumulate(self, model: nn.Module, adapter: Adapter, sites: list[str], what: str) -> dict[str, Moments]:
        moments: dict[str, Moments] = {}

        def hear(site: str, layer: Layer, x: Tensor, u: Tensor, mask: Tensor | None) -> None:
            if site not in moments:
                moments[site] = Moments(*adapter.shapes[site], device=x.device)
            if layer.channel != -1:  # a convolution: x is what its kernel sees at a position, see `_patches`
                x, u = _patches(layer, x), u.movedim(layer.channel, -1)
            moments[site].add(kept(x, mask), kept(u, mask))

        with evaluating(model), listening(model, adapter, sites, hear) as go:
            for batch in batches(self.calibration, what):
                go(batch)
        unseen = [s for s in sites if s not in moments or moments[s].count == 0]
        if unseen:
            raise ValueError(f"the calibration data never reached {', '.join(unseen[:5])}: is it empty?")
        return moments
