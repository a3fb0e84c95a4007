"""The ways to a LowRank adapter that need no data."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.method import Additive, Factors, LowRank, Method, Reweight
from ..core.ranges import Rank
from ..host.update import update
from ..kernels import svd
from ..kernels.solver import Randomised, Solver


@dataclass(frozen=True)
class Fit:
    """What stands in for one site: u(x) = B A x + shift.  `missed` is |miss|^2 and `whole` is |change|^2, in one unit,
    on what the way itself knows (`Approximation.known`); None where it knows nothing."""

    B_OR: Tensor
    A_RI: Tensor
    shift_O: Tensor | None = None
    missed: float | None = None
    whole: float | None = None


class Approximation(Choice):
    """A way to stand a LowRank adapter in for any other."""

    known = ""  # what a Fit's own error is measured on

    @abc.abstractmethod
    def fit(self, adapter: Adapter, model: nn.Module | None) -> dict[str, Fit]:
        """One Fit per site; `adapter` is selected on `model`, where there is one."""


@Approximation.register
@dataclass(frozen=True)
class Truncate(Approximation):
    """The first r singular triples of dW.  No data needed; blind to which inputs occur.

    Of a LowRank method from the factors (QR and an R x R decomposition): exact, O x I is never formed.  Of other
    Additive methods, and of mergeable ones (DoRA) where the model is given, by `solver`.
    """

    known = "the Frobenius norm of dW"

    r: Rank = 8
    solver: Solver = Randomised()

    def fit(self, adapter: Adapter, model: nn.Module | None) -> dict[str, Fit]:
        for site, m in adapter.methods.items():
            if not isinstance(m, Additive) and (model is None or not isinstance(m, Reweight)):
                raise TypeError(_no_delta(site, m))
        return {s: self._site(s, adapter.methods[s], f, model) for s, f in adapter.factors.items()}

    def _site(self, site: str, m: Method, f: Factors, model: nn.Module | None) -> Fit:
        if isinstance(m, LowRank):
            B_OR, A_RI = m.pair(f)
            U, s, V = svd.factored(B_OR, A_RI)
            B, A = (t.to(B_OR.dtype) for t in svd.halves(U[:, : self.r], s[: self.r], V[:, : self.r]))
            miss = svd.factored_values(torch.cat([B_OR, B], 1), torch.cat([A_RI, -A])).norm()
            whole = s.norm()
        else:
            delta_OI = update(site, m, f, model)
            B, A = svd.halves(*self.solver(delta_OI, self.r))
            miss, whole = torch.addmm(delta_OI, B, A, alpha=-1).norm(), delta_OI.norm()
        return Fit(B, A, None, float(miss) ** 2, float(whole) ** 2)


def _no_delta(site: str, m: Method) -> str:
    if isinstance(m, Reweight):
        return (
            f"{m!r} at {site} has an update W' - W only together with its base: give the model instead of the adapter"
        )
    return (
        f"{m!r} at {site} stands on the rung {m.rung()}: it has no update dW to truncate. "
        "Use LeastSquares(r, calibration), which fits what the adapter does to activations"
    )


@Approximation.register
@dataclass(frozen=True)
class Substitute(Approximation):
    """The AuroRA paper's own deployment: trained as s B sigma(A x), used as s B sigma(A) x.

    Another function, which agrees only where sigma is nearly affine and the inputs have mean zero: look at the error.
    LowRank sites stay exactly as they are.  Source: Dong et al. 2025, arXiv:2505.18738, equations 3 and 9.
    """

    def fit(self, adapter: Adapter, model: nn.Module | None) -> dict[str, Fit]:
        return {s: _substitute(s, adapter.methods[s], f) for s, f in adapter.factors.items()}


def _substitute(site: str, m: Method, f: Factors) -> Fit:
    if (pair := m.static_pair(f)) is not None:
        return Fit(*pair)
    if isinstance(m, LowRank):
        return Fit(*m.pair(f), missed=0.0, whole=float(svd.factored_values(*m.pair(f)).norm()) ** 2)
    raise TypeError(
        f"{m!r} at {site} has no static form to substitute (AuroRA has). "
        f"Use {'Truncate(r)' if isinstance(m, Additive) else 'LeastSquares(r, calibration)'}"
    )
