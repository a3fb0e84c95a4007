"""In-Squeeze (Vulic, Grycner, de Laroussilhe, Pfeiffer 2026, arXiv:2602.10993): training begins at a rank that is too
high, and loses ranks on the way.

    B A = U S V'   ->   B_k = U_k sqrt(S_k) = B T,   A_k = sqrt(S_k) V_k' = P A

at the end of each stage but the last: the nearest update of k ranks, in balanced factors; what is left over is closed.
What the optimiser remembers goes along.  The gradient of A_k is T' dL/dA and that of B_k dL/dB P', so

    m_A <- T' m_A,   v_A <- (T' squared) v_A,   m_B <- m_B P',   v_B <- v_B (P' squared)

(squared entry by entry; of second moments that is right where the gradients of two ranks are uncorrelated).  The rate
warms up anew in every stage.

Open in the paper and settled here: it says neither what becomes of the scale (it stays that of the first rank, so that
the update does) nor of the optimiser's memory.  Stages are equal parts of the training; the paper gives each at least
some 200 updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.ranges import Rank
from ..methods.gated import GatedLoRA
from ..optim.schedules import Schedule
from .allocator import Allocator
from .gates import GateAllocator, GateCourse, agreed
from .memory import BEGAN, begin_again, moments
from .procedure import Place, Quality
from .relora import Jagged
from .restart import ends, last_begins

# What optimisers remember of a parameter: averages of gradients, and averages of their squares
LINEAR = {"exp_avg", "momentum_buffer", "grad_avg"}
SQUARED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg"}


@Allocator.register
@dataclass(frozen=True)
class InSqueeze(GateAllocator):
    """From the rank of the method down to each of `ranks`, in len(ranks) + 1 equal stages.  Its learning rate is
    `Jagged`."""

    works_on = (GatedLoRA,)
    source = "Vulic et al. 2026, arXiv:2602.10993"

    ranks: tuple[Rank, ...] = (8, 4)

    def __post_init__(self) -> None:
        if not self.ranks or any(a <= b for a, b in zip(self.ranks, self.ranks[1:], strict=False)):
            raise ValueError(f"InSqueeze.ranks fall from stage to stage, as in (16, 8, 4); found {self.ranks}")

    @property
    def stages(self) -> int:
        """How many there are: the first is at the method's own rank."""
        return len(self.ranks) + 1

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return last_begins(steps, self.stages, None)

    def schedule(self) -> Schedule:
        return Jagged(self.stages)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> InSqueezeCourse:
        return InSqueezeCourse(self, model, optimizer, steps)


class InSqueezeCourse(GateCourse):
    """Ranks that are left over are zero and closed: no shape changes."""

    def __init__(self, how: InSqueeze, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self.how, self.ends = how, ends(steps, how.stages, None)
        if max(len(g) for g in self.gates) <= how.ranks[0]:
            raise ValueError(
                f"{how!r} begins above rank {how.ranks[0]}; the adapter has {max(len(g) for g in self.gates)} at most: "
                "give the method a larger r"
            )

    def on_update(self) -> None:
        if self.step in self.ends[:-1]:
            self.squeeze(self.how.ranks[self.ends.index(self.step)])

    def on_end(self) -> None:
        """A training that ends early has the last rank too."""
        self.squeeze(self.how.ranks[-1])

    @torch.no_grad()
    def squeeze(self, k: int) -> None:
        """Leaves k ranks at every site that has more."""
        done: set[int] = set()
        for place in self.places():
            if id(place.f["A"]) not in done and int(torch.count_nonzero(place.f["g"])) > k:
                self._cut(place, k)
            done.add(id(place.f["A"]))

    def _cut(self, place: Place, k: int) -> None:
        A_RI, B_OR, g_R = (place.f[name] for name in "ABg")
        alive = g_R != 0
        found = squeezed(B_OR[:, alive], A_RI[alive], k)
        B_OK, A_KI, T_RK, P_KR, dead_K = (agreed(t.contiguous(), g_R.device) for t in found)
        self._remember(A_RI, T_RK.T, alive, dead_K > 0, 0)
        self._remember(B_OR, P_KR, alive, dead_K > 0, 1)
        there = slice(0, len(A_KI))  # k, or what the layer has
        A_RI.zero_()[there] = A_KI
        B_OR.zero_()[:, there] = B_OK
        g_R.zero_()[there] = 1

    def _remember(self, p: Tensor, map_KR: Tensor, alive: Tensor, dead_K: Tensor, dim: int) -> None:
        """Takes what the optimiser remembers of p along; under names that are not known here it is forgotten."""
        memory, k = moments(self.optimizer, p), len(map_KR)
        if set(memory) - LINEAR - SQUARED:
            self.optimizer.state.pop(p, None)
            return
        for name, t in memory.items():
            rows = t.movedim(dim, 0)
            law = map_KR.square() if name in SQUARED else map_KR
            new = (law @ rows[alive].to(law.dtype)).to(t.dtype)
            rows.zero_()[:k] = new
        state = self.optimizer.state.get(p, {})
        if BEGAN in state:  # as old as the oldest of what they are made of
            state[BEGAN] = state[BEGAN].amin(dim, keepdim=True)
        if bool(dead_K.any()):
            dead = torch.zeros(p.shape[dim], dtype=torch.bool, device=p.device)
            dead[:k] = dead_K
            begin_again(self.optimizer, p, dead[:, None] if dim == 0 else dead[None])


def squeezed(B_OR: Tensor, A_RI: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B_k, A_k, T (R, K), P (K, R), 1 for each of the k that is dead): of the nearest update of k ranks B_k = B T and
    A_k = P A.

    A rank that the update has not is dead: B is 0 there, A another direction of its own as long as its rows are, so
    that it can learn; nothing is remembered of it.
    """
    B, A = B_OR.double(), A_RI.double()
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, s, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    U, s, V = U[:, :k], s[:k], Vh[:k].T
    dead = s <= s[0] * torch.finfo(s.dtype).eps * max(B.shape[0], A.shape[1])
    root, inverse = s.sqrt(), torch.where(dead, 0.0, s.rsqrt())
    length = A.norm(dim=1).mean()
    B_OK = Q_B @ U * torch.where(dead, 0.0, root)
    A_KI = (Q_A @ V * torch.where(dead, length, root)).T
    T_RK, P_KR = R_A.T @ V * inverse, (R_B.T @ U * inverse).T
    return B_OK.to(B_OR.dtype), A_KI.to(A_RI.dtype), T_RK, P_KR, dead.to(s.dtype)
