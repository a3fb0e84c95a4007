"""Which layers of a model are stored in 4-bit groups."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def layers_of(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The layers that can be stored so: `nn.Linear` ones, but for heads (what stands beside the base model, and the
    output head) and those excluded (a name, its end, or a glob).  Raises ValueError for a model with adapters, without
    such layers, or with one whose weight stands at two places."""
    if "_undula" in model.__dict__:
        raise ValueError("adapters are attached to this model: compress the base first, then attach")
    head_of: Any = getattr(model, "get_output_embeddings", lambda: None)
    head, inside = head_of(), _base_of(model)
    found = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head and n.startswith(inside)}
    for pattern in exclude:
        hit = [n for n in found if n == pattern or n.endswith(f".{pattern}") or fnmatch.fnmatchcase(n, pattern)]
        if not hit:
            raise ValueError(
                f"exclude: {pattern!r} matches none of the {len(found)} layers: {', '.join(list(found)[:5])}, ..."
            )
        found = {n: m for n, m in found.items() if n not in hit}
    if not found:
        raise ValueError(f"{type(model).__name__} has no nn.Linear layers left to compress (GPT-2's are Conv1D)")
    _check_alone(model, found)
    return found


def _base_of(model: nn.Module) -> str:
    """What the names of its layers begin with, but for a head's."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _check_alone(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Raises ValueError for a layer whose weight stands in the model under another name too."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for name, layer in layers.items():
        if others := [n for n in names[id(layer.weight)] if n != f"{name}.weight"]:
            raise ValueError(f"{name}: its weight is {others[0]} too, which would not follow: leave it out (exclude)")
