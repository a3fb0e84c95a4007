"""How a training step is taken: what puts its rows together, and what makes its loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...observe.listen import moved
from .between import one_pass
from .firsts import first_tokens
from .labelled import CLOSE, HALF_CLOSE, NOT_TAKEN, Head
from .lending import evaluating
from .packing import Flat
from .segments import kept_apart, segments, served

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EQUAL = 1e-5  # of the answers' size: of the same products of the same numbers, to the bit on most machines
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
    why = []
    for gather in gathers if served(model) else ():
        found = _mixed(model, gather, padded, around, rows)
        if found is None:
            return Step(gather, around=around)
        why.append(found)
    other = f"the attention of {type(model).__name__} is none that takes rows one by one"
    return Step(note=f"rows are padded to the longest of their batch: {[*why, other][0]}")


@torch.no_grad()
def _mixed(model: PreTrainedModel, gather: Flat, padded: Gather, around: Around, rows: list[Any]) -> str | None:
    """Why these rows cannot be one for this model; None where they can.

    What a row answers must be the same to the bit, but for rounding, whatever the others are, and with the positions
    that the model counts by itself: both are the same products of the same numbers, so that a slight influence shows
    in half precision too.  That the answers are those of the row alone is seen as exactly as other products round."""
    name, device = type(model).__name__, model.device
    longest = sorted(rows, key=lambda row: -len(row["input_ids"]))
    try:
        with evaluating(model), around(model):
            batch = moved(gather(rows), device)
            lengths = batch.pop("segments")
            with segments(lengths):
                together = _answers(model, batch)
                others = [_answers(model, {**batch, "input_ids": ids}) for ids in _changed(batch["input_ids"], lengths)]
            first = moved(gather(longest[:1]), device)
            with segments(first.pop("segments")):
                placed = _answers(model, first)
                counted = _answers(model, {k: v for k, v in first.items() if k != "position_ids"})
        with evaluating(model):  # as a plain step has it
            single = [_answers(model, moved(padded([row]), device)) for row in longest]
    except NOT_TAKEN:
        return f"{name} takes no row of several"
    alone = [torch.cat(each) for each in zip(*single, strict=True)]
    if [t.shape for t in together] != [t.shape for t in alone]:
        return f"{name} answers a row of several as if it were one"
    if (off := _off(placed, counted)) > EQUAL:
        return f"{name} counts positions in another way (by {off:.2g})"
    for which, other in enumerate(others):
        kept = [_every_second(t, lengths, 1 - which) for t in (other, together)]
        if (off := _off(*kept)) > EQUAL:
            return f"in {name} they would see each other (by {off:.2g})"
    off, most = _off(together, alone), CLOSE if alone[0].dtype in (torch.float32, torch.float64) else HALF_CLOSE
    return None if off <= most else f"in {name} they would see each other (by {off:.2g})"


def _answers(model: PreTrainedModel, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """Logits and hidden states, each (rows or tokens, numbers): a head may say of all rows the same."""
    given = {k: v for k, v in batch.items() if k not in ("labels", "kept", "targets")}
    found = model(**given, output_hidden_states=True)
    states = [t for t in found.hidden_states or () if t.shape[:2] == batch["input_ids"].shape]
    return [t.flatten(0, -2) for t in (found.logits, *states)]


def _changed(ids: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """The row of segments with other tokens in every second of them, from the first and from the next on."""
    odd = torch.cat([ids.new_full((n,), i % 2) for i, n in enumerate(lengths)])[None]
    return [torch.where(odd == which, ids.roll(1), ids) for which in (0, 1)]


def _every_second(answers: list[torch.Tensor], lengths: Sequence[int], first: int) -> list[torch.Tensor]:
    """Of every second segment the answers."""
    sizes = [list(lengths) if len(t) == sum(lengths) else [1] * len(lengths) for t in answers]
    return [torch.cat(t.split(each)[first::2]) for t, each in zip(answers, sizes, strict=True)]


def _off(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference, of the size of what is wanted; infinite where there is none to be told."""
    pairs = [(float((a - b).abs().max()), float(b.abs().max())) for a, b in zip(found, wanted, strict=True)]
    return max(float("inf") if math.isnan(off) else off / max(size, 1e-30) for off, size in pairs)


@contextlib.contextmanager
def apart_in_one_pass(model: Any) -> Any:
    """Rows are kept apart, and what is between products takes one pass."""
    with kept_apart(model), one_pass(model):
        yield


@contextlib.contextmanager
def apart_with_firsts(model: Any) -> Any:
    """The same, and a head reads the first token of each."""
    with apart_in_one_pass(model), first_tokens(model):
        yield
