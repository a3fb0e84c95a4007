"""A random projection: A with orthonormal rows, B = 0 (Zhu, Greenewald, Nadjahi, Saez de Ocariz Borde, Gabrielsson,
Choshen, Ghassemi, Yurochkin, Solomon 2024, arXiv:2402.16842, who keep such an A frozen).

    A A' = 1, its rows spanning a uniformly random subspace,   B = 0

PEFT's `init_lora_weights="orthogonal"` is something else: A and B are both random, neither has orthonormal rows or
columns, and they are chosen so that B A = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Site
from .start import Start, check_fits


@Start.register
@dataclass(frozen=True)
class Orthogonal(Start):
    """A with orthonormal rows, B = 0."""

    at_base = True

    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        O, I = site.shape
        check_fits(self, site, r, needs=r, has=I)
        Q_IR = torch.linalg.qr(site.normal(I, r, std=1.0)).Q
        return site.zeros(O, r), Q_IR.T.contiguous()
