"""undula: low-rank adaptation of PyTorch models, with nonlinear adapters at its core.

An adapter is a value; a method is a law W -> W'.
"""

from . import combine, io, penalties, ranks, starts
from .compress import Collapsed, LeastSquares, Substitute, Truncate, collapse, quantise, squeeze
from .core import VERSION
from .core.adapter import Adapter
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
from .integrations import allocating, enable_peft, peft_config, penalised
from .jobs import train_many
from .methods import activations, methods
from .methods.adalora import AdaLoRA
from .methods.aurora import AuroRA, AuroRAStatic
from .methods.blocklora import BlockLoRA
from .methods.centred import Centred
from .methods.dora import DoRA
from .methods.dropout import Dropout
from .methods.dylora import DyLoRA
from .methods.fusion import Fusion
from .methods.gated import GatedLoRA
from .methods.lora import LoRA, RankStabilised
from .methods.loran import LoRAN, LoRANActivation, SineLoRA
from .methods.lorasb import LoRASB
from .methods.loraxs import LoRAXS
from .methods.lorta import LoRTA
from .methods.masked import Masked
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
from .study import study
from .train import Run, evaluate, forget, load, train, tune

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
    "Fusion",
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
    "Masked",
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
    "allocating",
    "attach",
    "collapse",
    "combine",
    "detach",
    "diagnose",
    "enable_peft",
    "evaluate",
    "forget",
    "io",
    "load",
    "loraplus_groups",
    "merge",
    "methods",
    "peft_config",
    "penalised",
    "penalties",
    "prune",
    "quantise",
    "ranks",
    "rows",
    "select",
    "selected",
    "squeeze",
    "starts",
    "study",
    "train",
    "train_many",
    "tune",
    "unmerge",
]
__version__ = VERSION

for _verb in (methods, study, train):  # which hide packages of their names: by this one `import ... as` finds those
    _verb.__name__ = f"{__name__}.{_verb.__name__}"
del _verb
