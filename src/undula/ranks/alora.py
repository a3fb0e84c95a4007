"""ALoRA (Liu, Lyn, Zhu, Tian, Graham 2024, arXiv:2403.16187, NAACL 2024): ranks move to where they are of use.

    AB-LoRA score of a rank: quality(without it) subtracted, quality(with it alone) added
    K1 of the updates, then `rounds` times: score every live rank, close the `count` worst of the model, open as many at
    the sites that lost none, as equally as possible, the remainder by mean score; train K2 of the updates

Works on `GatedLoRA(r=capacity, open=start)`: a site can grow up to its capacity.  A round costs two evaluations per
live rank.  A rank that opens has B = 0, so the function does not change, a new random A (from seed, step and site) and
no past in the optimiser.

Open in the paper and settled here: the start of new ranks; "alone" means that every other rank of the model is closed;
what finds no room stays closed, and so does everything where every site lost a rank (as in the paper).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.ranges import Count, Few, PartShare, Seed
from ..kernels import frozen
from ..methods.gated import GatedLoRA
from .allocator import Allocator
from .gates import GateAllocator, GateCourse, agreed, spread
from .memory import forget
from .procedure import Quality


@Allocator.register
@dataclass(frozen=True)
class ALoRA(GateAllocator):
    """Closes the worst ranks by ablation and opens others."""

    works_on = (GatedLoRA,)
    source = "Liu et al. 2024, arXiv:2403.16187"

    rounds: Few = 8
    count: Count | None = None  # ranks that move per round; None: as many as there are sites
    first: PartShare = 0.1  # K1, share of the updates before the first round
    between: PartShare = 0.025  # K2, share of the updates between two rounds
    seed: Seed = 0

    @property
    def needs_quality(self) -> bool:
        return True

    def moments(self, steps: int) -> list[int]:
        """After how many updates ranks move.  Before the first update every B is zero and all are worth the same."""
        start, gap = max(1, round(self.first * steps)), max(1, round(self.between * steps))
        return [start + i * gap for i in range(self.rounds)]

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return min(steps, self.moments(steps)[-1] + 1)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> ALoRACourse:
        if quality is None:
            raise TypeError(
                f"{self!r} scores ranks by quality: give start(..., quality=f), f() a number, higher better"
            )
        return ALoRACourse(self, model, optimizer, steps, quality)


class ALoRACourse(GateCourse):
    def __init__(self, how: ALoRA, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality):
        super().__init__(how, model, optimizer, steps)
        self.how, self.quality = how, quality
        self.A, self.B = self.factor("A"), self.factor("B")
        self.count = len(self.sites) if how.count is None else how.count
        self.moments = how.moments(steps)
        if self.moments[-1] >= steps:
            raise ValueError(f"{how!r}: the last round would come after update {self.moments[-1]} of {steps}")

    @torch.no_grad()
    def on_update(self) -> None:
        if self.step in self.moments:
            self.move(self.scores())

    @torch.no_grad()
    def scores(self) -> list[Tensor]:
        """The AB-LoRA score of every rank, in float64 on the CPU; of closed ones infinity."""
        own = [g.clone() for g in self.gates]
        found = [torch.full((len(g),), math.inf, dtype=torch.float64, device="cpu") for g in own]
        for i, g in enumerate(self.gates):
            for k in own[i].nonzero().flatten().tolist():
                g[k] = 0
                without = self.quality()
                torch._foreach_zero_(self.gates)
                g[k] = own[i][k]
                found[i][k] = self.quality() - without
                torch._foreach_copy_(self.gates, own)
        if any(s.isnan().any() for s in found):
            raise ValueError(f"{self.how!r}: the quality of the model is not a number at update {self.step}")
        return [agreed(s, g.device) for s, g in zip(found, self.gates, strict=True)]

    @torch.no_grad()
    def move(self, scores: list[Tensor]) -> None:
        """Closes the `count` ranks of lowest score (of equal ones the first) and opens as many elsewhere."""
        alive = [(g != 0).cpu() for g in self.gates]
        count = min(self.count, sum(int(a.sum()) for a in alive) - 1)
        worst = torch.zeros(sum(map(len, scores)), dtype=torch.bool, device="cpu")
        worst[torch.sort(torch.cat(scores), stable=True).indices[:count]] = True
        closing = worst.split([len(s) for s in scores])
        whole = [i for i, c in enumerate(closing) if not c.any() and alive[i].any()]
        whole.sort(key=lambda i: -float(scores[i][alive[i]].mean()))
        for g, c in zip(self.gates, closing, strict=True):
            g.masked_fill_(c.to(g.device), 0)
        room = [int((~alive[i]).sum()) for i in whole]
        for i, n in zip(whole, spread(count, room), strict=True):
            self._open(i, (~alive[i]).nonzero().flatten()[:n])

    def _open(self, i: int, rows: Tensor) -> None:
        A_RI, B_OR, g_R = self.A[i], self.B[i], self.gates[i]
        rows = rows.to(g_R.device)
        key = ("ALoRA", self.step, self.sites[i])
        drawn = frozen.uniform(self.how.seed, key, (len(rows), A_RI.shape[1]), A_RI.device)
        A_RI.index_copy_(0, rows, drawn.to(A_RI.dtype) / math.sqrt(A_RI.shape[1]))
        B_OR.index_fill_(1, rows, 0)
        g_R.index_fill_(0, rows, 1)
        forget(self.optimizer, A_RI, rows, 0)
        forget(self.optimizer, B_OR, rows, 1)
