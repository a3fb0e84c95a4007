"""Truncated decompositions that starts are made from: of W itself, or of the first step of full fine-tuning."""

from __future__ import annotations

from torch import Tensor

from ..core.method import Site
from ..kernels import svd


def leading(site: Site, M_OI: Tensor, r: int) -> svd.Triple:
    """The first min(r, O, I) singular triples (U, s, V) of M: by a seeded sketch where M is large, the same on every
    call and without the global generator.  Without numbers on the meta device."""
    O, I = site.shape
    r = min(r, O, I)
    if site.device.type == "meta":
        return site.zeros(O, r), site.zeros(r), site.zeros(I, r)
    U_OR, s_R, V_IR = svd.randomised(M_OI, r, oversample=16, iterations=10, seed=42)
    return U_OR.contiguous(), s_R.contiguous(), V_IR.contiguous()


def first_step(site: Site, r: int, eta: float) -> svd.Triple:
    """The same of -eta sign(G), G = dL/dW over the probe's batches: what the first step of AdamW with the learning rate
    eta would add to W (LoRA-SB: Ponkshe et al. 2024, arXiv:2411.19557)."""
    return leading(site, -eta * site.gradient().sign(), r)
