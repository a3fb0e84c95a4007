"""What goes into the directory of a combination beside the adapter: whose run it is, and of what it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.adapter import Adapter
from ..io import files
from ..io.native import README
from ..io.outline import head
from ..train.card import of_run, put
from ..train.restored import described
from ..train.run import RUN
from ..train.tasks.task import Task
from .carry import carry


def accompany(paths: Sequence[Path], outline: Adapter, note: str, folder: Path, out: Path, dropped: bool) -> str:
    """The run of the first, where all are of one task, so that the directory opens as that does; and a README that
    says of what it is made.  `dropped`: what they trained in full was left out.  Returns what to tell of runs of
    several tasks, empty where they are of one."""
    told = ""
    if _one_task(paths) and not (dropped and any(head(path).outline().full for path in paths)):
        carry(paths[0], outline, folder)
        run = described(folder, outline)
        put(replace(of_run(replace(run, out=out), outline), notes=(note, "")), folder)
    else:
        if all((path / RUN).is_file() for path in paths) and not _one_task(paths):
            told = (
                f"They were trained for several tasks, so {out} names none, and `undula predict` cannot answer by it: "
                f"`undula train --from {out} --task ...` trains it on rows of one, and names that"
            )
        files.write_text(folder / "README.md", f"{README}\n{note}\n" + (f"\n{told}\n" if told else ""))
    return told


def _one_task(paths: Sequence[Path]) -> bool:
    """Whether all are runs of one task that answers alike."""
    if not all((path / RUN).is_file() for path in paths):
        return False
    tasks = [described(path, head(path).outline()).task for path in paths]
    first = tasks[0]
    return all(type(t) is type(first) and _answers(t) == _answers(first) for t in tasks)


def _answers(task: Task) -> tuple[object, ...]:
    """The classes of a task, with what tells them."""
    return getattr(task, "names", None), getattr(task, "prompts", None)
