"""What does not go together in a training: method, allocator, penalty and optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..core.layer import Outline
from ..core.method import Method, Site
from ..optim.optimisers import Optimiser
from ..penalties.penalty import Penalty
from ..ranks import Allocator, Procedure


def refusals(
    allocator: Procedure | None,
    method: Method | None,
    overrides: Mapping[str, Method],
    optimiser: Optimiser,
    penalty: tuple[Penalty, ...] = (),
) -> Iterator[tuple[str, str]]:
    """(field, why) of what an allocator, a penalty, or an optimiser that sees pairs, does not go with."""
    if optimiser.paired:
        if method is None:
            yield "optimiser", f"{optimiser!r} moves the factors of adapted layers, and without a method there are none"
        for name, each in (("optimiser", method), *(("overrides", m) for m in overrides.values())):
            if optimiser.by_pairs and each is not None and not has_pairs(each):
                yield (
                    name,
                    f"{optimiser!r} moves pairs of factors A and B, and {each!r} has none: take LoRA or what is made "
                    "of it, or another optimiser, such as AdamW()",
                )
    own = getattr(allocator, "procedures", (allocator,))
    if given := [p for p in own if isinstance(p, Penalty)]:
        yield "allocator", f"{given[0]!r} is a penalty: it goes into penalty=..., --penalty"
        return
    yield from _unpenalised(allocator, method, overrides, penalty)
    if optimiser.alone and (odd := [p for p in penalty if p.pulls and p.active]):
        yield (
            "penalty",
            f"{odd[0]!r} adds a gradient of its own to the factors', and {optimiser!r} follows the loss's alone: take "
            "another optimiser, such as AdamW() or LoRAPro()",
        )
    if allocator is None:
        return
    if not optimiser.follows:
        yield "optimiser", f"what {optimiser!r} remembers cannot follow {allocator!r}: take another optimiser"
    for name, each in (("allocator", method), *(("overrides", m) for m in overrides.values())):
        if each is None or not allocator.serves(each):
            yield name, allocator.refusal(each)
    if allocator.entrywise and not optimiser.entrywise:
        yield (
            "optimiser",
            f"{allocator!r} lets single entries of a factor begin again, and {optimiser!r} remembers sums of its rows "
            "and columns, which have no entries: take another optimiser, such as AdamW()",
        )


def _unpenalised(
    allocator: Procedure | None, method: Method | None, overrides: Mapping[str, Method], penalty: tuple[Penalty, ...]
) -> Iterator[tuple[str, str]]:
    """(field, why) of what penalties do not go with."""
    own = getattr(allocator, "procedures", (allocator,))
    for added in (p for p in penalty if p.active):
        for name, found in (("penalty", method), *(("overrides", m) for m in overrides.values())):
            if found is None or not added.serves(found):
                yield name, added.refusal(found)
        if added.fixed and any(isinstance(p, Allocator) for p in own):
            yield "penalty", f"{added!r} settles which groups of factors stay, and {allocator!r} changes the factors"


def has_pairs(method: Method) -> bool:
    """Whether its update is made of products of two factors, as far as can be told without a model."""
    try:
        site = Site("layer", Outline((64, 64), torch.float32), (64, 64), torch.float32, torch.device("meta"))
        return method.products(method.init(site)) is not None
    except (ValueError, LookupError, TypeError, RuntimeError):  # it does not fit such a layer: the model will tell
        return True
