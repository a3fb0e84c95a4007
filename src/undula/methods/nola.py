"""NOLA (Koohpayegani, Navaneet, Nooralinejad, Kolouri, Pirsiavash 2023, arXiv:2310.02556, ICLR 2024).

    A = A_0 + sum_i alpha_i A_i / sqrt(k),   B = sum_j beta_j B_j / sqrt(l),   W' = W + s B A,   s = c / r

The k + l coefficients of a layer train, whatever its size and rank.  A_i (r x I) and B_j (O x r) are uniform in
[-1, 1), of every layer its own, drawn from the seed when they are needed and never held.  As in the authors' code for
language models A has a frozen start A_0, uniform within 1/sqrt(I), and the bases are scaled by 1/sqrt(k) and 1/sqrt(l)
(the paper's formula has neither).  Start: alpha = beta = 0; at the first step beta alone has a gradient.

What a step must cost beyond LoRA's: drawing r (k I + l O) numbers forwards and again backwards.  A layer's own
product has T O I multiplications, so with few tokens T the drawing dominates; holding the bases would take the memory
of k LoRA adapters instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Factors, LowRank, Site
from ..core.ranges import Count, Positive, Rank, Seed
from ..kernels import frozen
from ..kernels.mixture import mixture
from .lora import Classic, Scaling


@dataclass(frozen=True)
class NOLA(LowRank):
    """W' = W + s B A, A and B mixed from random matrices that a seed rebuilds."""

    formula = "W' = W + s (sum_j beta_j B_j) (A_0 + sum_i alpha_i A_i)"
    parameters = "k + l"
    source = "Koohpayegani et al. 2023, arXiv:2310.02556"
    size, beside = "k", ("l",)

    r: Rank = 8
    k: Count = 256  # matrices that A is mixed from
    l: Count = 256  # and B
    c: Positive = 8.0  # numerator of the scale
    seed: Seed = 0
    scaling: Scaling = Classic()

    def most(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        return max(self.r * I for _, I in shapes.values())  # so many matrices A_i span all of A

    def init(self, site: Site) -> dict[str, Tensor]:
        alpha_K, beta_L = site.zeros(self.k), site.zeros(self.l)
        return {**self.rebuilt(site), "alpha": alpha_K.requires_grad_(), "beta": beta_L.requires_grad_()}

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        """A_0, the streams that the bases are drawn from, and `size`, which is empty: its shape tells O and I."""
        O, I = site.shape

        def stream(name: str) -> Tensor:
            words = frozen.words(self.seed, ("NOLA", name, site.name))
            return torch.tensor(words, dtype=torch.int32, device=site.device)

        start_RI = site.frozen(self.seed, "NOLA", "start", site.name, shape=(self.r, I), bound=1 / math.sqrt(I))
        return {"start": start_RI, "stream_A": stream("A"), "stream_B": stream("B"), "size": site.zeros(O, I, 0).int()}

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        start_RI, O = f["start"], f["size"].shape[0]
        A_RI = start_RI + mixture(f["alpha"] / math.sqrt(self.k), f["stream_A"], start_RI.shape)
        s = self.scaling(self.r, self.c) / math.sqrt(self.l)
        return mixture(s * f["beta"], f["stream_B"], (O, self.r)), A_RI
