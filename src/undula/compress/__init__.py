"""Smaller and plainer adapters, with the error that it costs.  What `squeeze` and `quantise` need is loaded when they
are called."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..kernels.solver import Exact, Randomised, Solver
from .approximation import Approximation, Fit, Substitute, Truncate
from .collapse import Collapsed, collapse
from .least_squares import LeastSquares

if TYPE_CHECKING:
    from collections.abc import Callable

    from .quantising import Quantised, quantise_directory
    from .squeezing import Squeezed, squeeze_directory
    from .targets import ByBudget, ByEnergy, ByError, ByRank, BySize, Target

__all__ = [
    "Approximation",
    "ByBudget",
    "ByEnergy",
    "ByError",
    "ByRank",
    "BySize",
    "Collapsed",
    "Exact",
    "Fit",
    "LeastSquares",
    "Quantised",
    "Randomised",
    "Solver",
    "Squeezed",
    "Substitute",
    "Target",
    "Truncate",
    "collapse",
    "quantise",
    "quantise_directory",
    "squeeze",
    "squeeze_directory",
]
LATER = dict.fromkeys(("Quantised", "quantise_directory"), "quantising")
LATER |= dict.fromkeys(("Squeezed", "squeeze_directory"), "squeezing")
LATER |= dict.fromkeys(("ByBudget", "ByEnergy", "ByError", "ByRank", "BySize", "Target"), "targets")


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(importlib.import_module(f"{__name__}.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def squeeze(
    adapter: Adapter,
    target: Target,
    *,
    solver: Solver = Randomised(),
    seen: Callable[[str], object] | None = None,
) -> Squeezed:
    """An adapter of less rank, its update as near to this one's as that rank allows, and what that costs.

        undula.squeeze(adapter, undula.compress.ByRank(4)).adapter.save("small")

    target: `ByRank`, `ByEnergy`, `ByError` (at each site), `ByBudget` (ranks of all sites together), `BySize` (bytes
    on disk).  Needs no model and no data.  Every site becomes a plain LoRA with alpha = r and balanced factors,
    B'B = A A'; of DoRA and dropout the method inside does, and their own part stays.  Parameters in full stay as they
    are; sites that share their factors go on sharing them.

    On the rung LowRank it is exact and never forms an O x I matrix: a QR of each factor and the SVD of an R x R core,
    in float64.  Other Additive methods (LoRAN, SHiRA, sums) go through `solver` a block of rows at a time.  `seen` is
    told each site that is done.  Raises TypeError, naming the site, below the Additive rung (`collapse` serves it),
    ValueError for NaN in a factor and for a target that cannot be met.  Source: Vulic et al. 2026, arXiv:2602.10993.
    """
    from .squeezing import squeeze

    return squeeze(adapter, target, solver=solver, seen=seen)


def quantise(
    adapter: Adapter, bits: int = 8, *, group: int = 64, seen: Callable[[str], object] | None = None
) -> Quantised:
    """An adapter whose files hold integers of 8 or 4 bits in groups that share a scale, and what that costs.

        undula.quantise(adapter, 8).save("half")

    Half and a quarter of what 16 bits take.  The large factors of every method are rounded, each to its nearest; small
    ones (gates, DoRA's magnitudes) and parameters in full stay as they are.  Reading makes numbers of the integers, so
    that the directory is loaded, attached, served, merged and exported as any other, and what is saved from there holds
    numbers again.  The form: `undula.io.packing`.  Raises ValueError, naming the site, for NaN in a factor.
    """
    from .quantising import quantise

    return quantise(adapter, bits, group, seen)
