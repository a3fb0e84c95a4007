"""One file, one procedure: allocators (who gets how much rank, when), restarts, penalties.  Importing this package
registers them all."""

from .adalora import AdaLoRA
from .allocator import Allocator
from .alora import ALoRA
from .budget import Budget
from .diffora import DiffoRA
from .dylora import DyLoRA
from .gates import live
from .insqueeze import InSqueeze
from .l2sp import L2SP
from .lorasc import LoRASC
from .procedure import Course, Procedure, Quality
from .relora import ReLoRA
from .sora import SoRA
from .srlora import SRLoRA
from .together import Together
from .xgblora import XGBLoRA

__all__ = [
    "L2SP",
    "ALoRA",
    "AdaLoRA",
    "Allocator",
    "Budget",
    "Course",
    "DiffoRA",
    "DyLoRA",
    "InSqueeze",
    "LoRASC",
    "Procedure",
    "Quality",
    "ReLoRA",
    "SRLoRA",
    "SoRA",
    "Together",
    "XGBLoRA",
    "live",
]
