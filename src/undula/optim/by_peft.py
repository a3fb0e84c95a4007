"""Optimisers of PEFT (`peft.optimizers`) on undula's pairs: PEFT finds `lora_A` and `lora_B` by their names, and would
find none here.  What they compute is PEFT's; LoRA+ is `b_ratio` of a training and `undula.loraplus_groups`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.extras import needs
from ..host.host import selected
from ..host.masters import wide
from ..host.sharded import check_whole
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
    stays as it is (it is frozen here), and B follows dL/dB (A A')^-1 / s^2 by AdamW's rule, with the options of the
    group that it is in.  What else trains does so by AdamW.

    Raises as `pairs` does, TypeError for parameters that are sharded or narrower than float32, in which PEFT's steps
    would be lost, and ValueError for pairs with a gate, which PEFT's does not know, and for a B that is in no group.
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

    adapter = selected(adapted)
    check_whole(adapter.parameters(), "training with LoRAFA")
    found = pairs(adapter)
    groups = _grouped(params)
    _check(found, groups)
    told = {id(t): (name, p.scale) for i, p in enumerate(found) for name, t in _named(i, p)}
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
            whole = [group["params"] for group in self.param_groups]
            still = {id(t) for p in found if p.B.grad is None for t in (p.A, p.B)}
            for group in self.param_groups:  # of a layer without a gradient PEFT's would take it all the same
                group["params"] = [t for t in group["params"] if id(t) not in still]
                those = [told.get(id(t)) or (f"full.{numbers[id(t)]}", None) for t in group["params"]]
                group["names"], group["scaling_factors"] = ([each[i] for each in those] for i in (0, 1))
            try:
                super().step()
            finally:
                for group, those in zip(self.param_groups, whole, strict=True):
                    group["params"] = those
            return loss

    groups_of: Any = list(_couples_first(found, groups))
    return Named(groups_of, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _grouped(params: Params) -> list[dict[str, Any]]:
    """Groups of lists, of what optimisers take: parameters or groups of them."""
    given = list(params)
    groups: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]
    return [{**group, "params": list(group["params"])} for group in groups]


def _check(found: list[Pair], groups: list[dict[str, Any]]) -> None:
    """Raises as `LoRAFA` says."""
    known = {id(t) for group in groups for t in group["params"]}
    for p in found:
        if p.gate is not None:
            raise ValueError(f"LoRA-FA knows no gate between A and B, and {p.site} has one: take LoRA")
        if id(p.B) not in known:
            raise ValueError(f"{p.site}: its factor B trains and is not among the parameters of the optimiser")
    every = [t for group in groups for t in group["params"]] + [p.A for p in found]
    if narrow := next((t.dtype for t in every if t.dtype != wide(t.dtype)), None):
        raise TypeError(
            f"LoRA-FA steps in the numbers' own type, and {str(narrow).removeprefix('torch.')} would lose its steps: "
            "keep what trains in float32 (change the model's type before attach), or take another optimiser"
        )


def _named(i: int, p: Pair) -> Iterator[tuple[str, Tensor]]:
    """The names by which PEFT's knows a pair, and keeps its state: what stands before the first "lora"."""
    site = f"pair.{i}" if "lora" in p.site else p.site
    yield from ((f"{site}.lora_A", p.A), (f"{site}.lora_B", p.B))


def _couples_first(found: list[Pair], groups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each group the pairs whose B it has, A before B, and the rest, with its options."""
    both = {id(t) for p in found for t in (p.A, p.B)}
    for group in groups:
        own = {id(t) for t in group["params"]}
        couples = [t for p in found if id(p.B) in own for t in (p.A, p.B)]
        rest = [t for t in group["params"] if id(t) not in both]
        for those in (couples, rest):
            if those:
                yield {**group, "params": those, "names": [], "scaling_factors": []}
