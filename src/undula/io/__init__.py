"""Adapters on disk: a PEFT adapter directory (safetensors and JSON, nothing pickled)."""

from .diffusers import export_diffusers, load_diffusers
from .native import load, save
from .peft import export_lora, read_lora

__all__ = ["export_diffusers", "export_lora", "load", "load_diffusers", "read_lora", "save"]
