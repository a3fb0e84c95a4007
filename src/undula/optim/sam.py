"""SAMReference, after GLAD (Peng et al. 2025, arXiv:2507.13089): the gradient with a sharpness-aware one beside it.

    g = dL/dtheta at theta,   g_s = dL/dtheta at theta + rho g / |g|
    g' = (1 - lam) g + lam g_s                          the gradient of L + lam rho |grad L|, to first order
    conflict:  g' = g - min(<g, g_s>, 0) g_s / |g_s|^2  no step against the flat direction

Interpretation: of the paper only that the gradient of sharpness-aware minimisation (Foret et al. 2020,
arXiv:2010.01412) is a reference that steers the plain one was at hand.  theta are all factors that train, of whatever
method: no pairs are needed.  What else trains follows g alone, and what is added to the gradients afterwards (a
penalty's, `paired.pull`) is followed as it is.  Two forward and backward passes: in a loop of your own
by `step(closure)`; `undula train` gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .paired import Paired, Params, check_went
from .pairs import Pair

Steer = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def mixed(lam: float) -> Steer:
    """g' = (1 - lam) g + lam g_s."""
    return lambda g, g_s: list(torch._foreach_lerp(g, g_s, lam))


def without_conflict(g: list[Tensor], g_s: list[Tensor]) -> list[Tensor]:
    """g, less what of it goes against g_s."""
    along = sum((a * b).sum() for a, b in zip(g, g_s, strict=True))
    size = sum(b.square().sum() for b in g_s)
    share = torch.where(torch.as_tensor(size) > 0, torch.as_tensor(along).clamp_max(0) / size, 0)
    return [a - share * b for a, b in zip(g, g_s, strict=True)]


def norm(tensors: list[Tensor]) -> Tensor:
    """Of all of them together, in float32 or wider."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack(torch._foreach_norm(wide)).norm() if wide else torch.tensor(0.0)


class SAMReference(Paired):
    """See the module.  steer: (g, g_s) -> g'."""

    lacks = ("maximize",)  # of what is to rise the direction would be the other one

    def __init__(
        self, params: Params, adapted: nn.Module, *, rho: float = 0.05, steer: Steer | None = None, **options: Any
    ):
        if not rho >= 0:
            raise ValueError(f"SAMReference.rho is at least 0, found {rho}")
        self.rho, self.steer = rho, mixed(0.5) if steer is None else steer
        self.found: list[tuple[Tensor, Tensor]] | None = None
        self.length = torch.tensor(0.0)  # of the gradients that `found` was made of
        super().__init__(params, adapted, **options)

    def pairs(self) -> list[Pair]:
        """None: any factors will do."""
        return []

    def twice(self, again: Callable[[], Any]) -> None:
        """The gradients are there: has `again`, a forward and backward pass over the same rows, run at the moved
        factors and keeps what `step` is to follow.  The factors are put back bit for bit.

        Both passes are scaled alike or not at all: with a `torch.amp.GradScaler` this comes before `unscale_`, and
        `again` scales as the first pass did.  What is done to the gradients from here to `step`, unscaling or
        clipping, is done to what it follows, and gradients that are not finite at the moved factors are so in `grad`,
        for the scaler to see."""
        theta = list({id(t): t for _, _, t in self.adapter.tensors() if t.grad is not None}.values())
        every = [p for group in self.param_groups for p in group["params"]]
        if not self.rho or not theta:
            self.found = []
            return
        first = [p.grad for p in every]
        g: list[Tensor] = [t.grad for t in theta]  # type: ignore[misc]
        copies = [t.detach().clone() for t in theta]
        with torch.no_grad():
            self.length = length = norm(g)
            step = torch.where(length > 0, self.rho / length, 0)
            torch._foreach_add_(theta, torch._foreach_mul(g, step))
        try:
            check_went(theta, copies, step * length, self.called)
            for p in every:
                p.grad = None
            with torch.enable_grad():
                again()
            g_s = [torch.zeros_like(t) if t.grad is None else t.grad for t in theta]
        finally:
            with torch.no_grad():
                torch._foreach_copy_(theta, copies)
            for p, grad in zip(every, first, strict=True):
                p.grad = grad
        self.beside = {}  # of what both have
        with torch.no_grad():
            self.found = list(zip(theta, self.steer(g, g_s), strict=True))
            for (t, new), first_g in zip(self.found, g, strict=True):
                t.grad = first_g + 0 * new  # NaN where `new` is not finite, else as it was

    def adjust(self) -> None:
        if self.found is None:
            raise RuntimeError(
                "SAMReference looks twice at the rows of a step: give step a closure that clears the gradients, "
                "computes the loss and calls backward, as torch.optim.LBFGS takes it"
            )
        own: dict[int, Any] = {id(t): self.beside.get(id(t), 0.0) for t, _ in self.found}
        now = norm([t.grad - own[id(t)] for t, _ in self.found])
        share = torch.where(self.length > 0, now / self.length, 1)
        for t, new in self.found:
            self.given.append((t, t.grad))
            t.grad = (share * new + own[id(t)]).to(t.dtype)
        self.found = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step; closure clears the gradients, computes the loss and calls backward."""
        loss = None
        if closure is not None:
            if self.beside:
                raise RuntimeError(
                    "a penalty's gradient was added before the closure, which clears it: call before_update of its "
                    "course within the closure"
                )
            with torch.enable_grad():
                loss = closure()
            self.twice(closure)
        super().step()
        return loss
