"""LoRA-MGPO (EMNLP Findings 2025, pp. 648-659; arXiv:2502.14538v2): flat minima by momentum, with one backward pass.

    e_t = rho m_{t-1} / |m_{t-1}| * min(1 / n_{t-1}, 10)
    g_t = dL/dtheta at theta_t + e_t                     theta: all factors
    theta_{t+1} = base step from theta_t along g_t
    m_t = mu m_{t-1} + g_t,   n_t = beta n_{t-1} + (1 - beta) |g_t|

Where sharpness-aware minimisation spends a second backward pass to find the direction of ascent, this takes the
momentum.  Before the first step there is none and nothing is moved.  The paper moves along +m, the authors' code the
base's weights along -m: `sign`.  1 / n is bounded by 10, as there: it grows without end where the gradients vanish.
n_1 = |g_1|.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .paired import Params, check_went
from .perturbed import Perturbed

MOMENTUM, NORM, MOST = "undula_momentum", "undula_norm", 10.0


class LoRAMGPO(Perturbed):
    """See the module.  rho: the length of the perturbation; sign: +1 or -1."""

    lacks = ("maximize",)  # of what is to rise the direction would be the other one

    def __init__(
        self,
        params: Params,
        adapted: nn.Module,
        *,
        rho: float = 0.05,
        mu: float = 0.9,
        beta: float = 0.9,
        sign: int = 1,
        **options: Any,
    ):
        if not rho >= 0 or not 0 <= mu < 1 or not 0 <= beta < 1 or sign not in (1, -1):
            raise ValueError(
                f"LoRAMGPO takes rho >= 0, mu and beta in [0, 1), sign 1 or -1; found {rho=}, {mu=}, {beta=}, {sign=}"
            )
        self.rho, self.mu, self.beta, self.sign = rho, mu, beta, sign
        super().__init__(params, adapted, **options)

    @property
    def strength(self) -> float:
        return self.rho

    @property
    def theta(self) -> list[Tensor]:
        """All factors."""
        return [t for p in self.pairs() for t in (p.A, p.B)]

    def put_out(self) -> None:
        held = [(t, self.state[t]) for t in self.theta if MOMENTUM in self.state.get(t, {})]
        if not held:
            return
        those, m = [t for t, _ in held], [state[MOMENTUM] for _, state in held]
        norm = held[0][1][NORM]
        self.keep(those)
        length = torch.stack(torch._foreach_norm(m)).norm()
        step = torch.where(length > 0, self.sign * self.rho * (1 / norm).clamp_max(MOST) / length, 0)
        moves = torch._foreach_mul(m, step)
        torch._foreach_add_(those, [e.to(t.dtype) for e, t in zip(moves, those, strict=True)])
        check_went(those, [self.kept[id(t)][1] for t in those], step.abs() * length, self.called)

    def moved(self) -> None:
        if not self.rho:
            return
        those = [t for t in self.theta if t.grad is not None]
        g = [t.grad for t in those]
        if not those:
            return
        norm = torch.stack(torch._foreach_norm(g)).norm()  # type: ignore[arg-type]
        for t in those:
            self.state[t].setdefault(MOMENTUM, torch.zeros_like(t))
        m = [self.state[t][MOMENTUM] for t in those]
        torch._foreach_mul_(m, self.mu)
        torch._foreach_add_(m, g)  # type: ignore[arg-type]
        before = next((self.state[t][NORM] for t in those if NORM in self.state[t]), norm)
        norm = before.lerp(norm, 1 - self.beta)
        for t in those:  # an allocator may let any of them begin again
            self.state[t][NORM] = norm
