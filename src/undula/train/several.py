"""Several adapters of one base: its weights in memory once, and a weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..core.adapter import Adapter
from ..host.host import attach, detach
from .base import same_base

if TYPE_CHECKING:
    from .restored import Restored
    from .run import Run


def check_one_base(runs: Sequence[Run]) -> None:
    """Raises ValueError for adapters of several bases."""
    first = runs[0]
    for run in runs[1:]:
        if not same_base(first.model, run.model) or run.dtype != first.dtype or run.bits != first.bits:
            raise ValueError(
                f"{first.out} is for {first.model} ({first.dtype}) and {run.out} for {run.model} ({run.dtype}): "
                "adapters of one base are opened together. Open each by itself"
            )


@torch.no_grad()
def share(opened: Restored, first: Restored) -> None:
    """Has `opened` use the memory of `first` for those weights of their bases that are the same."""
    theirs = {_below(first, name): p for name, p in first.model.named_parameters()}
    for name, p in opened.model.named_parameters():
        q = theirs.get(_below(opened, name))
        if q is not None and q.device == p.device and q.dtype == p.dtype and torch.equal(p, q):
            p.data = q.data


def _below(opened: Restored, name: str) -> str:
    """What a parameter is called in the body."""
    return name.removeprefix(f"{opened.model.base_model_prefix}.")


def summed(every: Sequence[Restored], weights: Sequence[float]) -> Restored:
    """The first with the weighted sum of all adapters in the place of its own.  Raises ValueError or TypeError for
    adapters that have no sum (see `Adapter.weight`), and for tasks that do not answer alike."""
    first = every[0]
    for other in every[1:]:
        ours, theirs = first.run.task, other.run.task
        if type(ours) is not type(theirs) or getattr(ours, "names", None) != getattr(theirs, "names", None):
            raise ValueError(f"{first.run.out} and {other.run.out} answer other things: a sum of them means nothing")
    if not all(opened.adapter.factors for opened in every):
        raise ValueError("a weighted sum is one of adapters, and a whole model is among these")
    terms = [weight * opened.adapter for weight, opened in zip(weights, every, strict=True)]
    whole: Adapter = sum(terms[1:], terms[0])
    whole.check_usable()
    detach(first.model)
    return replace(first, adapter=attach(first.model, whole))
