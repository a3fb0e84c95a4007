"""From any adapter to a plain LowRank one, with the error that it costs."""

from ..kernels.solver import Exact, Randomised, Solver
from .approximation import Approximation, Fit, Substitute, Truncate
from .collapse import Collapsed, collapse
from .least_squares import LeastSquares

__all__ = [
    "Approximation",
    "Collapsed",
    "Exact",
    "Fit",
    "LeastSquares",
    "Randomised",
    "Solver",
    "Substitute",
    "Truncate",
    "collapse",
]
