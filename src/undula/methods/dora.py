"""DoRA (Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen 2024, arXiv:2402.09353), around any Additive method.

    W' = diag(m / ||V||) V,   V = W + dW,   ||V|| the norms of V's rows,   m = ||W|| at the start

As in the paper (section 4.3) ||V|| counts as a constant in the backward pass.  For a LowRank inner method the norms
come from the factors: ||V||^2 = ||W||^2 + 2 <W A', B> + <B A A', B> row by row, and no (O x I) matrix is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import reference
from ..method import Additive, Factors, Layer, LowRank, Method, Reweight, Site
from .lora import LoRA


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

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        return self.inner.rebuilt(site)

    def check(self, site: Site, f: Factors) -> None:
        self.inner.check(site, f)

    def weight(self, W_OI: Tensor, f: Factors) -> Tensor:
        V_OI = self._inner.weight(W_OI, f)
        norms = V_OI.norm(dim=1).detach().clamp_min(torch.finfo(V_OI.dtype).tiny)  # a row of zeros stays one
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
        if not isinstance(self.inner, LowRank):
            return self._inner.weight(W_OI, f).norm(dim=1)
        B_OR, A_RI = self.inner.pair(f)
        W_OI = W_OI.to(A_RI.dtype)
        cross = 2 * (W_OI @ A_RI.T) + B_OR @ (A_RI @ A_RI.T)
        squared = torch.linalg.vecdot(W_OI, W_OI) + (cross * B_OR).sum(1)
        return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()
