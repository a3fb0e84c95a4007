"""DoRA (Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen 2024, arXiv:2402.09353), around any Additive method.

    W' = diag(m / ||V||) V,   V = W + dW,   ||V|| the norms of V's rows,   m = ||W|| at the start

As in the paper (section 4.3) ||V|| counts as a constant in the backward pass.  For a LowRank inner method the norms
come from the factors: ||V||^2 = ||W||^2 + 2 <W A', B> + <B A A', B> row by row, and no (O x I) matrix is formed, but
for rows whose three terms cancel (||V|| below 3 % of what they sum to).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.autocast import exact, hand_written, wide
from ..method import Additive, Factors, Layer, LowRank, Method, Reweight, Site
from .lora import LoRA

CANCELLED = 1e-3  # of ||W||^2 + ||dW||^2: below it ||V||^2 has lost three of float32's seven digits


@dataclass(frozen=True)
class DoRA(Reweight):
    """Magnitudes m (O) trained apart from the directions that `inner` (a method on the Additive rung) gives."""

    formula = "W' = diag(m / ||W + dW||) (W + dW)"
    parameters = "inner + O"
    source = "Liu et al. 2024, arXiv:2402.09353"

    inner: Method = LoRA()

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Additive):
            raise TypeError(f"DoRA wraps a method with an update dW; {self.inner!r} is on the rung {self.inner.rung()}")

    @property
    def _inner(self) -> Additive:
        assert isinstance(self.inner, Additive)
        return self.inner

    def init(self, site: Site) -> dict[str, Tensor]:
        return {**self.inner.init(site), "m": site.W.norm(dim=1).requires_grad_()}

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        inner = {k: t for k, t in f.items() if k != "m"}
        return {**self.inner.again(site, inner), "m": site.W.norm(dim=1).requires_grad_()}

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        return self.inner.rebuilt(site)

    def check(self, site: Site, f: Factors) -> None:
        self.inner.check(site, f)

    def weight(self, W_OI: Tensor, f: Factors) -> Tensor:
        V_OI = self._inner.weight(W_OI, f)
        norms = floored(V_OI.detach().norm(dim=1), W_OI.detach().to(V_OI.dtype).norm(dim=1))
        return (f["m"] / norms)[:, None] * V_OI

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        gain = f["m"] / self.norms(layer.weight, f)
        y = self.inner.forward(x, layer, f)
        if layer.bias is None:
            return (y * reference.channels(gain, layer)).to(y.dtype)
        # the bias is not scaled: gain (y - b) + b
        shift = (1 - gain) * layer.bias
        return torch.addcmul(reference.channels(shift, layer), y, reference.channels(gain, layer)).to(y.dtype)

    @torch.no_grad()
    def norms(self, W_OI: Tensor, f: Factors) -> Tensor:
        """||W + dW|| by rows (O), detached."""
        with exact(W_OI.device):
            if not isinstance(self.inner, LowRank) or not hand_written():  # no branch on numbers in a trace
                V_OI = self._inner.weight(W_OI, f)
                return floored(V_OI.norm(dim=1), W_OI.to(V_OI.dtype).norm(dim=1))
            B_OR, A_RI = (t.to(wide(t.dtype)) for t in self.inner.pair(f))
            W_OI = W_OI.to(A_RI.dtype)
            own, update = torch.linalg.vecdot(W_OI, W_OI), B_OR @ (A_RI @ A_RI.T)
            squared = own + ((2 * (W_OI @ A_RI.T) + update) * B_OR).sum(1)
            cancelled = squared < CANCELLED * (own + (update * B_OR).sum(1))
            if cancelled.any():  # the sums cancel: these rows are formed
                V_KI = torch.addmm(W_OI[cancelled], B_OR[cancelled], A_RI)
                squared[cancelled] = torch.linalg.vecdot(V_KI, V_KI)
            return floored(squared.sqrt(), own.sqrt())


def floored(norm_O: Tensor, base_O: Tensor) -> Tensor:
    """Norms of V's rows, at least what rounding leaves of W's: a row that the update takes away has no direction, and
    stays (next to) zero instead of being blown up to m."""
    return norm_O.maximum(torch.finfo(norm_O.dtype).eps * base_O).clamp_min(torch.finfo(norm_O.dtype).tiny)
