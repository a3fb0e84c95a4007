"""Heads that read the first token of a row, on rows that stand behind each other in one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .segments import LENGTHS


def firsts(states: Tensor) -> Tensor:
    """(1, T, d) -> (rows, 1, d): of each segment the first token; other states, outside of `segments`, as they are."""
    lengths = LENGTHS.get()
    if lengths is None:
        return states
    return torch.stack([segment[0] for segment in states[0].split(lengths)])[:, None]


@contextlib.contextmanager
def first_tokens(model: Any) -> Iterator[None]:
    """Within, the pooler of the model's body, or where it has none its head, is given first tokens alone."""
    body: nn.Module = model.base_model
    pooler = getattr(body, "pooler", None)
    if isinstance(pooler, nn.Module):
        heard: Any = pooler.register_forward_pre_hook(lambda module, given: (firsts(given[0]), *given[1:]))
    else:
        heard = body.register_forward_hook(_cut)
    try:
        yield
    finally:
        heard.remove()


def _cut(module: nn.Module, given: Any, found: Any) -> Any:
    if LENGTHS.get() is None:
        return found
    if isinstance(found, tuple):
        return (firsts(found[0]), *found[1:])
    found["last_hidden_state"] = firsts(found["last_hidden_state"])
    return found
