"""undula: low-rank adaptation of PyTorch models, with nonlinear adapters at its core.

An adapter is a value; a method is a law W -> W'.
"""

from typing import Any

from . import bundled, io, ranks, study, train
from .adapter import Adapter
from .compress import Collapsed, LeastSquares, Substitute, Truncate, collapse
from .diagnose import diagnose
from .groups import loraplus_groups
from .host import adapters, attach, detach, rows, select, selected
from .merging import merge, unmerge
from .method import Additive, Layer, LowRank, Method, Reweight, Site
from .methods.aurora import AuroRA, AuroRAStatic
from .methods.centred import Centred
from .methods.dora import DoRA
from .methods.dropout import Dropout
from .methods.lora import LoRA, RankStabilised
from .methods.loran import LoRAN, LoRANActivation, SineLoRA
from .methods.sum import Sum
from .probe import Probe
from .ranks.prune import prune
from .switching import Switch
from .train import Run, evaluate

__all__ = [
    "Adapter",
    "Additive",
    "AuroRA",
    "AuroRAStatic",
    "Centred",
    "Collapsed",
    "DoRA",
    "Dropout",
    "Layer",
    "LeastSquares",
    "LoRA",
    "LoRAN",
    "LoRANActivation",
    "LowRank",
    "Method",
    "Probe",
    "RankStabilised",
    "Reweight",
    "Run",
    "SineLoRA",
    "Site",
    "Substitute",
    "Sum",
    "Switch",
    "Truncate",
    "adapters",
    "attach",
    "bundled",
    "collapse",
    "detach",
    "diagnose",
    "evaluate",
    "io",
    "loraplus_groups",
    "merge",
    "prune",
    "ranks",
    "rows",
    "select",
    "selected",
    "study",
    "train",
    "unmerge",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Every method by its name; `peft_config`, `enable_peft` and `allocating` import PEFT or transformers when they are
    first asked for."""
    for method in Method.registry.values():
        if method.__name__ == name:
            return method
    if name in ("peft_config", "enable_peft"):
        from .integrations import peft

        return getattr(peft, name)
    if name == "allocating":
        from .integrations.allocating import Allocating

        return Allocating
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
