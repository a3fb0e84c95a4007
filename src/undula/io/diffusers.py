"""The LoRA files of diffusers: one safetensors file for the parts of a pipeline, `PART.<site>.lora_A.weight` ...

Differs from PEFT's directory in its names (`unet.` or `transformer.` in the place of `base_model.model.`) and in where
the configuration is: in the file's own metadata, under `lora_adapter_metadata`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.adapter import Adapter
from . import files, tensorfile
from .draft import filled
from .peft import LEAF, lora_state, read_lora

WEIGHTS = "pytorch_lora_weights.safetensors"  # what a pipeline's load_lora_weights looks for in a folder
METADATA = "lora_adapter_metadata"


def export_diffusers(adapter: Adapter, path: str | Path, component: str = "unet") -> None:
    """Writes a LowRank adapter as PATH/pytorch_lora_weights.safetensors, which a pipeline's
    `load_lora_weights(PATH)` reads.  `component` is the part of the pipeline that is adapted: `unet`, `transformer`,
    `text_encoder` ...

    Raises TypeError below the LowRank rung; ValueError for parameters trained in full, which these files cannot hold,
    and for a component that is no name.
    """
    if not component.isidentifier():
        raise ValueError(f"a component is a pipeline's name of it, such as unet or transformer; found {component!r}")
    if adapter.full:
        raise ValueError(
            f"diffusers' LoRA files hold no parameters trained in full: {', '.join(sorted(adapter.full)[:3])}. "
            "Export for PEFT instead (io.export_lora, or --format peft), or merge the adapter"
        )
    config, tensors = lora_state(adapter, None, None)
    named = {f"{component}.{key}": t.detach().cpu().contiguous() for key, t in tensors.items()}
    told = {f"{component}.{key}": value for key, value in config.items()}
    metadata = {"format": "pt", METADATA: json.dumps(told, indent=2, sort_keys=True)}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    filled(folder / WEIGHTS, lambda file: tensorfile.write(file, named, metadata))


def load_diffusers(path: str | Path, component: str | None = None) -> Adapter:
    """The adapter of one part of a pipeline in a file of diffusers, or in a folder that has one; `component` may be
    left out where the file is of one part alone.

    Raises FileNotFoundError, LookupError for a component that is not there, ValueError for what is malformed or in one
    of the older forms (kohya's, `lora.down`): diffusers converts those when it loads and saves them.
    """
    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no LoRA of diffusers: {WEIGHTS} is missing")
    with files.door(str(file)):
        with open(file, "rb") as opened:
            entries, metadata = tensorfile.entries(opened, str(file))
            tensors = tensorfile.read(opened, entries, str(file))
        files.check_finite(tensors, str(file))
        return component_of(file, component, tensors, metadata.get(METADATA))


def component_of(file: Path, component: str | None, tensors: Mapping[str, Tensor], text: str | None) -> Adapter:
    """The adapter of one part of a pipeline, of a file's tensors and the configuration in its metadata."""
    config, own = as_lora(file, component, tensors, text)
    return read_lora(config, own, str(file))


def as_lora(
    file: Path, component: str | None, tensors: Mapping[str, Tensor], text: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(LoraConfig, tensors by their names below the part) of one part of a pipeline."""
    parts = sorted({key.partition(".")[0] for key in tensors})
    foreign = [key for key in tensors if LEAF.fullmatch(key) is None]
    if foreign:
        raise ValueError(
            f"{file}: {foreign[0]!r:.100} is no name of a LoRA in PEFT's form (PART.<layer>.lora_A.weight): load the "
            "file with diffusers and save it again (pipeline.save_lora_weights), which converts older forms"
        )
    if component is None and len(parts) != 1:
        raise LookupError(
            f"{file} is for {', '.join(parts) or 'nothing'}: name the one to read (io.load_diffusers(path, component))"
        )
    chosen = component or parts[0]
    if chosen not in parts:
        raise LookupError(f"{file} has no component {chosen!r}; it has: {', '.join(parts)}")
    own = {key.removeprefix(f"{chosen}."): t for key, t in tensors.items() if key.startswith(f"{chosen}.")}
    return _config(file, chosen, own, text), own


def _config(file: Path, component: str, tensors: Mapping[str, Tensor], text: str | None) -> dict[str, Any]:
    """The component's LoraConfig; without one alpha is the rank at every layer, which is diffusers' own rule."""
    if text is None:
        found = [(match, t) for key, t in tensors.items() if (match := LEAF.fullmatch(key))]
        ranks = {f"^{re.escape(m['site'])}$": t.shape[0] for m, t in found if m["leaf"].endswith("A") and t.ndim}
        dora = any("magnitude" in k for k in tensors)
        return {"peft_type": "LORA", "rank_pattern": ranks, "alpha_pattern": ranks, "use_dora": dora}
    told = files.parsed(text, f"{file}: its {METADATA}")
    prefix = f"{component}."
    return {k.removeprefix(prefix): v for k, v in told.items() if k.startswith(prefix)}
