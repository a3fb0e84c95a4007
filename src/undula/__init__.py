"""undula: low-rank adaptation of PyTorch models, with nonlinear adapters at its core.

An adapter is a value; a method is a law W -> W'.
"""

from . import io
from .adapter import Adapter
from .host import adapters, attach, detach, merge, rows, select, selected, unmerge
from .method import Additive, Layer, LowRank, Method, Reweight, Site
from .methods.aurora import AuroRA, AuroRAStatic
from .methods.centred import Centred
from .methods.dora import DoRA
from .methods.dropout import Dropout
from .methods.lora import LoRA, RankStabilised
from .methods.loran import LoRAN, LoRANActivation, SineLoRA
from .methods.sum import Sum

__version__ = "0.1.0"
