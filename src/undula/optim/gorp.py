"""GORP (Wang et al. 2025, arXiv:2507.02503, ACL 2025), its part on low-rank factors: tasks in sequence, each orthogonal
to what the ones before have learnt.

At the end of a task, M the first moment of a factor (of B (O, R); of A its transpose, (I, R)):

    M^ = M - S S'M,   M^ = U diag(s) V',   S <- [S, the fewest columns of U with |S S'M|^2 + |M^_k|^2 >= energy |M|^2]

In the next task both the gradient and what the base's step has moved lose their part in S: Adam divides entry by entry,
after which a projected gradient is orthogonal to S no longer.  The moments begin again with each task.

    optimizer = GORP(adapter.parameters(), model, lr=1e-3)
    ...  # the first task
    optimizer.close_task()
    ...  # the second

Interpretation: axes, energy and its accounting are not in what was at hand (energy as in gradient projection methods,
0.95 to 0.99).  The paper's other part, low-rank gradients of parameters in full, is not here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .paired import Paired, Params

MOMENTS = ("exp_avg", "momentum_buffer")  # what bases call their first moment


class GORP(Paired):
    """See the module."""

    def __init__(self, params: Params, adapted: nn.Module, *, energy: float = 0.95, **options: Any):
        if not 0 < energy <= 1:
            raise ValueError(f"GORP.energy is a share above 0 and at most 1, found {energy}")
        self.energy = energy
        self.before: list[tuple[Tensor, bool, Tensor]] = []
        self.kept: list[Tensor] = []
        self.bases: dict[int, Tensor] = {}  # S (O or I, k) of factors, by their place among the parameters
        super().__init__(params, adapted, **options)

    def sides(self) -> list[tuple[Tensor, bool]]:
        """(factor, whether its columns are what is protected)."""
        return [side for p in self.pairs() for side in ((p.A, True), (p.B, False))]

    def place(self, t: Tensor) -> int:
        """Its number among all parameters."""
        every = [p for group in self.param_groups for p in group["params"]]
        return next(i for i, p in enumerate(every) if p is t)

    @torch.no_grad()
    def close_task(self) -> None:
        """Adds what this task has used to the bases, and lets the moments begin again.  Raises RuntimeError where the
        base remembers no first moment of a factor."""
        for t, across in self.sides():
            state = self.state.get(t, {})
            moment = next((state[k] for k in MOMENTS if isinstance(state.get(k), Tensor)), None)
            if moment is None:
                raise RuntimeError(
                    f"GORP reads what a task has used from the base's first moment ({' or '.join(MOMENTS)}), and there "
                    "is none: train the task first, with AdamW or with SGD with momentum"
                )
            at = self.place(t)
            self.bases[at] = widened(self.bases.get(at), moment.T if across else moment, self.energy)
        for t, _ in self.sides():
            self.state.pop(t)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bases": dict(self.bases)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises KeyError for a state without bases, which is another optimiser's."""
        super().load_state_dict(state_dict)
        self.bases = dict(state_dict["bases"])

    def adjust(self) -> None:
        self.before, self.kept = [], []
        for t, across in self.sides():
            if not self.bases or t.grad is None:
                continue
            S = self.bases[self.place(t)].to(t.device)
            self.given.append((t, t.grad))
            t.grad = outside(S, t.grad, across)
            self.before.append((t, across, S))
            self.kept.append(t.detach().clone())

    def moved(self) -> None:
        for (t, across, S), was in zip(self.before, self.kept, strict=True):
            t.copy_(was + outside(S, t - was, across))
        self.before, self.kept = [], []


def outside(S: Tensor, G: Tensor, across: bool) -> Tensor:
    """G without its part in S: of its columns, or of its rows (`across`)."""
    S = S.to(G.dtype)
    return G - (G @ S) @ S.T if across else G - S @ (S.T @ G)


def widened(S: Tensor | None, M: Tensor, energy: float) -> Tensor:
    """S with the fewest directions of M that bring the share `energy` of |M|^2 into it; M (n, R)."""
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    S = M.new_zeros(M.shape[0], 0) if S is None else S.to(M.dtype)
    left = M - S @ (S.T @ M)
    U, s, _ = torch.linalg.svd(left, full_matrices=False)
    whole = M.square().sum()
    held = torch.cat([M.new_zeros(1), s.square().cumsum(0)]) + (whole - left.square().sum())
    k = int((held < energy * whole).sum().clamp_max(min(len(s), M.shape[0] - S.shape[1])))
    new = U[:, :k] - S @ (S.T @ U[:, :k])
    return torch.cat([S, torch.linalg.qr(new).Q if k else new], 1)
