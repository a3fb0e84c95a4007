"""Where a training may begin: at an adapter that is there, of an earlier training, squeezed or combined."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.adapter import Adapter
from ..io import files
from ..io.outline import head
from .base import called_elsewhere, same_base
from .run import Run

BASES = "tasks"  # the stem of the two files in which a training leaves what its optimiser carries on


def with_method(run: Run) -> Run:
    """A run that begins from an adapter, with the method of that.  Raises ValueError where it names another, or the
    adapter says that it is for another base; FileNotFoundError."""
    assert run.begin_from is not None
    outline = head(run.begin_from).outline()
    said = outline.about.get("base_model_name_or_path")
    if said is not None and not same_base(run.model, said) and said != called_elsewhere(run.model):
        raise ValueError(f"the adapter in {run.begin_from} is for {said}, and this run trains on {run.model}")
    if run.method is not None and run.method not in outline.methods.values():
        raise ValueError(
            f"the adapter in {run.begin_from} has {outline.method!r}, and goes on with that; found {run.method!r}: "
            "leave out the method (--method)"
        )
    if run.optimiser.carries and not (Path(run.begin_from) / f"{BASES}.json").is_file():
        raise FileNotFoundError(
            f"{run.begin_from} has no {BASES}.json, which a training with {type(run.optimiser).__name__} leaves: train "
            "the task before with it too"
        )
    return dataclasses.replace(run, method=outline.method if outline.methods else None)


def bases(run: Run) -> dict[str, Tensor]:
    """What the trainings before have used, of a run whose optimiser carries that; none of a first one."""
    return {} if run.begin_from is None else files.read_state(Path(run.begin_from), BASES)[1]


def leave(optimizer: Any, folder: str | Path) -> None:
    """Writes what a training has used, with the trainings before it, of an optimiser that carries that."""
    closed = getattr(getattr(optimizer, "optimizer", optimizer), "closed", None)
    if closed is not None:
        files.write_state(Path(folder), BASES, {}, closed())


def carry(checkpoint: Path, out: Path) -> None:
    """Takes what `leave` has written from a training's last checkpoint to its directory."""
    files.write_state(out, BASES, *files.read_state(checkpoint, BASES))


def begun(run: Run, full: Sequence[str]) -> Adapter:
    """The adapter that a run begins from.  `full` is what this training trains in full: the adapter has to hold it.
    Raises ValueError."""
    assert run.begin_from is not None
    adapter = Adapter.load(run.begin_from)
    lacking = [name for name in full if name not in adapter.full]
    if lacking:
        raise ValueError(
            f"the adapter in {run.begin_from} does not hold {', '.join(lacking[:5])}, which trains in full here (the "
            "task's head, and full=): begin with one of the same task, or from the start"
        )
    classes, names = adapter.about.get("classes"), getattr(run.task, "names", ())
    if classes and names and list(classes) != list(names):
        raise ValueError(
            f"the adapter in {run.begin_from} answers the classes {', '.join(map(str, classes[:8]))}, in this order; "
            f"the rows have {', '.join(map(str, names[:8]))}. Name them as it does: Classification(names=...), or "
            "--task-set names=..."
        )
    return adapter
