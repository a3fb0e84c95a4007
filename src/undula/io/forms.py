"""The adapter in whatever form it is stored."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..core.adapter import Adapter
from .diffusers import load_diffusers
from .gguf_lora import load_gguf_lora
from .importing import load_for
from .inspecting import TRAIN, Inspected, inspect
from .kohya import PARTS, Layers, load_kohya
from .native import load
from .spots import COMFY, DIFFUSERS, GGUF, KOHYA
from .verdicts import SHOW


def readable(path: str | Path) -> Inspected:
    """`inspect` of what undula reads, in whatever way.  Raises ValueError for what can be shown alone."""
    found = inspect(path)
    if found.use == SHOW:
        raise ValueError(f"{path} is {found.kind}, stored as: {found.form}. {found.why}")
    return found


def imported(path: str | Path, model: Layers | None = None, component: str | None = None) -> Adapter:
    """The adapter of any form that undula reads: its own, PEFT's LoRA, a file of diffusers, kohya's or llama.cpp's.

    `model` is the base, where the form does not tell all: of kohya's files the part that is adapted, or its layers
    (`undula.io.layers_of`); of llama.cpp's a model with a configuration; of PEFT's LoRAs see `load_for`.  `component`
    names the part of a pipeline, where a file is for several.  Raises what reading raises; ValueError for a form or
    kind that undula does not read, and where the base is missing.
    """
    found = readable(path)
    own = Path(path)
    file = own / next(iter(found.files)) if own.is_dir() else own
    if found.form in (DIFFUSERS, COMFY):
        return load_diffusers(file, component)
    if found.form in (KOHYA, GGUF) and model is None:
        raise ValueError(f"{path} does not tell its layers' own names: name the base (model=..., or --model)")
    if found.form == KOHYA:
        assert model is not None
        return load_kohya(file, model, PARTS.get(component, component) if component else None)
    if found.form == GGUF:
        return load_gguf_lora(file, getattr(model, "config", None))
    if found.use == TRAIN:
        return load(path)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path} changes numbers of its base: name the base (model=..., or --model)")
    return load_for(path, model)
