"""GatedLoRA: LoRA with a switch before every rank, for allocators that open and close ranks.

    W' = W + s B diag(g) A,   g in {0, 1}^r frozen,   s = alpha / open, fixed when the adapter is made

The form of ALoRA (Liu, Lyn, Zhu, Tian, Graham 2024, arXiv:2403.16187), and what `undula.ranks` ALoRA, DiffoRA and
Budget work on.  r is the capacity: A and B have r ranks from the start and an allocator only moves g, so no shape
changes while training (checkpoints, DDP, compiled graphs and optimisers stay as they are).  A closed rank has the
gradient zero.  `undula.prune` leaves the open ranks as a plain LoRA.

Open in the paper and settled here: it states no scale; s is that of the ranks open at the start and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.method import Factors, LowRank, Product, Site
from ..core.ranges import Positive, Rank
from ..starts import Kaiming, Start
from .lora import Classic, Scaling


class _Gated(LowRank):
    """W' = W + s B diag(g) A.  A method names the factor g by `gate`; the fields are annotated by each dataclass."""

    gate: ClassVar[str] = "g"

    r: Rank
    alpha: Positive
    scaling: Scaling

    @property
    def scale(self) -> float:
        """s: of the rank at the start, whatever is closed or pruned later."""
        return self.scaling(self.r, self.alpha)

    def products(self, f: Factors) -> list[Product]:
        return [Product(self.scale, f["B"], f["A"], f[self.gate])]

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        return self.scale * f[self.gate] * f["B"], f["A"]


@dataclass(frozen=True)
class GatedLoRA(_Gated):
    """W' = W + s B diag(g) A with g in {0, 1}, moved by an allocator and not by gradients."""

    formula = "W' = W + s B diag(g) A, g in {0, 1}"
    parameters = "r*(O + I)"
    source = "Liu et al. 2024, arXiv:2403.16187"
    beside = ("alpha", "open")

    r: Rank = 8
    open: Rank | None = None  # how many ranks are open at the start; None: all r
    alpha: Positive = 16.0
    scaling: Scaling = Classic()

    def __post_init__(self) -> None:
        if self.open is not None and self.open > self.r:
            raise ValueError(f"GatedLoRA.open is at most r={self.r}, found {self.open}")

    @property
    def scale(self) -> float:
        return self.scaling(self.r if self.open is None else self.open, self.alpha)

    def init(self, site: Site, start: Start = Kaiming()) -> dict[str, Tensor]:
        B_OR, A_RI = start(site, self.r, self.scale)
        g_R = torch.ones(self.r, dtype=site.dtype, device=site.device)
        g_R[self.r if self.open is None else self.open :] = 0
        return {"A": A_RI.requires_grad_(), "B": B_OR.requires_grad_(), "g": g_R}
