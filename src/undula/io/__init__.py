"""Adapters on disk: a PEFT adapter directory (safetensors and JSON, nothing pickled)."""

from .diffusers import export_diffusers, load_diffusers
from .gguf_write import Encoding, export_gguf, export_gguf_lora
from .native import load, save
from .peft import export_lora, read_lora

__all__ = [
    "Encoding",
    "export_diffusers",
    "export_gguf",
    "export_gguf_lora",
    "export_lora",
    "load",
    "load_diffusers",
    "read_lora",
    "save",
]
