"""`undula show`, `merge`, `prune` and `cut`: what can be done with a trained adapter."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from .. import ranks
from ..core.adapter import Adapter
from ..core.extras import needs
from ..host import merging
from ..io.importing import partly
from ..io.whole import whole
from ..observe.diagnose import COLUMNS, diagnose, needs_data
from ..observe.figure import draw
from ..train import Restored, restored
from ..train import dense as unquantised
from ..train.base import called_elsewhere, config_of, quiet
from ..train.card import Card, put
from ..train.restored import described
from ..train.worries import reported, worries
from . import regime, shell
from .carry import carry, maker, tell
from .progress import busy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def show(
    path: shell.Directory,
    *,
    rows: Annotated[
        int | None, typer.Option(help="Run so many rows through the model too (AuroRA's numbers).", min=1)
    ] = None,
    data: shell.Data = None,
    model: shell.Base = None,
    norms: Annotated[
        bool, typer.Option("--norms", help="Instead: how large q, k and v of its attention are, by rows.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw spectra, ranks and nonlinearity into this file.")] = None,
    to: shell.Json = None,
) -> None:
    """Tell what an adapter really is: ranks, norms, how nonlinear; and what should worry its owner."""
    if norms:
        if plot is not None:
            raise ValueError("--plot draws what `undula show` tells without --norms: leave out one of them")
        regime.show(path, model, data, rows, to)
        return
    adapter = Adapter.load(path)
    if rows is None and data is None and model is None:
        found = diagnose(adapter)
    else:
        opened = restored(path, model)
        asked = [option for option, given in (("--rows", rows), ("--data", data)) if given is not None]
        tell = needs_data(adapter)
        found = diagnose(opened.model, opened.batches(opened.examples(data, None, rows)) if asked and tell else None)
        if asked and not tell:
            shell.note(
                f"{' and '.join(asked)}: no row was run, since rows tell something only of a method that bends between "
                "A and B (AuroRA). What is shown comes from the factors and from the base, as with --model"
            )
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
    for warning in [*whole["warnings"], *worries(reported(path))]:
        shell.remark(warning)


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
    dense: Annotated[
        bool,
        typer.Option("--dense", help="Write dense float32 weights: of a quantised or 16-bit base, all that counts."),
    ] = False,
    shard: Annotated[
        str, typer.Option("--max-shard-size", help="Of one file of weights: 5GB, 500MB; larger models get several.")
    ] = "50GB",
) -> None:
    """Write the base with the adapter merged in, as an ordinary Hugging Face folder, in the number type of the base's
    own files."""
    if re.fullmatch(r"[1-9]\d*(KB|MB|GB)", shard) is None:
        raise ValueError(f"--max-shard-size is a number with KB, MB or GB, as in 5GB; found {shard!r:.40}")
    shell.fresh(out)
    with busy("opening the base"):
        opened = restored(path, model, None if dense else _narrow(path, model))
    rounded = _rounds(opened.model)
    if dense and not rounded:
        shell.note("--dense changes nothing: the base is neither quantised nor of 16 bits")
    if dense:
        opened = unquantised(opened)
        opened.model.float()
    with warnings.catch_warnings(), busy("merging"):
        warnings.simplefilter("ignore", merging.LossyMerge)  # said below, with what to type
        errors = merging.merge(opened.model, keep=False)
    write_whole(opened, out, shard)
    worst = f"; storing them costs {max(errors.values()):.1e} of the change at most" if errors else ""
    shell.note(f"{len(errors)} layers merged{worst}. Saved in {out}")
    if told := merging.lossy(errors):
        shell.remark(f"{told}. " + ("Merge with --dense" if rounded else "Keep the adapter beside the base"))


@needs("train")
def _narrow(path: Path, model: str | None) -> torch.dtype | None:
    """The 16-bit type in which the base's own files are, where they are: a merged model is as large as its base."""
    run = described(path, partly(path), model)
    config = config_of(model or run.model)
    own = getattr(config, "dtype", None)
    return own if own in (torch.bfloat16, torch.float16) and not hasattr(config, "quantization_config") else None


def write_whole(opened: Restored, out: Path, shard: str = "50GB", note: str = "") -> None:
    """Writes a model that stands for itself, its adapter being merged, as a folder that is complete or not there;
    `shard` is the size of a file of weights at most, `note` a paragraph of its card."""
    tell(opened.model.config, opened.run.task, opened.roles)
    with whole(out) as folder, quiet(), busy(f"writing {out}"):
        try:
            opened.model.save_pretrained(folder, max_shard_size=shard)
            opened.run.task.beside(opened.model, folder)
        except NotImplementedError as error:  # what transformers raises for quantisation that it only reads
            raise RuntimeError("transformers cannot write this quantised base: merge with --dense") from error
        if opened.processor is not None:
            opened.processor.save_pretrained(folder)
        put(_card(opened, out, note), folder)


def _card(opened: Restored, out: Path, note: str) -> Card:
    run, labels = opened.run, dict[Any, Any](opened.model.config.id2label or {})
    names = [str(labels[i]) for i in sorted(labels)] if getattr(run.task, "names", ()) else []
    base = called_elsewhere(run.model)
    kind = maker(opened.processor)
    notes = (note, "") if note else ()
    return Card("whole", out.resolve().name, run.task, base, run.model, opened.adapter, names, kind, notes)


def _rounds(model: PreTrainedModel) -> bool:
    """Whether the base holds its weights in fewer bits than a merge needs."""
    if getattr(model, "is_quantized", False):
        return True
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())


def prune(path: shell.Directory, *, out: shell.Out) -> None:
    """Leave the live ranks of a gated adapter as a plain LoRA; what it computes stays.

    This takes ranks from an adapter and nothing from its base: for a smaller base see `undula prune-base`."""
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
    adapter = Adapter.load(path)
    made = less(adapter)
    with whole(out) as folder:
        made.save(folder)
        carry(path, made, folder)
    before, after = adapter.num_parameters(), made.num_parameters()
    sites = f"{len(made.methods)} of {len(adapter.methods)} layers"
    shell.note(f"{sites}, {after:,} of {before:,} parameters stay. Saved in {out}")
