"""`undula gguf`: a model as one file for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..core.adapter import Adapter
from ..host import merging
from ..host.merging import LOST
from ..host.state import host_of
from ..io import Encoding, export_gguf, export_gguf_lora, files
from ..train import CausalLM, dense, restored
from ..train.base import config_of, lacking, open_model
from ..train.restored import described
from . import shell

if TYPE_CHECKING:
    from torch import nn

OutFile = Annotated[Path, typer.Option("--out", help="The file to write, NAME.gguf.")]
Stored = Annotated[
    Encoding | None,
    typer.Option("--encoding", help="How matrices are stored. (default: as the model has them, which loses nothing)"),
]


def gguf(
    source: Annotated[
        Path, typer.Argument(help="The directory of an adapter, or of a whole model as `merge` writes; bundled:NAME.")
    ],
    *,
    out: OutFile,
    encoding: Stored = None,
    model: shell.Base = None,
) -> None:
    """Write a model for llama.cpp: an adapter with its base, merged, or a whole model's folder."""
    fresh(out)
    if source.is_dir() and ((source / files.CONFIG).is_file() or not (source / "config.json").is_file()):
        lost = _adapted(source, out, encoding, model)
    elif model is not None:
        raise ValueError(f"{source} is a whole model: leave out --model, which names the base of an adapter")
    else:
        lost = _whole(source, out, encoding)
    _tell(lost)
    shell.note(f"Saved in {out}, {out.stat().st_size / 1e6:,.0f} MB")


def write_lora(path: Path, lora: Adapter, out: Path, model: str | None) -> None:
    """The adapter `lora`, which came from the directory `path`, as a file for llama.cpp's `--lora`."""
    export_gguf_lora(lora, config_of(model or described(path, Adapter.load(path), model).model), out)


def fresh(out: Path) -> None:
    """Refuses what is no new file NAME.gguf.  Raises ValueError, FileExistsError."""
    if out.suffix != ".gguf":
        raise ValueError(f"a GGUF file is called NAME.gguf: --out {out}.gguf instead of {out}")
    if out.exists():
        raise FileExistsError(f"{out} is there already: name another file")
    out.parent.mkdir(parents=True, exist_ok=True)


def _adapted(path: Path, out: Path, encoding: Encoding | None, model: str | None) -> Mapping[str, float]:
    """Merged in float32, whatever the base is of; returns by site what storing costs, as a share of the change."""
    opened = dense(restored(path, model))
    stored = encoding or _kept(opened.model.dtype)
    opened.model.float()
    merging.merge(opened.model)
    own = host_of(opened.model).merged or {}
    changes = _changes(opened.model, own)
    lost = export_gguf(opened.model, opened.processor, out, stored)
    return {name: lost[name] / change if change > 0 else 0.0 for name, change in changes.items() if name in lost}


def _kept(dtype: Any) -> Encoding | None:
    return next((e for e in Encoding if e.name == {"bfloat16": "bf16", "float16": "f16"}.get(str(dtype)[6:])), None)


def _changes(model: nn.Module, own: Mapping[str, nn.Parameter]) -> dict[str, float]:
    return {name: float((model.get_parameter(name) - p).norm()) for name, p in own.items()}


def _whole(source: Path, out: Path, encoding: Encoding | None) -> Mapping[str, float]:
    dtype = getattr(config_of(str(source)), "dtype", None) or torch.float32
    model, tokenizer = open_model(str(source), CausalLM(), dtype, 0)
    if missing := lacking(model):
        raise ValueError(f"{source} is no whole model: its files lack {', '.join(missing[:3])}")
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    export_gguf(model, tokenizer, out, encoding)
    return {}


def _tell(lost: Mapping[str, float]) -> None:
    if not lost:
        return
    worst = max(lost, key=lambda name: lost[name])
    shell.note(f"{len(lost)} layers merged; storing them costs {lost[worst]:.1e} of the change at most")
    many = [name for name, share in lost.items() if not share < LOST]
    if many:
        shell.remark(
            f"rounding takes {min(lost[worst], 1):.0%} of what the adapter does at {worst}, and over {LOST:.0%} at "
            f"{len(many)} of {len(lost)} layers: the file is not what was trained. Take --encoding f32, or keep the "
            "adapter apart (`undula export --format gguf`, llama.cpp's --lora)"
        )
