# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula show`, `merge`, `collapse`, `prune`, `cut` and `export`: what can be done with a trained adapter."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import compress, merging, ranks
from ..adapter import Adapter
from ..choice import Choice
from ..diagnose import diagnose
from ..figure import draw
from ..io import export_lora
from ..method import LowRank, Reweight
from ..options import build
from ..train import Restored, restored
from ..train import dense as unquantised
from ..train.run import RUN, Run
from . import shell

How = Annotated[str | None, typer.Option(help="truncate, substitute or least-squares. (default: by the rung)")]
Rows = Annotated[int, typer.Option(help="Rows to calibrate on, and as many others to measure the error on.")]


class Recipe(Choice):
    """A way to collapse as a command line can name it: data come from the adapter's own training."""

    def approximation(self, opened: Restored, data: str | None, rows: int) -> compress.Approximation:
        """The way itself."""
        raise NotImplementedError


@Recipe.register
@dataclasses.dataclass(frozen=True)
class Truncate(Recipe):
    """See `undula.Truncate`."""

    r: int = 8

    def approximation(self, opened: Restored, data: str | None, rows: int) -> compress.Approximation:
        return compress.Truncate(self.r)


@Recipe.register
@dataclasses.dataclass(frozen=True)
class Substitute(Recipe):
    """See `undula.Substitute`."""

    def approximation(self, opened: Restored, data: str | None, rows: int) -> compress.Approximation:
        return compress.Substitute()


@Recipe.register
@dataclasses.dataclass(frozen=True)
class LeastSquares(Recipe):
    """See `undula.LeastSquares`."""

    r: int = 8
    ridge: float = 1e-3
    bias: bool = False

    def approximation(self, opened: Restored, data: str | None, rows: int) -> compress.Approximation:
        calibration = list(opened.batches(opened.examples(data, "train", rows)))
        return compress.LeastSquares(self.r, calibration, self.ridge, self.bias)


COLUMNS: tuple[str, ...] = ("site", "rank", "norm", "relative_norm", "effective_rank", "stable_rank")
COLUMNS += ("nonlinearity", "bf16_changed", "stability", "outside")


def show(
    path: shell.Directory,
    *,
    rows: Annotated[int | None, typer.Option(help="Run so many rows through the model too (AuroRA's numbers).")] = None,
    data: shell.Data = None,
    model: shell.Base = None,
    plot: Annotated[Path | None, typer.Option(help="Draw spectra, ranks and nonlinearity into this file.")] = None,
    to: shell.Json = None,
) -> None:
    """Tell what an adapter really is: ranks, norms, how nonlinear; and what should worry its owner."""
    if rows is None and data is None:
        found = diagnose(Adapter.load(path))
    else:
        opened = restored(path, model)
        found = diagnose(opened.model, opened.batches(opened.examples(data, None, rows)))
    shell.write(to, found)
    if plot is not None:
        draw(found, plot)
    if str(to) == "-":
        return
    sites, whole = found[:-1], found[-1]
    told = [c for c in COLUMNS if any(row[c] is not None for row in found)]
    below = _shared([row["site"] for row in sites])
    shown = [{c: row[c] for c in told} | {"site": row["site"].removeprefix(below)} for row in found]
    shell.out.print(shell.table(shown, f"below {below[:-1]}" if below else None))
    shell.note(f"{whole['method']}: {whole['parameters']:,} parameters, rung {whole['rung']}")
    for warning in whole["warnings"]:
        shell.say(warning, "yellow")


