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
    return _with_field(method, lambda m: "r", r)


def at_size(method: Method, n: int) -> Method | None:
    """`method` with n in the field that its number of parameters follows (`Method.size`)."""
    return _with_field(method, lambda m: m.size, n)


def _with_field(method: Method, name_in: Callable[[Method], str], n: int) -> Method | None:
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    name, alpha = name_in(method), values.get("alpha")
    if isinstance(values.get(name), int):
        in_proportion = {"alpha": alpha * n / values[name]} if name == "r" and alpha is not None else {}
        return dataclasses.replace(method, **{name: n}, **in_proportion)  # type: ignore[type-var]
    for field, inner in values.items():
        if isinstance(inner, Method) and (resized := _with_field(inner, name_in, n)) is not None:
            return dataclasses.replace(method, **{field: resized})  # type: ignore[type-var]
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
    """`method` at the rank (or other size) that brings it closest to `wanted` parameters.

    Raises ValueError where it has none, or comes no closer than a quarter.
    """
    if at_size(method, 1) is None:
        return _close_enough(method, count(method, shapes), wanted)
    most = max(min(shape) for shape in shapes.values()) if method.size == "r" else wanted

    def having(n: int) -> int:
        resized = at_size(method, n)
        assert resized is not None
        return count(resized, shapes)

    n = _closest(having, wanted, most)
    resized = at_size(method, n)
    assert resized is not None
    return _close_enough(resized, having(n), wanted)


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
