"""The figure of a range test (`train.tuning`): the loss after a step at each rate.  matplotlib comes with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..core.extras import told
from . import drawing


@told
def draw(curve: Sequence[tuple[float, float]], before: float, proposed: float, path: str | Path) -> None:
    """Draws (rate, loss) pairs, the loss before, and the rate that is proposed.  The file type follows the name."""
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    shown = [(rate, loss) for rate, loss in curve if math.isfinite(loss) and loss <= 2 * before]
    title = f"Range test: {proposed:g} is proposed"
    with drawing.styled():
        figure = drawing.blank(560, 340, layout="constrained")
        axis = figure.subplots()
        axis.axhline(before, color=drawing.LIGHT["pale"], ls="--", lw=1, label="before")
        axis.plot(*zip(*shown, strict=True), "o-", color=drawing.LIGHT["win"], ms=3.5, label="after a step at the rate")
        axis.axvline(proposed, color=drawing.LIGHT["loss"], lw=1, label=f"proposed: {proposed:g}")
        axis.set(xscale="log", xlabel="learning rate", ylabel="loss of the same rows")
        axis.xaxis.set_major_formatter(lambda value, _: drawing.number(value))
        axis.xaxis.set_minor_formatter("")
        axis.legend(frameon=False, fontsize=8)
        axis.set_title(title, fontsize=10)
        path.write_bytes(drawing.rendered(figure, path.suffix[1:], title))
