"""Batches of several who ask, in one: padded to the longest, and cut again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
TYPES = "token_type_ids"


def width(inputs: Inputs) -> int:
    """How many places a row has; 1 where it has none."""
    ids = inputs.get("input_ids")
    return 1 if ids is None else ids.shape[1]


def kind(inputs: Inputs, processor: Any) -> tuple[Any, ...]:
    """Equal for batches that can be one: the same inputs, of the same sizes but for what can be padded, with the same
    padding.  Where token types are not told they are 0, which is what models take then."""
    whole = "attention_mask" not in inputs
    shapes = [
        (k, t.dtype, tuple(t.shape[1:]) if whole or not _of_tokens(t, inputs) else "T")
        for k, t in inputs.items()
        if k != TYPES
    ]
    return tuple(sorted(shapes, key=lambda s: s[0])), _side(processor), *_pads(processor).values()


def together(every: Sequence[Inputs], processor: Any) -> dict[str, Tensor]:
    """One batch of those of one kind."""
    longest, pads, left = max(map(width, every)), _pads(processor), _side(processor) == "left"

    def padded(name: str, t: Tensor, inputs: Inputs) -> Tensor:
        lacking = longest - t.shape[1] if _of_tokens(t, inputs) else 0
        if not lacking:
            return t
        return torch.nn.functional.pad(t, (lacking, 0) if left else (0, lacking), value=pads.get(name, 0))

    if any(TYPES in inputs for inputs in every):
        every = [{TYPES: torch.zeros_like(inputs["input_ids"]), **inputs} for inputs in every]
    return {name: torch.cat([padded(name, i[name], i) for i in every]) for name in every[0]}


def cut(t: Tensor, to: int, processor: Any) -> Tensor:
    """An output (rows, places, ...) without the places that padding took."""
    return t[:, t.shape[1] - to :] if _side(processor) == "left" else t[:, :to]


def _of_tokens(t: Tensor, inputs: Inputs) -> bool:
    ids = inputs.get("input_ids")
    return ids is not None and t.shape == ids.shape


def _side(processor: Any) -> str:
    return str(getattr(processor, "padding_side", "right"))


def _pads(processor: Any) -> dict[str, int]:
    return {
        "input_ids": int(getattr(processor, "pad_token_id", None) or 0),
        TYPES: int(getattr(processor, "pad_token_type_id", None) or 0),
    }
