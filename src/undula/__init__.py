"""undula: low-rank adaptation of PyTorch models, with nonlinear adapters at its core.

An adapter is a value; a method is a law W -> W'.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import io, ranks, starts
from .compress import Collapsed, LeastSquares, Substitute, Truncate, collapse
from .core.adapter import Adapter
from .core.extras import told
from .core.method import (
    Additive,
    Layer,
    LowRank,
    Method,
    Reweight,
    Site,
)
from .host.host import adapters, attach, detach, select, selected
from .host.merging import merge, unmerge
from .host.mixing import rows
from .host.switching import Switch
from .methods import activations
from .methods.adalora import AdaLoRA
from .methods.aurora import AuroRA, AuroRAStatic
from .methods.blocklora import BlockLoRA
from .methods.centred import Centred
from .methods.dora import DoRA
from .methods.dropout import Dropout
from .methods.dylora import DyLoRA
from .methods.gated import GatedLoRA
from .methods.lora import LoRA, RankStabilised
from .methods.loran import LoRAN, LoRANActivation, SineLoRA
from .methods.lorasb import LoRASB
from .methods.loraxs import LoRAXS
from .methods.lorta import LoRTA
from .methods.nola import NOLA
from .methods.restarted import Restarted
from .methods.s2ft import S2FT
from .methods.s2lora import S2LoRA
from .methods.shira import SHiRA
from .methods.sora import SoRA
from .methods.sum import Sum
from .methods.tenslora import TensLoRA
from .methods.tera import TeRA
from .methods.unilora import UniLoRA
from .methods.vera import VeRA
from .observe.diagnose import diagnose
from .observe.probe import Probe
from .optim.groups import loraplus_groups
from .ranks.prune import prune

if TYPE_CHECKING:  # three packages are verbs too, which a checker sees as objects with a __call__
    from . import bundled
    from .integrations.allocating import Allocating
    from .integrations.peft import enable_peft as enable_peft
    from .integrations.peft import peft_config as peft_config
    from .methods import _Methods
    from .study import _Study
    from .train import Run, _Train, evaluate

    allocating = Allocating
    methods: _Methods
    study: _Study
    train: _Train
else:
    from . import methods

__all__ = [
    "NOLA",
    "S2FT",
    "AdaLoRA",
    "Adapter",
    "Additive",
    "AuroRA",
    "AuroRAStatic",
    "BlockLoRA",
    "Centred",
    "Collapsed",
    "DoRA",
    "Dropout",
    "DyLoRA",
    "GatedLoRA",
    "Layer",
    "LeastSquares",
    "LoRA",
    "LoRAN",
    "LoRANActivation",
    "LoRASB",
    "LoRAXS",
    "LoRTA",
    "LowRank",
    "Method",
    "Probe",
    "RankStabilised",
    "Restarted",
    "Reweight",
    "Run",
    "S2LoRA",
    "SHiRA",
    "SineLoRA",
    "Site",
    "SoRA",
    "Substitute",
    "Sum",
    "Switch",
    "TeRA",
    "TensLoRA",
    "Truncate",
    "UniLoRA",
    "VeRA",
    "activations",
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
    "methods",
    "prune",
    "ranks",
    "rows",
    "select",
    "selected",
    "starts",
    "study",
    "train",
    "unmerge",
]
__version__ = "0.1.0"

if not TYPE_CHECKING:
    LATE = {  # what most programs never ask for, or what imports PEFT or transformers
        "bundled": ("undula.bundled", None),
        "study": ("undula.study", None),
        "train": ("undula.train", None),
        "Run": ("undula.train", "Run"),
        "evaluate": ("undula.train", "evaluate"),
        "peft_config": ("undula.integrations.peft", "peft_config"),
        "enable_peft": ("undula.integrations.peft", "enable_peft"),
        "allocating": ("undula.integrations.allocating", "Allocating"),
    }

    @told
    def __getattr__(name: str) -> Any:
        """Methods of other packages by their names, and what is imported only when it is asked for."""
        for method in Method.registry.values():
            if method.__name__ == name:
                return method
        if name in LATE:
            module, what = LATE[name]
            found = importlib.import_module(module)
            return found if what is None else getattr(found, what)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """What there is, and what is imported when it is asked for."""
        return sorted({*globals(), *LATE, *(method.__name__ for method in Method.registry.values())})
