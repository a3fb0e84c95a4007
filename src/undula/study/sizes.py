"""Budgets: a method at another rank, and the rank at which it has a given number of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..core.method import Method
from ..host.views import outline

Shapes = Mapping[str, tuple[int, int]]
SLACK = 0.25  # an arm whose number of parameters is off by more than this share is rejected


def at_rank(method: Method, r: int) -> Method | None:
    """`method` with rank r and alpha in proportion (so that alpha / r stays); a wrapper with its inner method so.
    None where a method has no rank."""
    return _resized(method, lambda m: "r", r)


def at_size(method: Method, n: int) -> Method | None:
    """`method` with n in the field that its number of parameters follows (`Method.size`); None where it has none."""
    return _resized(method, lambda m: m.size, n)


def _resized(method: Method, name_in: Callable[[Method], str], n: int) -> Method | None:
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    name = name_in(method)
    if isinstance(values.get(name), int):
        beside = [k for k in method.beside if name == method.size and values.get(k) is not None]
        in_proportion = {k: _like(values[k], values[k] * n / values[name]) for k in beside}
        return dataclasses.replace(method, **{name: n}, **in_proportion)  # type: ignore[type-var]
    for field, inner in values.items():
        if isinstance(inner, Method) and (resized := _resized(inner, name_in, n)) is not None:
            return dataclasses.replace(method, **{field: resized})  # type: ignore[type-var]
    return None


def _like(old: float, new: float) -> float:
    return max(1, round(new)) if isinstance(old, int) else new


def _sized(method: Method) -> Method | None:
    """The method that `at_size` would change: this one, or one inside it."""
    values = [getattr(method, f.name) for f in dataclasses.fields(method)]  # type: ignore[arg-type]
    if isinstance(getattr(method, method.size, None), int):
        return method
    return next((found for v in values if isinstance(v, Method) and (found := _sized(v)) is not None), None)


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

    Raises ValueError where that is no closer than a quarter; a method without such a size must fit as it is.
    """
    sized = _sized(method)
    if sized is None:
        return _close_enough(method, count(method, shapes), wanted)

    def having(n: int) -> Method:
        resized = at_size(method, n)
        assert resized is not None
        return resized

    n = _closest(lambda n: count(having(n), shapes), wanted, sized.most(shapes))
    return _close_enough(having(n), count(having(n), shapes), wanted)


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
