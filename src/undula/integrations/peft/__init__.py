"""PEFT as a host: any method of undula in `peft.get_peft_model`.  The one package that knows PEFT's internals.

    model = peft.get_peft_model(model, undula.peft_config(undula.AuroRA(r=2), target_modules="all-linear"))

PEFT chooses the layers, switches, trains and saves; what an adapter is, computes and looks like on disk is undula's.
A directory that PEFT saves is undula's own (`undula.io.native`), and the other way round; before PEFT loads one,
`undula.enable_peft()` must have told it what `peft_type: UNDULA` means.
"""

from __future__ import annotations

import peft

from .config import UNDULA, UndulaConfig
from .layer import Hosted, UndulaLayer, UndulaLinear, hosts
from .model import UndulaModel

__all__ = [
    "UNDULA",
    "Hosted",
    "UndulaConfig",
    "UndulaLayer",
    "UndulaLinear",
    "UndulaModel",
    "enable",
    "hosts",
]


def enable() -> None:
    """See `undula.enable_peft`."""
    release = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if not (0, 21) <= release < (0, 23):
        raise ImportError(f"undula works inside peft>=0.21,<0.23; this is peft {peft.__version__}")
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[UNDULA] = UndulaConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[UNDULA] = UndulaModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[UNDULA] = UndulaModel.prefix
