"""What an adapter of any kind is, as its headers tell, and what undula could do with it: `undula inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.adapter import Adapter
from . import diffusers, families, files, lora_config, outline, packing
from .reading import TYPE
from .spots import (
    COMFY,
    DIFFUSERS,
    GGUF,
    IN_FULL,
    MODEL,
    PEFT,
    UNDULA,
    Spot,
    form_of,
    numbers,
    spots,
)
from .stored import Stored, stored
from .tensorfile import TYPES
from .verdicts import IMPORT, SHOW, verdict

TRAIN = "train"
PARTS = (
    "it is for {}: undula.io.load_diffusers(path, component) reads one of them, `undula import FILE --component PART "
    "--out DIRECTORY` makes a directory of it"
)


@dataclass(frozen=True)
class Inspected:
    """What `inspect` found.  `use` is "train" (undula loads it and trains on), "import" (by the call in `why`) or
    "show" (neither, for the reason in `why`)."""

    path: str
    form: str  # how it is stored
    kind: str
    base: str | None
    task: str | None
    use: str
    why: str
    files: Mapping[str, int]
    parameters: int
    dtypes: Mapping[str, int]  # tensors of each type
    sites: Sequence[Spot]
    notes: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def inspect(path: str | Path) -> Inspected:
    """Looks at the headers of an adapter of any kind of the ecosystem, those included that undula cannot train: PEFT's
    directories, kohya's and LyCORIS's single files, diffusers, ComfyUI, MLX, GGUF, checkpoints, sharded files.

    Nothing is run and no tensor of more than one number is read: what the numbers are (NaN, all zero) is not looked at.
    Raises FileNotFoundError where nothing is there; ValueError for pickles, which undula never opens, and for what is
    malformed or cut; LookupError where a directory holds several, which it names.
    """
    found = stored(path)
    with files.door(str(path)):
        return _of(found)


def _of(found: Stored) -> Inspected:
    form = form_of(found)
    adapter, use, why = _judged(found, form)
    changed = list(spots(found, form, adapter))
    kind, notes = _kind(found, form, changed), list(found.notes)
    if found.config.get("peft_type") == "LORA":
        notes += _said(found.config)
    base, task = _base(found), found.config.get("task_type")
    packed = found.config["undula"].get("quantised") if adapter is not None and form == UNDULA else None
    if packed is not None:
        notes.append(f"stored as {packing.Packing.decode(packed, str(found.path))}")
    return Inspected(
        str(found.path), form, kind, base, task if isinstance(task, str) else None, use, why, dict(found.files),
        numbers(found, adapter),
        dict(Counter(t.kind for t in found.tensors.values()).most_common()), changed, notes, found.config,
    )  # fmt: skip


def _kind(found: Stored, form: str, changed: list[Spot]) -> str:
    """What the adapter is called."""
    told = found.config.get("peft_type")
    if form == PEFT:
        name = families.PEFT.get(str(told), f"{told!s:.60} (a type of PEFT's that undula does not know)")
        return "DoRA" if told == "LORA" and found.config.get("use_dora") else name
    counted = Counter(s.kind for s in changed if s.kind != IN_FULL)
    if form == GGUF and not counted or form == MODEL:
        return "whole model"
    if not counted:
        return "parameters in full" if changed else "nothing"
    if len(counted) == 1:
        return next(iter(counted))
    return ", ".join(f"{name} ({n})" for name, n in counted.most_common(5)) + (", ..." if len(counted) > 5 else "")


def _said(config: Mapping[str, Any]) -> Iterator[str]:
    """What in a LoRA's configuration changes what it computes."""
    for name in ("use_rslora", "lora_bias", "trainable_token_indices", "target_parameters", "modules_to_save",
                 "layer_replication", "alora_invocation_tokens", "use_qalora"):  # fmt: skip
        if config.get(name):
            yield f"{name}={config[name]!r:.200}"
    start = config.get("init_lora_weights")
    if isinstance(start, str):
        yield f"init_lora_weights={start!r:.40}"
    if config.get("bias", "none") != "none":
        yield f"bias={config['bias']!r:.40}"


def _base(found: Stored) -> str | None:
    """The model that it says it is for."""
    config, metadata = found.config, found.metadata
    asked = [config.get(k) for k in ("base_model_name_or_path", "model_name", "model", "base_model")]
    keys = ("general.base_model.0.name", "general.base_model.0.repo_url", "general.architecture",
            "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model")  # fmt: skip
    told = [text for text in [*asked, *(metadata.get(k) for k in keys)] if isinstance(text, str) and text]
    return told[0] if told else None


def _judged(found: Stored, form: str) -> tuple[Adapter | None, str, str]:
    """(the adapter without its numbers where undula reads it, what can be done, why)."""
    if form in (UNDULA, PEFT, DIFFUSERS, COMFY) and found.config.get("peft_type", "LORA") in (TYPE, "LORA"):
        return _read(found, form)
    return None, *verdict(found, form)


def _read(found: Stored, form: str) -> tuple[Adapter | None, str, str]:
    try:
        if found.path.is_dir() and (form in (UNDULA, PEFT) or (found.path / diffusers.WEIGHTS).is_file()):
            adapter = outline.head(found.path).outline()
        elif form in (UNDULA, PEFT):
            adapter = outline.head(found.path.parent).outline()
        else:
            odd = next((n for n, t in found.tensors.items() if t.kind not in TYPES), None)
            if odd is not None:
                raise ValueError(f"{odd!r:.100} is of the type {found.tensors[odd].kind}, which undula does not read")
            tensors = {k: torch.empty(t.shape, dtype=TYPES[t.kind], device="meta") for k, t in found.tensors.items()}
            adapter = diffusers.component_of(found.path, None, tensors, found.metadata.get(diffusers.METADATA))
    except (ValueError, LookupError, OSError) as error:
        parts = sorted({name.partition(".")[0] for name in found.tensors})
        if form == DIFFUSERS and isinstance(error, LookupError) and len(parts) > 1:
            return None, IMPORT, PARTS.format(", ".join(parts))
        use = IMPORT if lora_config.needs_base(found.config) else SHOW
        return None, use, str(error.args[0] if error.args else error)
    if form in (DIFFUSERS, COMFY):
        return adapter, TRAIN, "undula.io.load_diffusers(path) reads it, as a pipeline's own LoRA"
    return adapter, TRAIN, f"undula.Adapter.load(path) reads it: rung {adapter.rung.__name__}"
