"""The fields of the dataclasses that say how is trained (see `recipe`): what is known of one, order, defaults, types,
values in files."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, Field, field, fields
from typing import Any

import torch

from ..core.choice import from_json
from ..core.given import hints, within

DATA, LAYERS, TRAINING, EVALUATION, OUTPUT = PANELS = (
    *("Model, data and task", "Method and layers", "Training", "Evaluation", "Run and output"),
)


def facts(
    help: str,
    *,
    flag: str | None = None,
    options: str | None = None,
    layers: bool = False,
    figures: bool = True,
    offered: bool = True,
    panel: str | None = None,
    word: str | None = None,
) -> dict[str, Any]:
    """What is known of a field beside its name, type and default.

    help: what the command line says of it; `{names}` are the members of its family.
    flag: its option, where that is not called as it is; options: that of its own options, where it is a choice.
    layers: of the layers that a method adapts, so without a method it does nothing.
    figures: whether it can change what comes out; offered: whether people may set it.
    panel: under which title the help shows it; None: that of the layers, or of the training.
    word: what may stand for it in the place of a number.
    """
    return {**locals(), "panel": panel or (LAYERS if layers else TRAINING)}


def option(default: Any, help: str, **more: Any) -> Any:
    """A field with a default; see `facts`."""
    return field(default=default, metadata=facts(help, **more))


def told(kind: type) -> list[Field[Any]]:
    """The fields in the order in which they are told: what has to be said first."""
    return sorted(fields(kind), key=lambda f: f.kw_only is True)


def default_of(f: Field[Any]) -> Any:
    """The default of a field; MISSING where it has none."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def decoded(kind: type, name: str, value: Any, where: str) -> Any:
    """The value of a field that is written as JSON or TOML values; numbers stay as they are, and are checked where the
    recipe is made.  Raises LookupError or ValueError that names `where`."""
    hint = bare(hints(kind)[name])
    return value if hint in (int, float, torch.dtype) else from_json(value, hints(kind)[name], where)


def bare(hint: Any) -> Any:
    """A type without its range and without None."""
    hint, _ = within(hint)
    kinds = [k for k in typing.get_args(hint) if k is not type(None)] if is_union(hint) else [hint]
    return within(kinds[0])[0] if len(kinds) == 1 else hint


def is_union(hint: Any) -> bool:
    """Whether it is one of several types."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
