"""One file, one allocator: who gets how much rank, when.  Importing this package registers them all."""

from typing import TYPE_CHECKING

from .adalora import AdaLoRA
from .allocator import Allocator, Course, Quality
from .alora import ALoRA
from .budget import Budget
from .diffora import DiffoRA
from .dylora import DyLoRA
from .gates import live
from .lorasc import LoRASC
from .relora import ReLoRA
from .sora import SoRA
from .srlora import SRLoRA
from .xgblora import XGBLoRA

__all__ = [
    "ALoRA",
    "AdaLoRA",
    "Allocator",
    "Budget",
    "Course",
    "DiffoRA",
    "DyLoRA",
    "LoRASC",
    "Quality",
    "ReLoRA",
    "SRLoRA",
    "SoRA",
    "XGBLoRA",
    "live",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Allocator]:
        """Allocators of other packages by their names."""
        for allocator in Allocator.registry.values():
            if allocator.__name__ == name:
                return allocator
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
