"""The first step of full fine-tuning, and its best rank-r approximation (Ponkshe, Singhal, Gorbunov, Tumanov, Horvath,
Vepakomma 2024, arXiv:2411.19557: LoRA-SB)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import svd
from ..method import Site


def first_step(site: Site, r: int, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(U (O, r), S (r), V (I, r)) with U diag(S) V' the best rank-r approximation of -eta sign(G): the first step of
    Adam at the learning rate eta, up to its epsilon and weight decay."""
    return svd.randomised(-eta * torch.sign(site.gradient()), r, oversample=16, iterations=10, seed=42)
