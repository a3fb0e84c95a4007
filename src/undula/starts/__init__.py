"""Where training begins.  One file, one start."""

from .eva import EVA, explained
from .loraga import (
    A2rBr,
    ArB2r,
    ArBr,
    Directions,
    FullStep,
    LoRAGA,
    Magnitude,
    OfWeight,
    Shuffled,
    Stable,
    Unit,
)
from .lorasb import LoRASB
from .milora import MiLoRA
from .olora import OLoRA
from .orthogonal import Orthogonal
from .pissa import PiSSA
from .start import Gaussian, Kaiming, Start

__all__ = [
    "EVA",
    "A2rBr",
    "ArB2r",
    "ArBr",
    "Directions",
    "FullStep",
    "Gaussian",
    "Kaiming",
    "LoRAGA",
    "LoRASB",
    "Magnitude",
    "MiLoRA",
    "OLoRA",
    "OfWeight",
    "Orthogonal",
    "PiSSA",
    "Shuffled",
    "Stable",
    "Start",
    "Unit",
    "explained",
]
