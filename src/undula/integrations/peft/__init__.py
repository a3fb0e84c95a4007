"""PEFT as a host: any method of undula in `peft.get_peft_model`.  The one package that knows PEFT's internals.

    model = peft.get_peft_model(model, undula.peft_config(undula.AuroRA(r=2), target_modules="all-linear"))

PEFT chooses the layers, switches, trains and saves; what an adapter is, computes and looks like on disk is undula's.
A directory that PEFT saves is undula's own (`undula.io.native`), and the other way round; before PEFT loads one,
`undula.enable_peft()` must have told it what `peft_type: UNDULA` means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import peft
from peft import PeftConfig

from ...core.method import Method
from ...observe.probe import Probe
from .config import UNDULA, UndulaConfig, refuse
from .layer import Hosted, UndulaLayer, UndulaLinear, hosts
from .model import UndulaModel

__all__ = [
    "UNDULA",
    "Hosted",
    "UndulaConfig",
    "UndulaLayer",
    "UndulaLinear",
    "UndulaModel",
    "enable_peft",
    "hosts",
    "peft_config",
]


def enable_peft() -> None:
    """Makes undula's directories loadable by PEFT in this process.  Fills PEFT's three registries, nothing else."""
    release = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if not (0, 21) <= release < (0, 23):
        raise ImportError(f"undula works inside peft>=0.21,<0.23; this is peft {peft.__version__}")
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[UNDULA] = UndulaConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[UNDULA] = UndulaModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[UNDULA] = UndulaModel.prefix


def peft_config(
    method: Method,
    target_modules: str | re.Pattern[str] | Sequence[str] = "all-linear",
    *,
    overrides: Mapping[str, Method] | None = None,
    modules_to_save: Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    task_type: str | None = None,
    inference_mode: bool = False,
    probe: Probe | None = None,
    **others: Any,
) -> PeftConfig:
    """A configuration of `method` for `peft.get_peft_model`, TRL and whatever else takes a PeftConfig.

    Everything but `method`, `overrides` (methods of the layers that match a pattern, the first match counts) and
    `probe` (gradients and activations for starts that ask for them, see `undula.Probe`) means what it means in PEFT's
    own configurations, and is checked as they are: `target_modules` is "all-linear", a regular expression or a list of
    names and suffixes; `layers_to_transform` and `layers_pattern` go with a list; `modules_to_save` are trained and
    saved in full.  Raises ValueError for an option of PEFT's that undula has not (`bias`, `target_parameters` ...) or
    that is part of the method (`r`, `lora_alpha`, `use_dora` ...), and says what to do instead.
    """
    enable_peft()
    refuse(others)
    return UndulaConfig(
        method=method,
        overrides=dict(overrides or {}),
        target_modules=target_modules,
        modules_to_save=modules_to_save,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        task_type=task_type,
        inference_mode=inference_mode,
    ).with_probe(probe)
