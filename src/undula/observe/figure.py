"""The figure of `diagnose`: what the updates look like, site by site.  matplotlib is imported when it is drawn."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.extras import told

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
HALF_STEP = 2.0**-9  # of bfloat16: relative changes below this are mostly rounded away
INK, PALE = "#1b4965", "#9aa3a9"


@told
def draw(rows: list[Row], path: str | Path) -> None:
    """Left the spectra of dW, then effective ranks and nonlinearities, as far as there are any, a row for every site.
    The file type follows the name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites = [row for row in rows if row["site"] != "all"]
    spectra = [k for k in ("spectrum",) if any(row[k] for row in sites)]
    points = [k for k in ("effective_rank", "nonlinearity") if any(row[k] is not None for row in sites)]
    if not spectra and not points:
        raise ValueError(
            "the rows hold nothing that can be drawn: AuroRA has no dW, and how nonlinear it is needs data "
            "(diagnose(model, data))"
        )
    widths = [4.4] * len(spectra) + [3.2] * len(points)
    figure = Figure(figsize=(sum(widths) + 1.4, min(max(3.6, 0.17 * len(sites) + 1.6), 40)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for i, (axis, key) in enumerate(zip(axes, (*spectra, *points), strict=True)):
        if key == "spectrum":
            _spectra(axis, sites)
        else:
            _by_site(axis, sites, key)
        axis.set_ylim(len(sites) - 0.5, -0.5)  # the first site on top
        names = _short([row["site"] for row in sites]) if i == 0 else [""] * len(sites)
        axis.set_yticks(range(len(sites)), labels=names, fontsize=6.5)
        axis.tick_params(axis="y", length=0)
    whole = next((row for row in rows if row["site"] == "all"), None)
    if whole is not None:
        what = textwrap.shorten(whole["method"], 18 * len(widths), placeholder=" ...)")
        figure.suptitle(f"{what}: {whole['parameters']:,} parameters at {len(sites)} sites", fontsize=10)
    figure.savefig(path, dpi=150)


def _spectra(axis: Axes, sites: list[Row]) -> None:
    """A row for every site: a line each would hide the others as soon as there are many."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    most = max(len(row["spectrum"] or ()) for row in sites)
    shares = np.full((len(sites), most), np.nan)
    for share, row in zip(shares, sites, strict=True):
        if row["spectrum"] and row["spectrum"][0] > 0:
            share[: len(row["spectrum"])] = np.array(row["spectrum"]) / row["spectrum"][0]
    shares[~(shares > 1e-7)] = np.nan  # below that it is rounding
    lowest = 1.0 if np.isnan(shares).all() else float(np.nanmin(shares))
    drawn = axis.imshow(
        shares, norm=LogNorm(min(lowest, 0.1), 1.0), extent=(0.5, most + 0.5, len(sites) - 0.5, -0.5),
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axis.set_title("singular values of dW", fontsize=10)
    axis.set_xlabel("number of the singular value, the largest first")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = axis.figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.7, aspect=30, pad=0.02)
    bar.set_label("share of the largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _by_site(axis: Axes, sites: list[Row], key: str) -> None:
    values = [(row[key], y) for y, row in enumerate(sites) if row[key] is not None]
    axis.set_title("effective rank of dW" if key == "effective_rank" else "nonlinearity", fontsize=10)
    if key == "effective_rank":
        ranks = [(row["rank"], y) for y, row in enumerate(sites) if row["rank"]]
        _dots(axis, ranks, "|", 40, PALE)
        axis.set_xlim(0, 1.1 * max(v for v, _ in values + ranks))
        axis.set_xlabel("grey: r", fontsize=8, color=PALE)
    else:
        decades = [math.log10(v) for v, _ in values if v > 0] or [0.0]
        axis.set(xscale="log", xlim=(10.0 ** math.floor(min(decades) - 0.05), 10.0 ** math.ceil(max(decades) + 0.05)))
        axis.xaxis.set_minor_formatter("")
        if any(row["bf16_changed"] is not None for row in sites):
            axis.axvline(HALF_STEP, color=PALE, ls="--", lw=1)
            axis.set_xlabel("dashed: half a step of bfloat16", fontsize=8, color=PALE)
    _dots(axis, [(v, y) for v, y in values if v > 0], "o", 14, INK)
    axis.grid(alpha=0.25)


def _dots(axis: Axes, points: list[tuple[float, int]], marker: str, size: float, color: str) -> None:
    axis.scatter([v for v, _ in points], [y for _, y in points], s=size, marker=marker, color=color, zorder=3)


def _short(names: list[str]) -> list[str]:
    """Without the parts that all names begin with."""
    parts = [n.split(".") for n in names]
    same = 0
    while len({tuple(p[: same + 1]) for p in parts}) == 1 and all(len(p) > same + 1 for p in parts):
        same += 1
    return [".".join(p[same:]) for p in parts]
