# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula export`: an adapter as a plain LoRA, in the forms that others read."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .. import compress
from ..core.adapter import Adapter
from ..core.method import LowRank
from ..io import export_diffusers, export_kohya, export_lora, files, vllm
from ..io.whole import whole
from ..train.restored import check_agreed
from . import gguf, shell
from .carry import Companions, companions
from .collapsing import How, Rows, Squeezed, base_and_task, show, squeezed
from .importing import named_layers


class Form(StrEnum):
    """The forms in which an adapter can leave."""

    peft = "peft"
    vllm = "vllm"
    diffusers = "diffusers"
    kohya = "kohya"
    gguf = "gguf"


def export(
    path: shell.Directory,
    *,
    out: shell.Out,
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="peft: a plain LoRA that PEFT and others read. vllm: the same as vLLM takes it, with one rank of its "
            "list for all layers. diffusers: for a pipeline's load_lora_weights. kohya: one file for ComfyUI and "
            "others. gguf: a file for llama.cpp's --lora.",
        ),
    ] = Form.peft,
    component: Annotated[
        str | None, typer.Option(help="The part of the pipeline: unet, transformer ... (--format diffusers, kohya)")
    ] = None,
    stability: Annotated[
        bool,
        typer.Option(
            "--stability",
            help="Name a UNet's layers as Stability does (input_blocks ...), as kohya's scripts do for SDXL; --model "
            "says the pipeline. (--format kohya)",
        ),
    ] = False,
    how: How = None,
    options: shell.Set = [],
    rows: Rows = None,
    data: shell.Data = None,
    model: shell.Base = None,
) -> None:
    """Write an adapter as a plain LoRA.  What is none is collapsed first, and the error of that printed; what is one
    leaves as it is, or collapsed as --how and --set say."""
    {Form.gguf: gguf.fresh, Form.kohya: _fresh_file}.get(form, shell.fresh)(out)
    _check_form(form, component, stability, model)
    adapter = Adapter.load(path)
    check_agreed(path, adapter, model)
    exact = issubclass(adapter.rung, LowRank) and how is None and not options
    if exact and (rows is not None or data is not None):
        raise ValueError(
            "a method on the rung LowRank is exported exactly, without data: leave out --rows and --data, or collapse "
            "it (--how truncate --set r=4)"
        )
    found = None if exact else squeezed(path, adapter, how, options, data, rows, model)
    lora = adapter if found is None else found.made.adapter
    base = None
    if form is Form.gguf:
        gguf.write_lora(path, lora, out, model)
    elif form is Form.kohya:
        export_kohya(lora, out, str(component), named_layers(str(model), component) if stability else None)
    elif component is not None:
        with whole(out) as folder:
            export_diffusers(lora, folder, component)
    else:
        base = _for_peft(path, adapter, found, out, model, vllm.export_vllm if form is Form.vllm else export_lora)
    _exported(found, adapter, out)
    if form is Form.vllm:
        rank, name = files.headed(out)[0]["r"], out.resolve().name
        shell.note(f"vllm serve {base or 'BASE'} --enable-lora --max-lora-rank {rank} --lora-modules {name}={out}")


def _check_form(form: Form, component: str | None, stability: bool, model: str | None) -> None:
    """Raises ValueError for options of another form."""
    if (component is None) == (form in (Form.diffusers, Form.kohya)):
        raise ValueError(
            "--format diffusers and kohya go with --component, the part of the pipeline that is adapted: unet, "
            "transformer, text_encoder ..."
        )
    if stability and (form is not Form.kohya or model is None):
        raise ValueError("--stability goes with --format kohya and --model, the pipeline whose UNet has the layers")


def _for_peft(
    path: Path,
    adapter: Adapter,
    found: Squeezed | None,
    out: Path,
    model: str | None,
    write: Callable[[Adapter, Path, str | None, str | None], object],
) -> str | None:
    """Writes a directory as PEFT has it, with what goes along with an adapter.  Returns the base that it names."""
    lora = adapter if found is None else found.made.adapter
    base, task = base_and_task(lora.about, model, found.opened if found else None)
    beside = companions(path, adapter, model)
    with whole(out) as folder:
        if isinstance(beside, Companions):
            base = beside.base
            write(lora, folder, base, task)
            beside.write(folder, out.resolve().name, "" if found is None else _costs(adapter, found.made))
        else:
            write(lora, folder, base, task)
    if isinstance(beside, str):
        shell.say(f"only the adapter's own files were written: {beside}", "yellow")
    return base


def _fresh_file(out: Path) -> None:
    """Refuses what is no new file NAME.safetensors.  Raises ValueError, FileExistsError."""
    if out.suffix != ".safetensors":
        raise ValueError(f"a file of kohya's form is called NAME.safetensors: --out {out}.safetensors instead of {out}")
    if out.exists():
        raise FileExistsError(f"{out} is there already: name another file")


def _exported(found: Squeezed | None, adapter: Adapter, out: Path) -> None:
    if found is None:
        shell.note("exported exactly (a method on the rung LowRank)")
    else:
        shell.note(
            "collapsed as was asked"
            if issubclass(adapter.rung, LowRank)
            else f"on the rung {adapter.rung.__name__} there is no exact LoRA: collapsed first"
        )
        show(found.made, None)
    shell.note(f"Saved in {out}")


def _costs(adapter: Adapter, made: compress.Collapsed) -> str:
    """A sentence for a card: of what this LoRA is an approximation, and how good a one."""
    what = "the model's change" if made.measured_on == "held-out data" else "the update"
    rank = max(getattr(m, "r", 0) for m in made.adapter.methods.values())
    return (
        f"Collapsed into a plain LoRA (rank {rank} at most) from the {adapter.rung.__name__} above; relative error of "
        f"{what}, on {made.measured_on}: {made.error:.3g}."
    )
