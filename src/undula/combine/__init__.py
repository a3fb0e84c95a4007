"""Several adapters as one: weighted sums and averages."""

from .weighted import combined

__all__ = ["combined"]
