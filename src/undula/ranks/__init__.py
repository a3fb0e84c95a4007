"""One file, one allocator: who gets how much rank, when.  Importing this package registers them all."""

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
