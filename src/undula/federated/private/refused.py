"""What goes with differential privacy of rows, and what does not: a clip bounds what one row can change only where its
gradient is its own, and noise covers only what has gone through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core.layer import Outline
from ...core.method import Method, Site
from ...host.slots import Slot
from ...host.state import host_of
from ...host.views import check_product


def check_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError or TypeError with the name of what cannot be trained so."""
    trained = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("nothing trains in this model: attach an adapter before")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [n for i, n in trained.items() if i not in held]:
        raise ValueError(f"{missing[0]} trains and the optimiser does not have it: it would keep its gradients")
    if odd := held - set(trained):
        raise ValueError(f"the optimiser has {len(odd)} parameters that do not train, or are none of this model's")
    for name, m in model.named_modules():
        own = any(p.requires_grad for p in m.parameters(recurse=False))
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.training or m.running_mean is None:
                raise ValueError(
                    f"{name} is a {type(m).__name__} that takes the statistics of a batch, so each row's gradient "
                    "depends on all: put it into evaluation mode (its own statistics), or take a model with GroupNorm"
                )
            if own:
                raise ValueError(f"{name}: a {type(m).__name__} does not train in full here. Leave it out (`full`)")
        elif own and not isinstance(m, Slot) and isinstance(m._modules.get("undula"), Slot):
            raise ValueError(f"{name} is adapted and trains in full: one of the two. Leave it out of `full` or `where`")
    for site, slot in host_of(model).slots.items():
        check_product(site, slot.layer)


def of_run(recipe: Any) -> Iterator[str]:
    """Why a training with these settings cannot be private, in sentences that begin with the setting."""
    if why := recipe.optimiser.private:
        yield f"optimiser: {recipe.optimiser!r} {why}. Take AdamW or SGD"
    for penalty in recipe.penalty:
        if penalty.active:
            why = (
                "looks at the answers to a whole batch, so that a row changes what others give"
                if penalty.answers
                else "is not taken into steps of DP-SGD"
            )
            yield f"penalty: {penalty!r} {why}. Leave it out"
    for method in dict.fromkeys(m for m in (recipe.method, *recipe.overrides.values()) if m is not None):
        if begins_from_data(method):
            yield f"method: {method!r} begins with a look at data, which no noise covers. Take another start"
    if getattr(recipe.task, "class_weights", None) is not None:
        yield "task: class_weights are brought to a mean of 1 over a client's rows, which tells of its labels"
    if recipe.task.own_loss or recipe.task.fitter() is not None:
        yield f"task: the loss of {type(recipe.task).__name__} is none of single rows, which are what is clipped"
    if recipe.gradient_checkpointing:
        yield "gradient_checkpointing: a layer that computes twice would be heard twice. Leave it out"


def begins_from_data(method: Method) -> bool:
    """Whether its start asks what gradients or inputs are."""
    site = _Asked("a layer", Outline((64, 64), torch.float32), (64, 64), torch.float32, torch.device("meta"))
    method.init(site)
    return bool(site.asked)


@dataclass(frozen=True)
class _Asked(Site):
    """A site that has no numbers, and remembers that somebody asked for data."""

    asked: list[str] = field(default_factory=list)

    def gradient(self) -> Tensor:
        self.asked.append("gradients")
        return super().gradient()

    def moments(self) -> tuple[Tensor, Tensor, int]:
        self.asked.append("inputs")
        return super().moments()
