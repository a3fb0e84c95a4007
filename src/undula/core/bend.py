"""What a nonlinear method tells of its nonlinearity (`Method.bend`), for whoever measures how much there is of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Elementwise:
    """In weight space: the update is s f(u), entry by entry, of a matrix u (O, I).

    `start` is (f, u) of a start that is counted out (`Centred`).  Where `about_u`, f(u) is u and a bend beside it;
    otherwise the best line through the origin is what the bend is counted from.  `swing` is how far the slope of f
    swings at the largest |u|, `swing_of` its formula, `advice` how to make the bend visible to narrow types.
    """

    f: Function
    u_OI: Tensor
    start: tuple[Function, Tensor] | None = None
    about_u: bool = False
    swing: float | None = None
    swing_of: str = ""
    advice: str = ""

    def since(self, begun: Self) -> Self:
        """The same, counted from a start."""
        return replace(self, start=(begun.f, begun.u_OI))


@dataclass(frozen=True)
class Bottleneck:
    """Between A and B: sigma (..., R) -> (..., R).

    z_TR are the points at which it is taken, where the weights alone tell them; otherwise it is taken at A x of the
    layer's inputs x.  `low` and `high` bound the interval it is made for.
    """

    sigma: Function
    z_TR: Tensor | None = None
    A_RI: Tensor | None = None
    low: float = float("-inf")
    high: float = float("inf")

    def since(self, begun: Self) -> Self:
        """The same: what is subtracted does not change where it bends."""
        return self


Bend = Elementwise | Bottleneck
