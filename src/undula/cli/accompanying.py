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
from .carry import carry


def accompany(paths: Sequence[Path], outline: Adapter, note: str, folder: Path, out: Path, dropped: bool) -> None:
    """The run of the first, where all are of one task, so that the directory opens as that does; and a README that
    says of what it is made.  `dropped`: what they trained in full was left out."""
    if _one_task(paths) and not (dropped and any(head(path).outline().full for path in paths)):
        carry(paths[0], outline, folder)
        run = described(folder, outline)
        put(replace(of_run(replace(run, out=out), outline), notes=(note, "")), folder)
    else:
        files.write_text(folder / "README.md", f"{README}\n{note}\n")


def _one_task(paths: Sequence[Path]) -> bool:
    """Whether all are runs of one task that answers alike."""
    if not all((path / RUN).is_file() for path in paths):
        return False
    tasks = [described(path, head(path).outline()).task for path in paths]
    first = tasks[0]
    names = getattr(first, "names", None)
    return all(type(t) is type(first) and getattr(t, "names", None) == names for t in tasks)
