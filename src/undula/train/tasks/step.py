"""How a training step is taken: what puts its rows together, and what makes its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...observe.listen import moved
from .firsts import first_tokens
from .labelled import CLOSE, HALF_CLOSE, NOT_TAKEN, Head
from .lending import evaluating
from .packing import Flat
from .segments import kept_apart, segments, served

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Gather = Callable[[list[dict[str, Any]]], Mapping[str, Any]]
Around = Callable[[Any], AbstractContextManager[None]]  # of the model, for as long as it trains


def as_it_is(model: Any) -> AbstractContextManager[None]:
    """Nothing about the model changes."""
    return nullcontext()


@dataclass(frozen=True)
class Step:
    """Of each part None: as the task and the model do it by themselves.

    gather: puts examples into a batch; `segments` in it is for `segments.segments`, and no input of the model.
    head: the losses of the labels that count.
    around: what the model is put into for as long as it trains.
    note: a sentence on what could not be had.
    """

    gather: Gather | None = None
    head: Head | None = None
    around: Around = as_it_is
    note: str | None = None


def packed(model: PreTrainedModel, gathers: Sequence[Flat], padded: Gather, around: Around, rows: list[Any]) -> Step:
    """Steps of rows without padding, by the first of `gathers` by which this model keeps rows apart; else of padded
    ones, with a note.  Seen by the model's answers to a few short rows in one, and to each by itself."""
    why = f"the attention of {type(model).__name__} is none that takes rows one by one"
    if served(model):
        for gather in gathers:
            found = _mixed(model, gather, padded, around, rows)
            if found is None:
                return Step(gather, around=around)
            why = found
    return Step(note=f"rows are padded to the longest of their batch: {why}")


@torch.no_grad()
def _mixed(model: PreTrainedModel, gather: Flat, padded: Gather, around: Around, rows: list[Any]) -> str | None:
    """Why these rows cannot be one for this model; None where they can."""
    name, device = type(model).__name__, model.device
    try:
        with evaluating(model), around(model):
            batch = moved(gather(rows), device)
            lengths = batch.pop("segments")
            with segments(lengths):
                together = _answers(model, batch)
            longest = sorted(rows, key=lambda row: -len(row["input_ids"]))
            alone = torch.cat([_answers(model, moved(padded([row]), device)) for row in longest])
    except NOT_TAKEN:
        return f"{name} takes no row of several"
    if together.shape != alone.shape:
        return f"{name} answers a row of several as if it were one"
    most = CLOSE if alone.dtype in (torch.float32, torch.float64) else HALF_CLOSE
    off, size = float((together - alone).abs().max()), float(alone.abs().max())
    return None if off <= most * size else f"in {name} they would see each other (by {off / max(size, 1e-30):.2g})"


def _answers(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """(rows or tokens, outputs)."""
    return model(**{k: v for k, v in batch.items() if k not in ("labels", "kept", "targets")}).logits.flatten(0, -2)


@contextlib.contextmanager
def apart_with_firsts(model: Any) -> Any:
    """Rows are kept apart, and a head reads the first token of each."""
    with kept_apart(model), first_tokens(model):
        yield
