"""`undula prune-base`: a smaller dense model, by LoRAPrune."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.extras import needs
from ..host import merging
from ..train import Run, restored
from ..train.fields import OUTPUT, PANELS
from . import adapters, declared, shell, training
from .progress import busy

if TYPE_CHECKING:
    from ..compress.prune_base import Pruned

PANEL = "Pruning"
TRAINED = Annotated[
    Path | None, typer.Argument(help="A run that has been trained with LoRAPrune already. (default: train one)")
]
OUT = Annotated[Path, typer.Option("--out", help="The directory of the smaller model.", rich_help_panel=OUTPUT)]
RUN = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="The directory of its training: report, checkpoints, the adapter with its masks. (default: OUT-run)",
        rich_help_panel=OUTPUT,
    ),
]
SPARSITY = Annotated[
    float,
    typer.Option(help="Share of the entries of the matrices of heads and channels that goes.", rich_help_panel=PANEL),
]
STRUCTURES = Annotated[
    str,
    typer.Option(
        help="heads (whole groups of keys and values), channels of the feed-forward blocks, or both.",
        metavar="heads,channels",
        rich_help_panel=PANEL,
    ),
]
SCORES = Annotated[
    str, typer.Option(help="What chooses them: gradients, or to compare magnitude, random.", rich_help_panel=PANEL)
]
EVERY = Annotated[int, typer.Option(help="Updates between two masks.", min=1, rich_help_panel=PANEL)]
OWN = ("allocator", "allocator_set", "out", "full", "bits", "overrides")  # of a training: said here, or refused


def prune_base(ctx: typer.Context, **typed: Any) -> None:
    """Take attention heads and channels out of a model while an adapter trains on it (LoRAPrune).  The adapter is
    merged, and what is left is written as an ordinary, smaller Hugging Face folder.

    All layers lose the same number, so that plain transformers opens it.  Architectures in which it could not are
    refused before anything is trained.  `undula prune` is another verb: it takes ranks from an adapter and leaves the
    base alone.
    """
    path, out, to = typed["path"], typed["out"], typed["to"]
    shell.fresh(out)
    if path is not None:
        given = [
            option for name, option in training.typed_options(ctx).items() if name not in ("path", "out", "to", *FREE)
        ]
        if given:
            raise ValueError(f"{path} has been trained: leave out {', '.join(given)}, which would change nothing")
        _write(path, out, to)
        return
    needed = [name for name in ("model", "data", "task") if typed[name] is None]
    if needed:
        raise ValueError(f"prune-base needs {', '.join(f'--{name}' for name in needed)}, or the directory of a run")
    run = Run(**declared.values(Run, _filled(typed), {}, {}))
    training._fit(run, False, None, [], None)
    _write(run.out, out, to)


FREE = ("quiet", "verbose", "threads")


def _filled(typed: dict[str, Any]) -> dict[str, Any]:
    """What was typed as options of a training with LoRAPrune."""
    out: Path = typed["out"]
    run = typed["run"] or out.with_name(f"{out.name}-run")
    spec = ["lora-prune", f"sparsity={typed['sparsity']}", f"every={typed['every']}"]
    options = [f"structures={typed['structures']}", f"scores={typed['scores']}"]
    given = {**typed, "out": run, "allocator": ",".join(spec), "allocator_set": options}
    return given | {"full": [], "bits": None, "overrides": []}


def _signature() -> inspect.Signature:
    options = [p for p in declared.parameters(Run, training.USUAL) if p.name not in OWN]
    options += [
        declared.option("out", OUT, inspect.Parameter.empty),
        declared.option("run", RUN),
        declared.option("sparsity", SPARSITY, 0.5),
        declared.option("structures", STRUCTURES, "heads,channels"),
        declared.option("scores", SCORES, "gradients"),
        declared.option("every", EVERY, 10),
        declared.option("to", training.JSON),
    ]
    path = inspect.Parameter("path", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=TRAINED)
    return declared.signature(options, training.EARLY, (*PANELS[:2], PANEL, *PANELS[2:]), [path])


prune_base.__signature__ = _signature()  # type: ignore[attr-defined]


@needs("train")
def _write(path: Path, out: Path, to: Path | None) -> None:
    """Takes away what the run in `path` has closed, merges its adapter, writes the model to `out`."""
    from ..compress.prune_base import prune_base as smaller

    with busy("taking away what is closed"):
        opened = restored(path)
        made = smaller(opened.model)
        errors = merging.merge(opened.model, keep=False)
    parts = [f"{kind}: {after:,} of {before:,} in each layer" for kind, (before, after) in made.structures.items()]
    stay = f"{made.after:,} of {made.before:,} parameters stay"
    adapters.write_whole(opened, out, note=f"Pruned while it was trained (LoRAPrune): {'; '.join(parts)}; {stay}.")
    shell.write(to, _told(made, path, out))
    if str(to) == "-":
        return
    for part in parts:
        shell.note(part)
    worst = max((e for e in errors.values() if math.isfinite(e)), default=0.0)
    told = f"; storing the merged weights costs {worst:.1e} of the change at most" if worst > 1e-3 else ""
    shell.note(f"{stay}{told}. Saved in {out}, its training in {path}")


def _told(made: Pruned, path: Path, out: Path) -> dict[str, Any]:
    return {
        "structures": {kind: {"before": b, "after": a} for kind, (b, a) in made.structures.items()},
        "parameters": {"before": made.before, "after": made.after},
        "out": str(out),
        "run": str(path),
    }