def _shared(names: list[str]) -> str:
    """The modules, with a dot behind, in which all of these are."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    return "".join(f"{level[0]}." for level in shared)


def merge(
    path: shell.Directory,
    *,
    out: shell.Out,
    model: shell.Base = None,
    dense: Annotated[bool, typer.Option("--dense", help="Dequantise a quantised base first.")] = False,
) -> None:
    """Write the base with the adapter merged in, as an ordinary Hugging Face folder."""
    shell.fresh(out)
    opened = unquantised(restored(path, model)) if dense else restored(path, model)
    errors = merging.merge(opened.model, keep=False)
    try:
        opened.model.save_pretrained(out)
    except NotImplementedError as error:  # what transformers raises for forms of quantisation that it only reads
        shutil.rmtree(out)
        raise RuntimeError("transformers cannot write this quantised base: merge with --dense") from error
    opened.processor.save_pretrained(out)
    worst = f"; storing them costs {max(errors.values()):.1e} of the change at most" if errors else ""
    shell.note(f"{len(errors)} layers merged{worst}. Saved in {out}")


def collapse(
    path: shell.Directory,
    *,
    out: shell.Out,
    how: How = None,
    options: shell.Set = [],
    rows: Rows = 256,
    data: shell.Data = None,
    model: shell.Base = None,
    to: shell.Json = None,
) -> None:
    """Turn any adapter into a plain low-rank one; the error that this costs is measured and printed."""
    shell.fresh(out)
    opened = restored(path, model)
    made = _collapsed(opened, how, options, data, rows)
    made.adapter.save(out, base=opened.folder, task=opened.run.task.peft)
    _carry(opened.run, made.adapter, out)
    _show_collapsed(made, to)
    if str(to) != "-":
        shell.note(f"Saved in {out}")


def _carry(run: Run, adapter: Adapter, out: Path) -> None:
    """The run that made an adapter, beside what has become of it: what it is for, not how to train it again."""
    method = adapter.method if adapter.methods else None
    dataclasses.replace(run, out=out, method=method, allocator=None, overrides={}).save(None)


def prune(path: shell.Directory, *, out: shell.Out) -> None:
    """Leave the live ranks of a gated adapter as a plain LoRA; what it computes stays."""
    _lessened(path, out, ranks.prune.prune)


def cut(
    path: shell.Directory,
    *,
    rank: Annotated[int, typer.Option(help="How many of the first ranks to keep.")],
    out: shell.Out,
) -> None:
    """Keep the first ranks of an adapter that was trained at every rank (DyLoRA), as a plain LoRA."""
    _lessened(path, out, lambda adapter: adapter.at_rank(rank))


def _lessened(path: Path, out: Path, less: Callable[[Adapter], Adapter]) -> None:
    shell.fresh(out)
    adapter, config = Adapter.load(path), _config(path)
    made = less(adapter)
    made.save(out, config.get("base_model_name_or_path"), config.get("task_type"))
    if (path / RUN).is_file():
        _carry(Run.load(path), made, out)
    before, after = adapter.num_parameters(), made.num_parameters()
    sites = f"{len(made.methods)} of {len(adapter.methods)} layers"
    shell.note(f"{sites}, {after:,} of {before:,} parameters stay. Saved in {out}")


def _collapsed(
    opened: Restored, how: str | None, options: list[str], data: str | None, rows: int
) -> compress.Collapsed:
    if how is None:
        how = "truncate" if issubclass(opened.adapter.rung, Reweight) else "least-squares"
    way = build(Recipe, how, options).approximation(opened, data, rows)
    return compress.collapse(opened.model, way, held_out=list(opened.batches(opened.examples(data, None, rows))))


def _show_collapsed(made: compress.Collapsed, to: Path | None) -> None:
    shell.write(to, {"error": made.error, "measured_on": made.measured_on, "errors": made.errors})
    if str(to) == "-":
        return
    worst = max(made.errors, key=lambda site: made.errors[site])
    mean = sum(made.errors.values()) / len(made.errors)
    shell.note(
        f"relative error of the model's change, on {made.measured_on}: {made.error:.3g}; "
        f"at its layers {mean:.3g} on average, {made.errors[worst]:.3g} at most ({worst})"
    )


class Form(StrEnum):
    """The forms in which an adapter can leave."""

    peft = "peft"


def export(
    path: shell.Directory,
    *,
    out: shell.Out,
    form: Annotated[
        Form, typer.Option("--format", help="peft: a plain LoRA that PEFT, vLLM and others read.")
    ] = Form.peft,
    how: How = None,
    options: shell.Set = [],
    rows: Rows = 256,
    data: shell.Data = None,
    model: shell.Base = None,
) -> None:
    """Write an adapter as a plain LoRA.  What is none is collapsed first, and the error of that printed."""
    shell.fresh(out)
    adapter = Adapter.load(path)
    if issubclass(adapter.rung, LowRank):
        config = _config(path)
        export_lora(adapter, out, config.get("base_model_name_or_path"), config.get("task_type"))
        shell.note(f"exported exactly (a method on the rung LowRank). Saved in {out}")
        return
    opened = restored(path, model)
    made = _collapsed(opened, how, options, data, rows)
    export_lora(made.adapter, out, opened.folder, opened.run.task.peft)
    shell.note(f"on the rung {adapter.rung.__name__} there is no exact LoRA: collapsed first")
    _show_collapsed(made, None)
    shell.note(f"Saved in {out}")


def _config(path: Path) -> dict[str, Any]:
    from ..io import files

    return files.read(path)[0]
