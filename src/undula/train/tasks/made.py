"""Examples that were made, kept for the next epoch: a row is tokenised once."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

NUMBERS = 2**24  # that a set of rows keeps: 64 MB of tokens
Kept = dict[str, Any]


class Made:
    """Those that are numbers and lists of numbers, as of texts; of pictures and sounds, which are large, none."""

    def __init__(self) -> None:
        self.kept: dict[int, Kept] = {}
        self.room = NUMBERS

    def keep(self, i: int, example: Mapping[str, Any]) -> None:
        """As long as there is room."""
        size = sum(len(v) if isinstance(v, list) else 1 for v in example.values())
        if i in self.kept or size > self.room:
            return
        packed = {name: _packed(value) for name, value in example.items()}
        if None not in packed.values():
            self.kept[i] = packed
            self.room -= size

    def get(self, i: int) -> Kept | None:
        """A copy, which is the caller's; None of one that is not kept."""
        found = self.kept.get(i)
        return None if found is None else {k: v.tolist() if isinstance(v, array) else v for k, v in found.items()}


def _packed(value: Any) -> Any:
    """A number as it is, numbers in an array, None for anything else."""
    if not isinstance(value, list):
        return value if type(value) in (int, float) else None
    kinds = {type(n) for n in value}
    if kinds <= {int} and all(-(2**31) <= n < 2**31 for n in value):
        return array("i", value)
    return array("d", value) if kinds == {float} else None
