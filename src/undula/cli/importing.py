"""`undula import`: an adapter of any form that undula reads, as a directory of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.adapter import Adapter
from ..core.extras import needs
from ..io.forms import imported, readable
from ..io.places import layers_of
from ..io.spots import GGUF, KOHYA, PEFT
from ..io.verdicts import IMPORT
from ..io.whole import whole
from ..train import restored
from ..train.base import called_elsewhere, config_of, model_folder
from ..train.foreign import outline_of
from . import shell
from .progress import busy

if TYPE_CHECKING:
    from ..io.kohya import Layers

FOLDERS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2",
           "lora_te3": "text_encoder_3", "lora_transformer": "transformer"}  # fmt: skip


def import_(
    path: Annotated[
        Path, typer.Argument(help="A file or directory with an adapter; `undula inspect` tells what it is.")
    ],
    *,
    out: shell.Out,
    model: Annotated[
        str | None,
        typer.Option(help="The base: a model, a pipeline's folder, or a file of its weights (headers alone)."),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="The part of a pipeline: unet, transformer, text_encoder, lora_te1 ...")
    ] = None,
) -> None:
    """Make a directory of undula's own of an adapter in another form: kohya's and llama.cpp's files, which do not tell
    their layers' own names, a part of a pipeline's LoRA, LoRAs of PEFT's that change numbers of their base."""
    shell.fresh(out)
    found = readable(path)
    if found.form in (KOHYA, GGUF) and model is None:
        raise ValueError(f"{path} does not tell its layers' own names ({found.form}): name the base (--model)")
    with busy("reading"):
        adapter = _read(path, found.form, found.use, model, component)
    with whole(out) as folder:
        adapter.save(folder, called_elsewhere(model) if model else None)
    shell.note(f"{found.kind}, stored as: {found.form}; {len(adapter.methods)} layers, "
               f"{adapter.num_parameters():,} numbers")  # fmt: skip
    if any("lora_mid" in spot.tensors for spot in found.sites):
        shell.note("layers in CP form (lora_mid) were multiplied out, rounded once to float32; all else is as it was")
    shell.note(f"Saved in {out}")


def _read(path: Path, form: str, use: str, model: str | None, component: str | None) -> Adapter:
    if form in (KOHYA, GGUF):
        return imported(path, named_layers(str(model), component), component)
    if use == IMPORT and form == PEFT:  # it changes numbers of its base
        return restored(path, model).adapter.copy()
    return imported(path, None, component)


@needs("train")
def named_layers(source: str, component: str | None) -> Layers:
    """The layers of a model, or of a part of a pipeline: by its class where transformers has it, else by the headers of
    its files."""
    folder = Path(model_folder(source))
    part = None if component is None else FOLDERS.get(component, component)
    if (folder / "model_index.json").is_file() and (part is None or not (folder / part).is_dir()):
        parts = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise ValueError(f"{source} is a pipeline: name the part (--component); it has {', '.join(parts)}")
    folder = folder / part if part is not None and (folder / part).is_dir() else folder
    config = folder / "config.json"
    if folder.is_dir() and config.is_file() and "model_type" not in json.loads(config.read_text(encoding="utf-8")):
        return layers_of(folder)
    if not folder.is_dir() and folder.suffix == ".safetensors":
        return layers_of(folder)
    of_base = config_of(str(folder))
    return outline_of((of_base.architectures or ["AutoModel"])[0], of_base)
