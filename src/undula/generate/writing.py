"""A generated adapter as an ordinary directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..core.adapter import Adapter
from ..io.whole import whole
from ..train.base import called_elsewhere
from ..train.card import of_run, put
from ..train.run import Run
from ..train.tasks.task import Task


def write(adapter: Adapter, out: str | Path, model: str, task: Task, note: str) -> None:
    """Writes what `undula predict`, `show` and `train --from` open: the adapter, what it is for, a card with `note`.
    Raises FileExistsError where OUT holds something."""
    run = Run(model=model, data="", task=task, method=adapter.method, out=Path(out))
    if names := getattr(task, "names", ()):
        adapter = dataclasses.replace(adapter, about={**adapter.about, "classes": list(names)})
    with whole(Path(out)) as folder:
        adapter.save(folder, base=called_elsewhere(model), task=task.peft)
        dataclasses.replace(run, out=folder).save(None)
        put(dataclasses.replace(of_run(run, adapter), notes=(note, "")), folder)
