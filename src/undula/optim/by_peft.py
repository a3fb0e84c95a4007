"""Optimisers of PEFT (`peft.optimizers`) on undula's pairs: PEFT finds `lora_A` and `lora_B` by their names, and would
find none here.  What they compute is PEFT's; LoRA+ is `b_ratio` of a training and `undula.loraplus_groups`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.extras import needs
from ..host.host import selected
from .paired import Paired, Params
from .pairs import Pair, pairs


class Riemannian(Paired):
    """Riemannian preconditioned LoRA, ScaledAdam (Zhang, Pilanci 2024, arXiv:2402.02347) by PEFT's preconditioner:

        g_A <- (B'B + reg)^-1 dL/dA,   g_B <- dL/dB (A A' + reg)^-1

    over any base.  reg is absolute, and the scale s is none of it, as there."""

    @needs("hf")
    def __init__(self, params: Params, adapted: nn.Module, *, reg: float = 1e-2, **options: Any):
        from peft.optimizers.riemannian import _RiemannianPreconditioner

        self.preconditioner, self.reg = _RiemannianPreconditioner, reg
        super().__init__(params, adapted, **options)

    def adjust(self) -> None:
        theirs: list[tuple[Pair, Any, Any]] = []
        for p in self.following():
            A, B = p.right.detach().clone(), p.left.detach().clone()
            A.grad, B.grad = p.A.grad.clone(), p.B.grad.clone()  # type: ignore[union-attr]
            theirs.append((p, A, B))
        self.preconditioner([(A, B) for _, A, B in theirs], self.reg).step()
        for p, A, B in theirs:
            for t, new in ((p.A, A.grad), (p.B, B.grad)):
                self.given.append((t, t.grad))
                t.grad = new


class LoRAFA(torch.optim.Optimizer):
    """LoRA-FA (Zhang et al. 2023, arXiv:2308.03303) by PEFT's `LoraFAOptimizer`, which this makes an instance of: A
    stays as it is (it is frozen here), and B follows dL/dB (A A')^-1 / s^2 by AdamW's rule.  What else trains does so
    by AdamW.

    Raises as `pairs` does, and ValueError for pairs with a gate, which PEFT's does not know.
    """

    def __new__(cls, params: Params, adapted: nn.Module, **options: Any) -> Any:
        return _lora_fa(params, adapted, **options)


@needs("hf")
def _lora_fa(
    params: Params,
    adapted: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    from peft.optimizers.lorafa import LoraFAOptimizer

    found = pairs(selected(adapted))
    if gated := [p.site for p in found if p.gate is not None]:
        raise ValueError(f"LoRA-FA knows no gate between A and B, and {gated[0]} has one: take LoRA")
    given = list(params)
    groups: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]
    known = {id(t): g for g in groups for t in g["params"]}
    both = {id(t) for p in found for t in (p.A, p.B)}
    decay = next((known[id(p.B)].get("weight_decay", weight_decay) for p in found if id(p.B) in known), weight_decay)
    couples: list[Tensor] = [t for p in found for t in (p.A, p.B)]
    made: list[dict[str, Any]] = [{
        "params": couples,
        "names": [f"{p.site}.lora_{name}" for p in found for name in "AB"],
        "scaling_factors": [p.scale for p in found for _ in "AB"],
        "weight_decay": decay,
    }]  # fmt: skip
    for group in groups:
        if rest := [t for t in group["params"] if id(t) not in both]:
            made.append({**group, "params": rest, "names": [], "scaling_factors": []})
    for p in found:
        p.A.requires_grad_(False)
        p.A.grad = None
    numbers: dict[int, int] = {}

    class Named(LoraFAOptimizer):  # type: ignore[misc]
        """Names what is no pair by a number of its own, whichever group it is moved to: the state is kept by names."""

        def add_param_group(self, group: dict[str, Any]) -> None:
            super().add_param_group(group)
            for t in self.param_groups[-1]["params"]:
                numbers.setdefault(id(t), len(numbers))

        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:  # PEFT's would call it without gradients
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                if group["names"][:1] != made[0]["names"][:1]:
                    group["names"] = [f"full.{numbers[id(t)]}" for t in group["params"]]
                    group["scaling_factors"] = [None] * len(group["params"])
            super().step()
            return loss

    groups_of: Any = made
    return Named(groups_of, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
