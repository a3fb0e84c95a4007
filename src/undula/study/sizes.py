"""Budgets: a method at another rank, and the rank at which it has a given number of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..method import Method
from ..sites import outline

Shapes = Mapping[str, tuple[int, int]]
SLACK = 0.25  # an arm that misses an equal-parameter budget by more than this share cannot be part of it


def at_rank(method: Method, r: int) -> Method | None:
    """`method` with rank r and alpha in proportion (so that alpha / r stays); a wrapper with its inner method so.
    None where a method has no rank."""
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    if isinstance(values.get("r"), int):
        alpha = values.get("alpha")
        changes: dict[str, Any] = {"r": r} | ({"alpha": alpha * r / values["r"]} if alpha is not None else {})
        return dataclasses.replace(method, **changes)  # type: ignore[type-var]
    for name, inner in values.items():
        if isinstance(inner, Method) and (resized := at_rank(inner, r)) is not None:
            return dataclasses.replace(method, **{name: resized})  # type: ignore[type-var]
    return None


def count(method: Method, shapes: Shapes) -> int:
    """How many numbers `method` trains on sites of these shapes (O, I).  Nothing is allocated."""
    shared: dict[Any, Any] = {}
    trained: dict[int, torch.Tensor] = {}  # holds the tensors, so that no id is used twice
    for name, shape in shapes.items():
        made = method.init(dataclasses.replace(outline(name, shape), shared=shared, peers=shapes))
        trained |= {id(t): t for t in made.values() if t.requires_grad}
    return sum(t.numel() for t in trained.values())


def with_parameters(method: Method, wanted: int, shapes: Shapes) -> Method:
    """`method` at the rank that brings it closest to `wanted` parameters.

    Raises ValueError where it has no rank, or comes no closer than a quarter.
    """
    most = max(min(shape) for shape in shapes.values())
    if at_rank(method, 1) is None:
        return _close_enough(method, count(method, shapes), wanted)

    def having(r: int) -> int:
        resized = at_rank(method, r)
        assert resized is not None
        return count(resized, shapes)

    r = _closest(having, wanted, most)
    resized = at_rank(method, r)
    assert resized is not None
    return _close_enough(resized, having(r), wanted)


def _close_enough(method: Method, found: int, wanted: int) -> Method:
    if abs(found - wanted) > SLACK * wanted:
        raise ValueError(f"the closest that it comes to {wanted:,} parameters is {found:,} ({method!r})")
    return method


def _closest(having: Callable[[int], int], wanted: int, most: int) -> int:
    """The r in 1..most whose `having(r)`, which never falls, is closest to `wanted`; the smaller of two."""
    low, high = 1, most
    while low < high:  # the first r that has at least as many
        middle = (low + high) // 2
        low, high = (low, middle) if having(middle) >= wanted else (middle + 1, high)
    below = max(low - 1, 1)
    return below if abs(having(below) - wanted) <= abs(having(low) - wanted) else low
