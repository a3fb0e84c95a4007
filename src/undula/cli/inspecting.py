"""`undula inspect`: what an adapter of any kind is, without opening more than its headers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..io.inspecting import inspect as looked_at
from . import shell
from .progress import busy

if TYPE_CHECKING:
    from ..io.inspecting import Inspected
    from ..io.spots import Spot

MOST_LINES = 200  # of layers that are not alike: a terminal shows no more, and a file may say any number
NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)|^\d+(?=[._]|$)")


def inspect(
    path: Annotated[
        Path, typer.Argument(help="A file (.safetensors, .gguf) or directory with an adapter of any kind.")
    ],
    *,
    every: Annotated[bool, typer.Option("--all", help="A line for each layer, not for each kind of layer.")] = False,
    to: shell.Json = None,
) -> None:
    """Show an adapter of any kind, whoever made it: LoRA, LoHa, LoKr, IA3, OFT, prompts ...; and what undula could do
    with it.

    Headers alone are read, and pickles never: nothing of the file is run.
    """
    with busy("reading headers"):
        found = looked_at(path)
    shell.write(to, found.encode())
    if str(to) == "-":
        return
    rows = _rows(found, every)
    shown = rows if every else rows[:MOST_LINES]
    shell.out.print(shell.table(shown) if rows else "no tensors", highlight=False)
    if len(shown) < len(rows):
        shell.note(f"{len(rows) - len(shown):,} more lines: --all shows them, --json FILE writes them")
    size, tensors = sum(found.files.values()), sum(found.dtypes.values())
    types = ", ".join(f"{n:,} {kind}" for kind, n in found.dtypes.items())
    shell.note(f"{found.kind}; stored as: {found.form}")
    shell.note(f"base: {found.base or 'not said'}" + (f"; task: {found.task}" if found.task else ""))
    shell.note(f"{found.parameters:,} numbers in {tensors:,} tensors ({types}), {size:,} bytes in {_files(found)}")
    for note in found.notes:
        shell.remark(note)
    verdict = {"train": "can be loaded and trained on", "import": "can be imported", "show": "can be shown only"}
    shell.note(f"{verdict[found.use]}: {found.why}")


def _files(found: Inspected) -> str:
    return f"{len(found.files)} files" if len(found.files) > 1 else next(iter(found.files), "no file")


def _rows(found: Inspected, every: bool) -> list[dict[str, Any]]:
    """The table: layers that differ in the numbers of their names alone share a line."""
    lines: dict[tuple[Any, ...], list[Spot]] = {}
    for spot in found.sites:
        name = spot.site if every else NUMBER.sub("*", spot.site)
        lines.setdefault((name, spot.kind, spot.rank, spot.alpha, spot.scale, spot.shape, spot.dtype), []).append(spot)
    return [
        {
            "site": name if len(spots) > 1 else spots[0].site,
            "layers": len(spots),
            "kind": kind,
            "rank": rank,
            "alpha": alpha,
            "scale": scale,
            "O x I": None if shape is None else f"{shape[0]} x {shape[1]}",
            "dtype": dtype,
            "numbers": sum(spot.parameters for spot in spots),
        }
        for (name, kind, rank, alpha, scale, shape, dtype), spots in lines.items()
    ]
