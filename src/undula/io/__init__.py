"""Adapters on disk: a PEFT adapter directory (safetensors and JSON, nothing pickled)."""

import importlib
from typing import TYPE_CHECKING, Any

from .diffusers import export_diffusers, load_diffusers
from .gguf_write import Encoding, export_gguf
from .native import load, save
from .peft import export_lora, read_lora

if TYPE_CHECKING:
    from .forms import imported
    from .gguf_lora import export_gguf_lora, load_gguf_lora
    from .importing import load_for
    from .inspecting import Inspected, inspect
    from .kohya import export_kohya, load_kohya
    from .places import layers_of

__all__ = [
    "Encoding",
    "Inspected",
    "export_diffusers",
    "export_gguf",
    "export_gguf_lora",
    "export_kohya",
    "export_lora",
    "imported",
    "inspect",
    "layers_of",
    "load",
    "load_diffusers",
    "load_for",
    "load_gguf_lora",
    "load_kohya",
    "read_lora",
    "save",
]
LATER = {"Inspected": "inspecting", "inspect": "inspecting", "load_for": "importing", "imported": "forms"}
LATER |= {"export_kohya": "kohya", "load_kohya": "kohya"}
LATER |= {"layers_of": "places", "export_gguf_lora": "gguf_lora", "load_gguf_lora": "gguf_lora"}


def __getattr__(name: str) -> Any:
    """What few need is loaded when it is asked for."""
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{LATER[name]}", __name__), name)
