"""LoRSum, PSI-LoRA (Almansoori et al. 2026, arXiv:2602.16456): full fine-tuning's step cut to rank r, without its
gradient and without a singular value decomposition.

    target = B A - lr g,   g = S'X,   X (N, I) a layer's inputs, S (N, O) the gradients of its outputs

a sum of factor pairs c_i L_i R_i, whose best pair (B, A) is found by `rounds` of proximal alternating least squares, in
the metric |P|^2 = tr(M_U P M_V P'), diagonal (F-LoRSum; fraction 0: M = I, plain LoRSum):

    A <- (B' M_U B + rho)^-1 [(B' M_U B_0) A_0 + rho A_0 + sum c_i (B'L_i)(R_i M_V^-1)]
    B <- [B_0 (A_0 M_V A') + rho B_0 + sum c_i (M_U^-1 L_i)(R_i A')] (A M_V A' + rho)^-1
    M_V = (mean of x^2 + delta)^fraction,   M_U = (N sum of s^2 + delta)^fraction,   moving averages

With rho = 0 this is the power method: it converges to the truncated singular value decomposition of the target.  rounds
= 0 is one step of both at once from (B_0, A_0), scaled gradient descent.  The momentum is a pair too, kept at rank r by
the same rounds.  The scale s is folded into B.  rho = max(lr damping, 1e-5).

It sees X and S at the layers, so it keeps them until the step: the price in memory, N (O + I) numbers a layer.  What
else trains follows the base.  Served: LoRA at linear layers, without gate and dropout.  What it sees must be the
gradient that is there, up to a factor (a loss scale, a clipping): it is measured in every step, and processes that
average their gradients, penalties and tied layers are refused.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import LowRank
from ..host.state import host_of
from ..host.views import Conv1DView, LinearView
from .paired import UNSEEN, Paired, Params, kind_of
from .pairs import Pair

M_A, M_B, D_V, D_U = "undula_momentum_A", "undula_momentum_B", "undula_inputs", "undula_outputs"
Terms = list[tuple[float, Tensor, Tensor]]  # c, L (O, k), R (k, I)


class LoRSum(Paired):
    """See the module.  pull: the momentum (a base has one of its own); average: of the metric's moving averages.  lr is
    that of gradient descent: 0.2 in the source for RoBERTa, of both factors."""

    alone = True
    lacks = ("maximize",)

    def __init__(
        self,
        params: Params,
        adapted: nn.Module,
        *,
        rounds: int = 1,
        fraction: float = 0.5,
        damping: float = 1e-2,
        pull: float = 0.9,
        average: float = 0.99,
        delta: float = 1e-5,
        **options: Any,
    ):
        if rounds < 0 or not 0 <= fraction <= 1 or not 0 <= pull < 1 or not 0 <= average < 1 or not damping >= 0:
            raise ValueError(
                f"LoRSum takes rounds >= 0, fraction in [0, 1], damping >= 0, pull and average in [0, 1); found "
                f"{rounds=}, {fraction=}, {damping=}, {pull=}, {average=}"
            )
        self.rounds, self.fraction, self.damping, self.delta = rounds, fraction, damping, delta
        self.pull, self.average = pull, average
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}  # (X, S) of each call of a layer
        self.told: list[tuple[Pair, Tensor, Tensor, float, float]] = []  # X, S, rate, decay
        super().__init__(params, adapted, **options)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "LoRSum sees the rows of its own process alone, and several train together: take one process, or "
                "another optimiser, such as LoRAPro"
            )
        self.hooks: list[Any] = []
        for pair in self.pairs():
            layer = host_of(adapted).slots[pair.site.partition("#")[0]].layer
            method = self.adapter.methods.get(pair.site)
            plain = isinstance(method, LowRank) and method.plain() is not None and not method.drops
            if not plain or type(layer) not in (LinearView, Conv1DView):
                raise TypeError(
                    f"LoRSum sees inputs and gradients of linear layers under a plain LoRA; at {pair.site} stands "
                    f"{method!r} on a {kind_of(layer.owner)}. Take another optimiser, such as LoRAPro"
                )
            self.hooks.append(layer.owner.register_forward_hook(_listener(weakref.ref(self), pair.site)))
        for hook in self.hooks:
            weakref.finalize(self, hook.remove)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.seen = {}  # of a step that a gradient scaler has skipped

    def adjust(self) -> None:
        self.told = []
        groups = {id(t): group for group in self.param_groups for t in group["params"]}
        for pair in self.following():
            X, S = self._tokens(pair)
            self.told.append((pair, X, S, *_rate(pair, groups)))
            for t in (pair.A, pair.B):  # the base moves all but these
                self.given.append((t, t.grad))
                t.grad = None
        self.seen = {}

    def _tokens(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """(X, S) with S' X the gradient that is there.  Raises RuntimeError where it is another."""
        if self.beside:
            raise RuntimeError(
                "LoRSum follows the loss's gradient alone, and a penalty has added its own: leave the penalty out, or "
                "take another optimiser, such as LoRAPro"
            )
        calls = self.seen.get(pair.site, [])
        if not calls:
            raise RuntimeError(f"LoRSum saw no call of {pair.site} in training mode since the last step: {UNSEEN}")
        X, S = (torch.cat([call[i] for call in calls]).to(pair.A.dtype) for i in (0, 1))
        seen_A, seen_B = pair.scale * (pair.B.T @ S.T) @ X, pair.scale * S.T @ (X @ pair.A.T)
        there, seen = (torch.cat([a.flatten(), b.flatten()]) for a, b in ((pair.A.grad, pair.B.grad), (seen_A, seen_B)))  # type: ignore[union-attr]
        size = seen.square().sum()
        factor = torch.where(size > 0, (there @ seen) / size, 1)
        rounding = 8 * torch.finfo(calls[0][1].dtype).eps  # of S, of a base in bfloat16
        if (there - factor * seen).norm() > max(0.01, rounding) * there.norm():
            raise RuntimeError(
                f"{pair.site}: its gradient is not that of the rows that LoRSum saw: another was added (a penalty, "
                "another loss), or processes average theirs. Take another optimiser, such as LoRAPro"
            )
        return X, S * factor

    def moved(self) -> None:
        for pair, X, S, lr, decay in self.told:
            self._step(pair, X, S, lr, decay)
        self.told = []

    def _step(self, pair: Pair, X: Tensor, S: Tensor, lr: float, decay: float) -> None:
        state, rho = self.state[pair.A], max(lr * self.damping, 1e-5)
        A, B = pair.A.detach(), pair.scale * pair.B.detach()
        if "step" not in state:
            state["step"] = torch.zeros(())  # bases look for it
            self.state[pair.B]["step"] = torch.zeros(())  # see `Paired.widened`
            state[D_V], state[D_U] = torch.zeros_like(A[0]), torch.zeros_like(B[:, 0])
            state[M_A], state[M_B] = _draw(A), torch.zeros_like(B)
        state["step"] += 1
        for name, now in ((D_V, X.square().mean(0)), (D_U, len(S) * S.square().sum(0))):
            state[name].lerp_(now, 1 - self.average)
        unbiased = 1 - self.average ** float(state["step"])
        M_V, M_U = (((state[k] / unbiased) + self.delta) ** self.fraction for k in (D_V, D_U))
        b = self.pull
        gradient: Terms = [(-lr * (1 - b), S.T, X)] + ([(-lr * b, state[M_B], state[M_A])] if b else [])
        new_B, new_A = summed(B, A, gradient, M_U, M_V, rho, self.rounds)
        if b:
            terms: Terms = [(b - 1.0, state[M_B], state[M_A]), (1 - b, S.T, X)]
            one = torch.ones_like
            state[M_B], state[M_A] = summed(
                state[M_B], state[M_A], terms, one(M_U), one(M_V), 1e-5, max(1, self.rounds)
            )
        if lr:  # at 0 the rounds would leave their rounding
            pair.A.copy_(new_A - lr * decay * A)
            pair.B.copy_((new_B - lr * decay * B) / pair.scale)


