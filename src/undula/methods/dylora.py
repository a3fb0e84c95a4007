"""DyLoRA (Valipour, Rezagholizadeh, Kobyzev, Ghodsi 2022, arXiv:2210.07558, EACL 2023): one adapter for every rank.

    W' = W + s_b B[:, :b] A[:b],   s_b = alpha / b

b is drawn anew for every update (`undula.ranks.DyLoRA`), so that the first ranks learn to do without the later ones;
afterwards any b up to r can be used: `Adapter.at_rank(b)`.  b is a frozen integer factor and ranks from b on are masked
on the device: no step waits for it.

The published scale alpha / b shrinks the first ranks' contribution as b grows, so no fixed A and B can be the best
approximation at every b at once; with `Fixed(s)` they can (a test finds the singular value decomposition at all b).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.method import Factors, LowRank, Site, check_within
from ..core.ranges import Positive, Rank
from ..starts import Kaiming, Start
from .lora import Classic, Fixed, LoRA, Scaling


class Nesting(Choice):
    """Which of the first b ranks learn in a step that uses them."""

    @abc.abstractmethod
    def __call__(self, B_OR: Tensor, A_RI: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A), detached where this step does not train them."""

    @abc.abstractmethod
    def still(self, b: int, r: int) -> list[slice]:
        """The ranks that this step must leave as they are."""


@Nesting.register
@dataclass(frozen=True)
class Full(Nesting):
    """All of them."""

    def __call__(self, B_OR: Tensor, A_RI: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return B_OR, A_RI

    def still(self, b: int, r: int) -> list[slice]:
        return [slice(b, r)]


@Nesting.register
@dataclass(frozen=True)
class Frozen(Nesting):
    """Rank b alone: row b of A and column b of B."""

    def __call__(self, B_OR: Tensor, A_RI: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.arange(1, A_RI.shape[0] + 1, device=A_RI.device) == b
        return torch.where(last, B_OR, B_OR.detach()), torch.where(last[:, None], A_RI, A_RI.detach())

    def still(self, b: int, r: int) -> list[slice]:
        return [slice(0, b - 1), slice(b, r)]


@dataclass(frozen=True)
class DyLoRA(LowRank):
    """W' = W + s_b B[:, :b] A[:b], b = r unless an allocator or `at_rank` says otherwise."""

    formula = "W' = W + s_b B[:, :b] A[:b]"
    parameters = "r*(O + I)"
    source = "Valipour et al. 2022, arXiv:2210.07558"

    r: Rank = 8
    alpha: Positive = 16.0
    scaling: Scaling = Classic()
    nesting: Nesting = Full()

    def __post_init__(self) -> None:
        if not isinstance(self.scaling, Classic | Fixed):
            raise ValueError(f"DyLoRA scales by Classic() (alpha / b) or Fixed(s), found {self.scaling!r}")

    def init(self, site: Site, start: Start = Kaiming()) -> dict[str, Tensor]:
        B_OR, A_RI = start(site, self.r)
        b = torch.full((), self.r, dtype=torch.int64, device=site.device)
        return {"A": A_RI.requires_grad_(), "B": B_OR.requires_grad_(), "b": b}

    def check(self, site: Site, f: Factors) -> None:
        check_within(f"{site.name}.b", f["b"], 1, self.r)

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        b = f["b"]
        B_OR, A_RI = self.nesting(f["B"], f["A"], b)
        within_R = (torch.arange(self.r, device=B_OR.device) < b).to(B_OR.dtype)
        s = self.scaling(b.to(B_OR.dtype), self.alpha)  # type: ignore[arg-type]  # a number on the device
        return s * within_R * B_OR, A_RI

    def at_rank(self, f: Factors, b: int) -> tuple[LoRA, dict[str, Tensor]]:
        """The plain LoRA of the first b ranks, detached.  Raises ValueError for a rank that is not there."""
        if not 1 <= b <= self.r:
            raise ValueError(f"{self!r} was trained at the ranks 1 to {self.r}, not at {b}")
        pair = {"A": f["A"][:b], "B": f["B"][:, :b]}
        return LoRA(b, self.alpha, self.scaling), {k: t.detach().clone().requires_grad_() for k, t in pair.items()}
