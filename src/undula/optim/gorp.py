"""GORP (Wang et al. 2025, arXiv:2507.02503, ACL 2025): tasks in sequence, each orthogonal to what the ones before have
learnt.

At the end of a task, M the first moment of a factor (of B (O, R); of A its transpose, (I, R)):

    M^ = M - S S'M,   M^ = U diag(s) V',   S <- [S, the fewest columns of U with |S S'M|^2 + |M^_k|^2 >= energy |M|^2]

In the next task both the gradient and what the base's step has moved lose their part in S: Adam divides entry by entry,
after which a projected gradient is orthogonal to S no longer.  The moments begin again with each task.

    optimizer = GORP(adapter.parameters(), model, lr=1e-3)
    ...  # the first task
    optimizer.close_task()
    ...  # the second

`project` = k > 0 is the paper's other part, for matrices that train in full (`attach(full=...)`, a head): G (O, I)
without its part in S is followed at rank k alone,

    U (O, k), V (I, k) of the singular value decomposition of G, anew every `every` steps
    P = U'G V,   W <- W - lr U adam(P) V'

the moments of P (k, k) are carried over to new U and V by the products of the old and the new ones (the second by their
squares), and their first stands for M at the end of a task.  With 0 such matrices follow the base, and no task protects
them.

Interpretation: axes, energy and its accounting are not in what was at hand (energy as in gradient projection methods,
0.95 to 0.99), nor what becomes of moments when U and V change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .paired import Paired, Params

MOMENTS = ("exp_avg", "momentum_buffer")  # what bases call their first moment
LEFT, RIGHT, FIRST, SECOND = "undula_left", "undula_right", "undula_first", "undula_second"  # U, V, moments of P


class GORP(Paired):
    """See the module.  bases: S by names, of the tasks before (`close_task` of another optimiser returned them)."""

    def __init__(
        self,
        params: Params,
        adapted: nn.Module,
        *,
        energy: float = 0.95,
        project: int = 0,
        every: int = 10,
        bases: Mapping[str, Tensor] | None = None,
        **options: Any,
    ):
        if not 0 < energy <= 1 or project < 0 or every < 1:
            raise ValueError(
                f"GORP takes energy above 0 and at most 1, project >= 0, every >= 1; found {energy=}, {project=}, "
                f"{every=}"
            )
        self.energy, self.project, self.every = energy, project, every
        self.lacks = ("maximize", "amsgrad") if project else ()
        self.before: list[tuple[Tensor, bool, Tensor]] = []
        self.kept: list[Tensor] = []
        self.told: list[tuple[Tensor, Tensor]] = []
        self.bases: dict[str, Tensor] = dict(bases or {})
        super().__init__(params, adapted, **options)
        self._check(self.bases)

    def _check(self, bases: Mapping[str, Tensor]) -> None:
        """Raises ValueError for bases of factors that are not here."""
        known = {name for name, _, _ in self.sides()}
        if odd := sorted(set(bases) - known):
            raise ValueError(f"the tasks before have used {odd[0]}, which is no factor here: begin with their adapter")

    def sides(self) -> Iterator[tuple[str, Tensor, bool]]:
        """(name, parameter, whether its columns are what is protected), what is projected last."""
        for p in self.pairs():
            yield f"{p.site}.A", p.A, True
            yield f"{p.site}.B", p.B, False
        yield from ((name, t, False) for name, t in self.matrices())

    def matrices(self) -> list[tuple[str, Tensor]]:
        """(name, parameter) of those that are followed at rank `project`."""
        full = self.adapter.full.items() if self.project else ()
        return [(n, t) for n, t in full if t.requires_grad and t.ndim == 2 and min(t.shape) > self.project]

    @torch.no_grad()
    def closed(self) -> dict[str, Tensor]:
        """The bases with what this task has used.  Raises RuntimeError where the base remembers no first moment."""
        used = {name: self._used(t, across) for name, t, across in self.sides()}
        if all(M is None for M in used.values()):
            raise RuntimeError(
                f"GORP reads what a task has used from the base's first moment ({' or '.join(MOMENTS)}), and there "
                "is none: train the task first, with AdamW or with SGD with momentum"
            )
        return self.bases | {n: widened(self.bases.get(n), M, self.energy) for n, M in used.items() if M is not None}

    @torch.no_grad()
    def close_task(self) -> dict[str, Tensor]:
        """Adds what this task has used to the bases, lets the moments begin again and returns the bases.  Raises as
        `closed`."""
        self.bases = self.closed()
        for _, t, _ in self.sides():
            self.state.pop(t, None)
        return dict(self.bases)

    def _used(self, t: Tensor, across: bool) -> Tensor | None:
        """The first moment of a parameter, what is protected along its rows; None of one that was never moved."""
        state = self.state.get(t, {})
        if FIRST in state:
            return state[LEFT] @ state[FIRST] @ state[RIGHT].T
        moment = next((state[k] for k in MOMENTS if isinstance(state.get(k), Tensor)), None)
        return moment.T if across and moment is not None else moment

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bases": dict(self.bases)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises KeyError for a state without bases, which is another optimiser's, ValueError for another adapter's."""
        self._check(state_dict["bases"])
        super().load_state_dict(state_dict)
        self.bases = dict(state_dict["bases"])

    def adjust(self) -> None:
        self.before, self.kept = [], []
        self.given += [(t, t.grad) for _, t in self.matrices()]
        for name, t, across in self.sides():
            if name not in self.bases or t.grad is None:
                continue
            S = self.bases[name].to(t.device)
            self.given.append((t, t.grad))
            t.grad = outside(S, t.grad, across)
            self.before.append((t, across, S))
            self.kept.append(t.detach().clone())

    def base_step(self) -> None:
        self.told = [(t, t.grad) for _, t in self.matrices() if t.grad is not None]
        for t, _ in self.told:
            t.grad = None
        super().base_step()

    def moved(self) -> None:
        groups = {id(t): group for group in self.param_groups for t in group["params"]}
        for t, G in self.told:
            self._follow_low(t, G, groups[id(t)])
        for (t, across, S), was in zip(self.before, self.kept, strict=True):
            t.copy_(was + outside(S, t - was, across))
        self.before, self.kept, self.told = [], [], []

    def _follow_low(self, t: Tensor, G: Tensor, group: Mapping[str, Any]) -> None:
        """A step of Adam's rule along G at rank `project`."""
        state, k, (b1, b2) = self.state[t], self.project, group.get("betas", (0.9, 0.999))
        if FIRST not in state:
            state["step"] = torch.zeros(())  # bases look for it
            state[FIRST], state[SECOND] = G.new_zeros(k, k), G.new_zeros(k, k)
        if int(state["step"]) % self.every == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            U, V = U[:, :k].contiguous(), Vh[:k].T.contiguous()
            if LEFT in state:
                left, right = U.T @ state[LEFT], state[RIGHT].T @ V
                state[FIRST] = left @ state[FIRST] @ right
                state[SECOND] = left.square() @ state[SECOND] @ right.square()
            state[LEFT], state[RIGHT] = U, V
        state["step"] += 1
        step, P = float(state["step"]), state[LEFT].T @ G @ state[RIGHT]
        state[FIRST].lerp_(P, 1 - b1)
        state[SECOND].mul_(b2).addcmul_(P, P, value=1 - b2)
        root = (state[SECOND] / (1 - b2**step)).sqrt() + group.get("eps", 1e-8)
        lr = float(group["lr"])
        t.mul_(1 - lr * group.get("weight_decay", 0.0))
        t.sub_(state[LEFT] @ (state[FIRST] / (1 - b1**step) / root) @ state[RIGHT].T, alpha=lr)


def outside(S: Tensor, G: Tensor, across: bool) -> Tensor:
    """G without its part in S: of its columns, or of its rows (`across`)."""
    S = S.to(G.dtype)
    return G - (G @ S) @ S.T if across else G - S @ (S.T @ G)


def widened(S: Tensor | None, M: Tensor, energy: float) -> Tensor:
    """S with the fewest directions of M that bring the share `energy` of |M|^2 into it; M (n, R)."""
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    S = M.new_zeros(M.shape[0], 0) if S is None else S.to(M)
    left = M - S @ (S.T @ M)
    U, s, _ = torch.linalg.svd(left, full_matrices=False)
    whole = M.square().sum()
    held = torch.cat([M.new_zeros(1), s.square().cumsum(0)]) + (whole - left.square().sum())
    k = int((held < energy * whole).sum().clamp_max(min(len(s), M.shape[0] - S.shape[1])))
    new = U[:, :k] - S @ (S.T @ U[:, :k])
    return torch.cat([S, torch.linalg.qr(new).Q if k else new], 1)
