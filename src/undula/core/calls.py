"""Calls that do not fit a function, told in words that say how it is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .given import no_option

P = ParamSpec("P")
T = TypeVar("T")


def called(usage: str, **hints: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """The same function; a call that does not fit it raises a TypeError that says `usage`, how it is called, and of a
    name that others have for an option (`hints`) what is meant."""

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                signature.bind(*args, **kwargs)
            except TypeError:
                raise TypeError(_told(function, signature, args, kwargs, usage, hints)) from None
            return function(*args, **kwargs)

        return wrapped

    return decorated


def _told(
    function: Callable, signature: inspect.Signature, args: tuple, kwargs: dict, usage: str, hints: dict[str, str]
) -> str:
    name, parameters = function.__name__, signature.parameters
    unknown = [k for k in kwargs if k not in parameters]
    without = [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if unknown:
        said = no_option(name, unknown, parameters)
        said += "".join(f". {hints[k]}" for k in unknown if k in hints)
    elif len(args) > len(without):
        rest = ", ".join(p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY)
        said = f"{name} takes {', '.join(without)} in this order, and by their names {rest or 'nothing more'}"
    else:
        given = {*without[: len(args)], *kwargs}
        missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in given]
        twice = [k for k in without[: len(args)] if k in kwargs]
        said = f"{name} needs {', '.join(missing)}" if missing else f"{name}: {', '.join(twice)} is given twice"
    return f"{said}. It is called like this: {usage}"
