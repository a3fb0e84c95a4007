"""The figures of both scripts, small SVGs that are the same each time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "pointclouds"
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def saved(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, dpi=80)
    plt.close(figure)


def detection(path: Path, found: dict[str, Any], model: Any, shown: Any) -> None:
    """Precision of every way, one test scan with boxes, and time against tokens."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 3.8), width_ratios=(1.25, 1, 1))
    _ways(left, found)
    _scan(middle, model, shown)
    tokens = [row["tokens"] for row in found["times"]]
    for kind, colour in zip(("scan", "attention"), COLOURS, strict=False):
        right.loglog(tokens, [row[kind] for row in found["times"]], "o-", color=colour, label=kind)
    right.set(xlabel="tokens", ylabel="seconds of CPU", title="one forward over one sequence")
    right.minorticks_off()
    right.set_xticks(tokens, [f"{t:,}" for t in tokens])
    right.legend()
    saved(figure, path)


def _ways(axes: Any, found: dict[str, Any]) -> None:
    names = list(dict.fromkeys(row["way"] for row in found["rows"]))
    for i, name in enumerate(names):
        each = [row["AP"] for row in found["rows"] if row["way"] == name]
        axes.barh(i, statistics.mean(each), color=COLOURS[0], alpha=0.6)
        axes.plot(each, [i] * len(each), "k.", markersize=5)
    for (name, row), colour, line in zip(found["without"].items(), COLOURS[1:], ("-", "--", ":"), strict=False):
        axes.axvline(row["AP"], color=colour, linestyle=line, label=name)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="AP on 16 beams (dots: seeds)", title=f"{found['size']['few']} scans of 16 beams")
    axes.legend(fontsize=7, loc="lower right")


def _scan(axes: Any, model: Any, shown: Any) -> None:
    from boxes import CELL, LOW, found

    high = shown.cells[shown.features[:, 3] > 0.3] + 0.5
    axes.plot(*(high[:, i] * CELL[i] + LOW[i] for i in (1, 0)), ".", markersize=1.5, color="0.5", rasterized=True)
    boxes, _, scores = found(model, [shown])[0]
    sets = ((shown.boxes, COLOURS[2], 2.5), (boxes[scores > 0.3], COLOURS[3], 1))
    for each, colour, width in sets:
        for box in each.numpy():
            corners = outline(box)
            axes.plot(corners[:, 1], corners[:, 0], color=colour, linewidth=width)
    axes.set(xlim=(20, -20), ylim=(0, 40), aspect="equal", title="64 beams: true (green), found (red)")


def outline(box: Any) -> Any:
    """(5, 2) corners of a box from above, the first again at the end."""
    c, s = np.cos(box[6]), np.sin(box[6])
    corners = np.array([(1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1)]) * box[3:5] / 2
    return corners @ np.array([[c, s], [-s, c]]) + box[:2]


def forest(path: Path, found: dict[str, Any], plots: Sequence[tuple[str, Any, Any]]) -> None:
    """F1 over density of every model, and plots from above, coloured by instance: (title, points, instance)."""
    widths = sorted({row["width"] for row in found["rows"]})
    figure, axes = plt.subplots(1, len(widths) + len(plots), figsize=(3.2 * (len(widths) + len(plots)), 3.6))
    for ax, width in zip(axes, widths, strict=False):
        _curves(ax, [row for row in found["rows"] if row["width"] == width], f"{width} channels")
    for ax, (title, points, instance) in zip(axes[len(widths) :], plots, strict=True):
        colours = np.array([(0.8, 0.8, 0.8, 1), *plt.get_cmap("tab20").colors], dtype=object)
        shown = [colours[0] if i < 0 else colours[1 + i % 20] for i in instance]
        ax.scatter(points[:, 0], points[:, 1], s=4, linewidths=0, c=shown, rasterized=True)
        ax.set(aspect="equal", title=title, xticks=[], yticks=[])
    saved(figure, path)


def _curves(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    for i, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = [row for row in rows if row["model"] == name]
        densities = sorted({row["density"] for row in own})
        each = [[row["F1"] for row in own if row["density"] == d] for d in densities]
        axes.semilogx(densities, [statistics.mean(e) for e in each], "o-", color=COLOURS[i], label=name, markersize=3)
    axes.set(ylim=(0, 1), xlabel="points per m2", ylabel="F1 of trees", title=title)
    axes.legend(fontsize=7)
