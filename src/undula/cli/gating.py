"""`undula combine --how gates`: adapters side by side, behind gates that train on rows of the mixed task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..combine.fusing import fused
from ..core.adapter import Adapter
from ..core.options import split_pair
from ..io.whole import whole
from ..train.base import same_base
from . import shell
from .accompanying import accompany

GATES = "gates"


def gate(
    paths: Sequence[Path],
    weights: Sequence[float] | None,
    options: Sequence[str],
    others: Mapping[str, object],
    drop_full: bool,
    out: Path,
    to: Path | None,
) -> None:
    """Writes the adapters behind half-open gates: until these train the function is that of a `share` of their sum."""
    if given := [option for option, value in others.items() if value not in (None, [])]:
        raise ValueError(f"gates leave nothing out and look at no rows before they train: leave out {', '.join(given)}")
    values = [Adapter.load(path) for path in paths]
    if drop_full:
        values = [replace(a, full={}) for a in values]
    share = _share(options)
    made = fused(values, weights, lambda one, other: same_base(one, other) or same_base(other, one), share=share)
    with whole(out) as folder:
        made.save(folder)
        names = ", ".join(path.resolve().name for path in paths)
        note = f"{names} behind gates, which start half open: {share:g} of the sum."
        told = accompany(paths, made, note, folder, out, drop_full)
    if told:
        shell.remark(told)
    trains = made.num_parameters()
    shell.write(to, {"how": GATES, "adapters": [str(p) for p in paths], "layers": list(made.methods), "trains": trains})
    if str(to) != "-":
        shell.note(f"{len(paths)} adapters behind gates: {len(made.methods)} layers, {trains:,} numbers train")
        shell.note(f"Saved in {out}; `undula train --from {out} ...` trains the gates on rows of the task")


def _share(options: Sequence[str]) -> float:
    """`share=0.5` of the options.  Raises LookupError, ValueError."""
    said = dict(split_pair(pair, "an option") for pair in options)
    if set(said) - {"share"}:
        raise LookupError(f"gates have no option {', '.join(set(said) - {'share'})}; they have: share")
    try:
        return float(said.get("share", "1"))
    except ValueError:
        raise ValueError(f"share is a number above 0, found {said['share']!r:.40}") from None
