# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula collapse` and `undula export`: a plain low-rank adapter from any other, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import compress
from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.method import Additive, LowRank, Method, Reweight
from ..core.options import build
from ..core.ranges import NotNegative, Rank
from ..io import export_diffusers, export_kohya, export_lora, files, vllm
from ..io.whole import whole
from ..train import Restored, restored
from ..train.base import called_elsewhere
from ..train.restored import check_agreed
from ..train.run import RUN
from . import gguf, shell
from .carry import Companions, carry, companions
from .importing import named_layers
from .progress import busy

How = Annotated[str | None, typer.Option(help="truncate, substitute or least-squares. (default: by the rung)")]
Rows = Annotated[
    int | None,
    typer.Option(help="Rows to calibrate on, and as many others to measure the error on. (default: 256)", min=1),
]
ROWS = 256


class Recipe(Choice):
    """A way to collapse as a command line can name it: data come from the adapter's own training."""

    def approximation(self, opened: Restored | None, data: str | None, rows: int) -> compress.Approximation:
        """The way itself."""
        raise NotImplementedError

    def alone(self, rung: type[Method]) -> bool:
        """Whether it needs no more than the factors of an adapter on this rung."""
        return False

    def tells(self, rung: type[Method]) -> bool:
        """Whether it knows its own error, without data to measure it on."""
        return self.alone(rung)


@Recipe.register
@dataclasses.dataclass(frozen=True)
class Truncate(Recipe):
    """See `undula.Truncate`."""

    r: Rank = 8

    def approximation(self, opened: Restored | None, data: str | None, rows: int) -> compress.Approximation:
        return compress.Truncate(self.r)

    def alone(self, rung: type[Method]) -> bool:
        return issubclass(rung, Additive)

    def tells(self, rung: type[Method]) -> bool:
        return issubclass(rung, Reweight)


@Recipe.register
@dataclasses.dataclass(frozen=True)
class Substitute(Recipe):
    """See `undula.Substitute`."""

    def approximation(self, opened: Restored | None, data: str | None, rows: int) -> compress.Approximation:
        return compress.Substitute()

    def alone(self, rung: type[Method]) -> bool:
        return issubclass(rung, LowRank)


@Recipe.register
@dataclasses.dataclass(frozen=True)
class LeastSquares(Recipe):
    """See `undula.LeastSquares`."""

    r: Rank = 8
    ridge: NotNegative = 1e-3
    bias: bool = False

    def approximation(self, opened: Restored | None, data: str | None, rows: int) -> compress.Approximation:
        assert opened is not None
        calibration = list(opened.batches(opened.examples(data, "train", rows)))
        return compress.LeastSquares(self.r, calibration, self.ridge, self.bias)


@dataclasses.dataclass(frozen=True)
class Squeezed:
    """What has become of an adapter, and the model that had to be opened for it."""

    made: compress.Collapsed
    opened: Restored | None


def collapse(
    path: shell.Directory,
    *,
    out: shell.Out,
    how: How = None,
    options: shell.Set = [],
    rows: Rows = None,
    data: shell.Data = None,
    model: shell.Base = None,
    to: shell.Json = None,
) -> None:
    """Turn any adapter into a plain low-rank one; the error that this costs is measured and printed."""
    shell.fresh(out)
    adapter = Adapter.load(path)
    found = _squeezed(path, adapter, how, options, data, rows, model)
    with whole(out) as folder:
        found.made.adapter.save(folder, *_about(adapter.about, model, found.opened))
        carry(path, found.made.adapter, folder, model)
    _show(found.made, to)
    if str(to) != "-":
        shell.note(f"Saved in {out}: an adapter of undula's; `undula export {out} --out OTHER` writes it for PEFT")


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
    found = None if exact else _squeezed(path, adapter, how, options, data, rows, model)
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
    base, task = _about(lora.about, model, found.opened if found else None)
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
        _show(found.made, None)
    shell.note(f"Saved in {out}")


def _about(about: Mapping[str, Any], model: str | None, opened: Restored | None) -> tuple[str | None, str | None]:
    """The base and PEFT's task type that an adapter knows."""
    if opened is not None:
        return called_elsewhere(opened.run.model), opened.run.task.peft
    return (called_elsewhere(model) if model else None) or about.get("base_model_name_or_path"), about.get("task_type")


def _squeezed(
    path: Path,
    adapter: Adapter,
    how: str | None,
    options: list[str],
    data: str | None,
    rows: int | None,
    model: str | None,
) -> Squeezed:
    if how is None:
        how = "truncate" if issubclass(adapter.rung, Reweight) else "least-squares"
    recipe = build(Recipe, how, options)
    measured = data is not None or rows is not None or (path / RUN).is_file() or not recipe.tells(adapter.rung)
    if not measured and recipe.alone(adapter.rung):
        return Squeezed(compress.collapse(adapter, recipe.approximation(None, None, 0)), None)
    with busy("opening the base"):
        opened = restored(path, model)
    number = ROWS if rows is None else rows
    way = recipe.approximation(opened, data, number)
    held_out = list(opened.batches(opened.examples(data, None, number))) if measured else None
    with busy("collapsing"):
        return Squeezed(compress.collapse(opened.model, way, held_out=held_out), opened)


def _costs(adapter: Adapter, made: compress.Collapsed) -> str:
    """A sentence for a card: of what this LoRA is an approximation, and how good a one."""
    what = "the model's change" if made.measured_on == "held-out data" else "the update"
    rank = max(getattr(m, "r", 0) for m in made.adapter.methods.values())
    return (
        f"Collapsed into a plain LoRA (rank {rank} at most) from the {adapter.rung.__name__} above; relative error of "
        f"{what}, on {made.measured_on}: {made.error:.3g}."
    )


def _show(made: compress.Collapsed, to: Path | None) -> None:
    shell.write(to, {"error": made.error, "measured_on": made.measured_on, "errors": made.errors})
    if str(to) == "-":
        return
    worst = max(made.errors, key=lambda site: made.errors[site])
    mean = sum(made.errors.values()) / len(made.errors)
    what = "the model's change" if made.measured_on == "held-out data" else "the update"
    shell.note(
        f"relative error of {what}, on {made.measured_on}: {made.error:.3g}; "
        f"at its layers {mean:.3g} on average, {made.errors[worst]:.3g} at most ({worst})"
    )