def summed(
    B_0: Tensor, A_0: Tensor, terms: Terms, M_U: Tensor, M_V: Tensor, rho: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """(B, A) near B_0 A_0 + sum c L R, by the module's formulae; M_U (O), M_V (I) the diagonals."""
    B, A = B_0, A_0
    one = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)

    def of_A(B: Tensor) -> Tensor:
        right = (B.T @ (M_U[:, None] * B_0)) @ A_0 + rho * A_0
        for c, L, R in terms:
            right = right + c * (B.T @ L) @ (R / M_V)
        return _solved(B.T @ (M_U[:, None] * B) + rho * one, right)

    def of_B(A: Tensor) -> Tensor:
        right = B_0 @ ((A_0 * M_V) @ A.T) + rho * B_0
        for c, L, R in terms:
            right = right + c * (L / M_U[:, None]) @ (R @ A.T)
        return _solved((A * M_V) @ A.T + rho * one, right.T).T

    if not rounds:
        return of_B(A_0), of_A(B_0)
    for _ in range(rounds):
        A = of_A(B)
        B = of_B(A)
    return B, A


def _rate(pair: Pair, groups: Mapping[int, Mapping[str, Any]]) -> tuple[float, float]:
    """(rate, weight decay) of a pair.  Raises ValueError where its factors have two."""
    of_A, of_B = ((float(g["lr"]), float(g.get("weight_decay", 0.0))) for g in (groups[id(pair.A)], groups[id(pair.B)]))
    if of_A != of_B:
        raise ValueError(
            f"{pair.site}: LoRSum steps A and B together, at one rate and weight decay; A has {of_A}, B {of_B}"
        )
    return of_B


def _solved(M: Tensor, right: Tensor) -> Tensor:
    """M^-1 right of a positive definite M, in float64 where there is one."""
    if M.device.type == "mps":
        return torch.linalg.solve(M, right)
    return torch.linalg.solve(M.double(), right.double()).to(right.dtype)


def _draw(A: Tensor) -> Tensor:
    """Numbers of the size of A's that its shape alone determines."""
    n = torch.arange(A.numel(), dtype=torch.float64)
    return (torch.sin(12.9898 * (n + 1)) * 43758.5453).frac().reshape(A.shape).to(A) / math.sqrt(A.shape[1])


def _listener(me: Any, site: str) -> Any:
    """The hook of a layer."""

    def after(module: nn.Module, given: Any, output: Any) -> None:
        optimizer = me()
        if optimizer is None or not (module.training and torch.is_grad_enabled()) or not output.requires_grad:
            return
        if not given:
            raise TypeError(f"LoRSum sees the inputs that {site} is given by position, and it is called by keywords")
        x = given[0].detach().flatten(0, -2)
        output.register_hook(
            lambda g: optimizer.seen.setdefault(site, []).append((x, g.detach().flatten(0, -2))) and None
        )

    return after
