"""Where training begins.  One file, one start."""

from .start import Gaussian, Kaiming, Start

__all__ = ["Gaussian", "Kaiming", "Start"]
