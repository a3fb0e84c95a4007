"""What a directory has to be so that a pool takes it, told from its configuration and the header of its tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..core.adapter import Adapter
from ..core.method import Additive
from ..host.frame import Frame
from ..io.outline import Head


@dataclass(eq=False)
class Form:
    """What adapters with equal methods, sites, shapes and types have in common; one object for all of them."""

    method: str  # of most sites
    rank: int | None
    bytes: int  # that it takes in memory: of its tensors, until the first was read and what it takes is known
    beside: int  # those of them that are not on the model
    lacking: str | None  # what in it has no update dW that could be scaled or added; None where all of it has
    full: tuple[str, ...]  # parameters that it trained in full


class Heads(Protocol):
    """What takes care of what adapters hold beside the layers of the model: see `heads.Body`."""

    def part(self, path: Path, adapter: Adapter) -> Adapter:
        """The part of an adapter (or of its outline) that goes onto the model, its layers called as there.  Raises
        ValueError for what has no place."""

    def wear(self, path: Path, adapter: Adapter) -> tuple[Adapter, Any]:
        """(that part, whatever is kept beside it)."""


class Forms:
    """The forms that were seen, and whether they fit one model.

    A thousand adapters of one recipe are looked at once.  `bases` are the names by which adapters may call the model
    that they are for; none: any."""

    def __init__(self, frame: Frame, bases: Collection[str], dtype: torch.dtype | None, heads: Heads | None):
        self.frame, self.bases, self.dtype, self.heads = frame, tuple(bases), dtype, heads
        self.seen: dict[bytes, Form] = {}

    def of(self, found: Head) -> Form:
        """Raises ValueError, TypeError or LookupError for what is malformed or does not fit."""
        self._check_base(found)
        key = found.form()
        if key not in self.seen:
            outline = found.outline()
            try:
                self._check_full(outline)
                here = outline if self.heads is None else self.heads.part(found.path, outline)
                self.seen[key] = form_of(outline, self.frame.check(here, self.dtype), _beside(outline, here))
            except (ValueError, TypeError) as error:
                raise type(error)(f"{found.path} does not fit the model: {error}") from error
        return self.seen[key]

    def _check_base(self, found: Head) -> None:
        from ..train.base import same_base

        if self.bases and found.base is not None and not any(same_base(base, found.base) for base in self.bases):
            raise ValueError(
                f"{found.path} says that it is for {found.base!r:.120}; the model here is {' or '.join(self.bases)}. "
                "If that is the same model by another name, give that name too (`bases`; --base-also of `undula serve`)"
            )

    def _check_full(self, outline: Adapter) -> None:
        if outline.full and self.heads is None:
            raise ValueError(
                f"it holds {', '.join(list(outline.full)[:3])} in full, and a batch of several adapters has one model "
                "with one head. Train it without `full`, or merge it"
            )
        if not outline.factors:
            raise ValueError("it has no factors: nothing of it acts on single rows of a batch")


def _beside(whole: Adapter, here: Adapter) -> int:
    """The bytes of what an adapter holds beside a part of it."""
    every = [*(t for _, _, t in whole.tensors()), *whole.full.values()]
    mine = {id(t) for t in (*(t for _, _, t in here.tensors()), *here.full.values())}
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in every if id(t) not in mine}.values())


def form_of(outline: Adapter, size: int, beside: int) -> Form:
    """The form of an adapter that takes so many bytes on the model and beside it."""
    below = {s: m for s, m in outline.methods.items() if not isinstance(m, Additive)}
    lacking = None
    if below:
        site, method = next(iter(below.items()))
        lacking = f"{method!r} at {site} stands on the rung {method.rung()}"
    rank = getattr(outline.method.unwrapped(), "r", None)
    rank = rank if isinstance(rank, int) else None
    return Form(repr(outline.method), rank, size + beside, beside, lacking, tuple(outline.full))
