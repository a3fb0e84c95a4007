"""Adapters on disk: a PEFT adapter directory (safetensors and JSON, nothing pickled)."""

from .native import load, save
from .peft import export_lora, read_lora

__all__ = ["export_lora", "load", "read_lora", "save"]
