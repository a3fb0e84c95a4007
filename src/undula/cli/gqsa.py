# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula gqsa`: a base in 4-bit groups, of which a part is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..core.extras import needs
from ..host import merging
from ..io.whole import whole
from ..methods.lora import LoRA
from ..train import Run, Task, restored
from ..train.base import open_model, quiet
from ..train.rows import rows_of
from ..train.run import RUN
from ..train.tasks.task import Examples
from . import declared, shell

if TYPE_CHECKING:
    from ..compress.gqsa import Compressed

SOURCE = Annotated[
    str,
    typer.Argument(
        help="A model: a folder, a hub name, or bundled:NAME. Or the directory of a run that trained the scales and "
        "zeros of such a base: these are written into it.",
        metavar="MODEL|DIR",
    ),
]
EXCLUDE = Annotated[list[str], typer.Option(help="Layers to leave dense: a name, its end, or a glob. Repeatable.")]


def gqsa(
    source: SOURCE,
    *,
    out: shell.Out,
    sparsity: Annotated[float, typer.Option(help="Share of the groups of each row that goes.")] = 0.5,
    group: Annotated[int, typer.Option(help="Columns in a group.", min=2)] = 16,
    exclude: EXCLUDE = [],
    data: Annotated[
        str | None, typer.Option(help="Rows to calibrate on, as `train` reads them. (default: none)")
    ] = None,
    task: Annotated[str, typer.Option(help="Of the rows, and of the model.")] = "causal-lm",
    rows: Annotated[int, typer.Option(help="So many of them.", min=1)] = 64,
    batch: Annotated[int, typer.Option(help="Rows in a batch.", min=1)] = 4,
    steps: Annotated[
        int, typer.Option(help="That each block learns; 0: none, the rows choose the groups and fit them.", min=0)
    ] = 40,
    lr: Annotated[float, typer.Option(help="Of the kept weights while a block learns.", min=0)] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the sample of rows.", min=0)] = 0,
    to: shell.Json = None,
) -> None:
    """Store the linear layers of a model in 4 bits, in groups of which a part is kept (GQSA), each block calibrated on
    rows.  Adapters train on what it writes, and decoding reads it as it is stored.

    For the second stage, train scales and zeros alone (`undula train --model OUT --method none --full '*.scale' --full
    '*.zero'`), and give the run's directory to this verb.
    """
    shell.fresh(out)
    if (Path(source) / RUN).is_file():
        _tuned(Path(source), out, to)
        return
    _compress(source, out, to, (sparsity, group, exclude), (data, task, rows, batch, seed), (steps, lr))


@needs("train")
def _compress(source: str, out: Path, to: Path | None, form: Any, given: Any, learning: Any) -> None:
    from ..compress import bqpo
    from ..compress.gqsa import Form, check_fits, compress
    from ..integrations.gqsa import marked

    (sparsity, group, exclude), (data, task, rows, batch, seed), (steps, lr) = form, given, learning
    shape, kind = Form(sparsity, group), declared.member(Task, task)()
    batches: list[Any] = []
    if data is not None:
        run = Run(model=source, data=data, task=kind, method=LoRA(), out=out, train_rows=rows, batch=batch, seed=seed)
        read = rows_of(run)
        model, processor = open_model(source, read.task, torch.float32, seed)
        batches = list(_batches(Examples(read.task, read.train, processor), batch))
    else:
        model, processor = open_model(source, kind, torch.float32, seed)
    check_fits(model, shape, exclude)
    before = _bytes(model)
    if batches:
        with _bar(len(bqpo.blocks_of(model)[1])) as tick:
            made = bqpo.calibrated(model, batches, shape, bqpo.Learning(steps, lr), exclude, tick)
    else:
        made = compress(model, shape, exclude)
    _write(marked(model, shape), processor, out)
    _tell(to, made, before, out)


@contextlib.contextmanager
def _bar(blocks: int) -> Iterator[Callable[[int, int], None]]:
    """What counts the blocks in a bar on the error stream, where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("calibrating blocks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not shell.err.is_terminal or shell.voice.quiet
    with Progress(*columns, console=shell.err, disable=hidden, transient=True) as progress:
        bar = progress.add_task("", total=blocks)
        yield lambda done, of: progress.update(bar, completed=done, total=of)


def _batches(examples: Examples, size: int) -> Iterator[Any]:
    collate = examples.task.collator(examples.processor)
    for start in range(0, len(examples), size):
        yield collate([examples[i] for i in range(start, min(start + size, len(examples)))])


@needs("train")
def _tuned(path: Path, out: Path, to: Path | None) -> None:
    """The base of a run with the scales and zeros that it trained."""
    from ..compress.gqsa import compressed_layers

    opened = restored(path)
    layers = compressed_layers(opened.model)
    own = {f"{name}.{leaf}" for name in layers for leaf in ("scale", "zero")}
    if not layers or opened.adapter.methods or not opened.adapter.full or set(opened.adapter.full) - own:
        raise ValueError(
            f"{path} did not train the scales and zeros of such a base alone: --method none --full '*.scale' --full "
            "'*.zero'. An adapter is kept beside its base, or merged into a dense copy (`undula merge --dense`)"
        )
    merging.merge(opened.model, keep=False)
    _write(opened.model, opened.processor, out)
    shell.write(to, {"tuned": len(opened.adapter.full), "bytes": _size(out), "out": str(out)})
    if str(to) != "-":
        shell.note(
            f"{len(opened.adapter.full)} scales and zeros of {len(layers)} layers are as trained. Saved in {out}"
        )


def _write(model: Any, processor: Any, out: Path) -> None:
    with whole(out) as folder, quiet():
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)


def _bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _tell(to: Path | None, made: Compressed, before: int, out: Path) -> None:
    size, worst = _size(out), max(made.errors, key=lambda name: made.errors[name])
    mean = sum(made.errors.values()) / len(made.errors)
    shell.write(to, {"layers": len(made.errors), "bits": made.bits, "errors": dict(made.errors),
                     "bytes": {"before": before, "after": size}, "out": str(out)})  # fmt: skip
    if str(to) == "-":
        return
    shell.note(
        f"{len(made.errors)} layers at {made.bits:.2f} bits a weight; relative error of the weights {mean:.3g} on "
        f"average, {made.errors[worst]:.3g} at most ({worst})"
    )
    shell.note(f"{size / 1e6:,.1f} MB on disk, {before / 1e6:,.1f} in memory before. Saved in {out}")
