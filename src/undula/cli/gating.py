"""`undula combine --how gates`: adapters side by side, behind gates that train on rows of the mixed task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..combine.fusing import fused
from ..core.adapter import Adapter
from ..io.whole import whole
from ..train.base import same_base
from . import shell
from .accompanying import accompany

GATES = "gates"


def gate(
    paths: Sequence[Path],
    weights: Sequence[float] | None,
    others: Mapping[str, object],
    drop_full: bool,
    out: Path,
    to: Path | None,
) -> None:
    """Writes the adapters behind half-open gates: the function is that of their sum until the gates train."""
    if given := [option for option, value in others.items() if value not in (None, [])]:
        raise ValueError(f"gates leave nothing out and look at no rows before they train: leave out {', '.join(given)}")
    values = [Adapter.load(path) for path in paths]
    if drop_full:
        values = [replace(a, full={}) for a in values]
    made = fused(values, weights, lambda one, other: same_base(one, other) or same_base(other, one))
    with whole(out) as folder:
        made.save(folder)
        names = ", ".join(path.resolve().name for path in paths)
        accompany(paths, made, f"{names} behind gates, which start half open: the sum of the adapters.", folder, out,
                  drop_full)  # fmt: skip
    trains = made.num_parameters()
    shell.write(to, {"how": GATES, "adapters": [str(p) for p in paths], "layers": list(made.methods), "trains": trains})
    if str(to) != "-":
        shell.note(f"{len(paths)} adapters behind gates: {len(made.methods)} layers, {trains:,} numbers train")
        shell.note(f"Saved in {out}; `undula train --from {out} ...` trains the gates on rows of the task")
