"""Other libraries' worlds: one thin file each, imported only when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.extras import told

if TYPE_CHECKING:
    from peft import PeftConfig

    from ..core.method import Method
    from ..observe.probe import Probe
    from ..ranks import Procedure, Quality
    from .callback import Allocating

__all__ = ["allocating", "enable_peft", "peft_config", "penalised"]


@told
def enable_peft() -> None:
    """Makes undula's directories loadable by PEFT in this process.  Fills PEFT's three registries, nothing else.

    Raises ImportError for a version of PEFT in which undula was not tried.
    """
    from .peft import enable

    enable()


@told
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
    from .peft.config import UndulaConfig, refuse

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


@told
def allocating(
    allocator: Procedure,
    quality: Quality | None = None,
    *,
    clip: float | None = None,
    checkpoint: str | Path | None = None,
    saves_whole_models: bool = True,
) -> Allocating:
    """A callback of `transformers.Trainer` that carries out an allocator's course: see `Allocating`, whose arguments
    these are.

        Trainer(model, ..., callbacks=[undula.allocating(undula.ranks.AdaLoRA(target=4))])
    """
    from .callback import Allocating

    return Allocating(allocator, quality, clip=clip, checkpoint=checkpoint, saves_whole_models=saves_whole_models)


@told
def penalised(trainer: type) -> type:
    """A class of `transformers.Trainer` (or one of TRL's) whose trainers take a `penalty` beside all else: one, or a
    sum of several, see `undula.penalties`.

        trainer = undula.penalised(Trainer)(penalty=KLToBase(0.1) + GroupLasso(1e-3), model=model, args=args, ...)

    With an allocator in the sum it is carried out too.
    """
    from .with_terms import with_terms

    return with_terms(trainer)
