"""What could be done with an adapter in a form, or of a kind, that is not opened by itself, and why."""

from __future__ import annotations

from . import families, files, kohya
from .spots import BARE, GGUF, HUB, KOHYA, MLX, MODEL, OLD, PEFT
from .stored import Stored

IMPORT, SHOW = "import", "show"
LLAMA = (
    "llama.cpp's names are not the model's: undula.io.load_gguf_lora(path, config) reads it, `undula import FILE "
    "--model BASE --out DIRECTORY` makes a directory of it"
)


def verdict(found: Stored, form: str) -> tuple[str, str]:
    """("import" or "show", why)."""
    if form == KOHYA:
        return kohya.judged(found.tensors)
    if form == GGUF and found.metadata.get("adapter.type") == "lora":
        return IMPORT, LLAMA
    return SHOW, _unread(found, form)


def _unread(found: Stored, form: str) -> str:
    """Why undula does not read a form or a kind."""
    if form == PEFT:
        told = found.config.get("peft_type")
        name = families.PEFT.get(told, str(told)[:60]) if isinstance(told, str) else f"peft_type {told!r:.60}"
        own = families.OWN_NAMES.get(name)
        return f"undula reads PEFT's LoRA and its own; {name} is another function" + (
            f" (undula trains {own} anew, and does not read PEFT's file of it)" if own else ": use PEFT for it"
        )
    return {
        MLX: "MLX's own layout; mlx_lm.fuse merges it into its model there",
        HUB: "AdapterHub's adapters (bottlenecks and their relatives) are modules between layers, which undula has not",
        GGUF: "no LoRA: undula reads LoRAs of llama.cpp's files, and its models not at all",
        MODEL: "no adapter: no tensor has a name of an adapter's. `undula train --model` trains adapters on a model",
        OLD: "one of diffusers' older forms: load it there and save it again (pipeline.save_lora_weights)",
        BARE: f"the file says no scale and no kind: {files.CONFIG} is missing, or its tensors are of no form that "
        "undula reads",
    }[form]  # fmt: skip
