"""How a training step is taken: what puts its rows together, and what makes its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .labelled import Head


@dataclass(frozen=True)
class Step:
    """Of each part None: as the task and the model do it by themselves.

    gather: puts examples into a batch; head: the losses of the labels that count.
    """

    gather: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None
    head: Head | None = None
