"""The figure of `diagnose`: what the updates look like, site by site.  matplotlib is imported when it is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.extras import told
from . import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
HALF_STEP = 2.0**-9  # of bfloat16: relative changes below this are mostly rounded away
INK, PALE = drawing.LIGHT["win"], drawing.LIGHT["open"]


@told
def draw(rows: list[Row], path: str | Path) -> None:
    """Left the spectra of dW, then effective ranks and nonlinearities, as far as there are any, a row for every site.
    The file type follows the name."""
    sites = [row for row in rows if row["site"] != "all"]
    spectra = [k for k in ("spectrum",) if any(row[k] for row in sites)]
    points = [k for k in ("effective_rank", "nonlinearity") if any(row[k] is not None for row in sites)]
    if not spectra and not points:
        raise ValueError(
            "the rows hold nothing that can be drawn: AuroRA has no dW, and how nonlinear it is needs data "
            "(diagnose(model, data))"
        )
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    whole = next((row for row in rows if row["site"] == "all"), None)
    title = "" if whole is None else f"{whole['method']}: {whole['parameters']:,} parameters at {len(sites)} sites"
    with drawing.styled():
        path.write_bytes(drawing.rendered(_figure(sites, title, spectra, points), path.suffix[1:], title))


def _figure(sites: list[Row], title: str, spectra: list[str], points: list[str]) -> Figure:
    widths = [430.0] * len(spectra) + [310.0] * len(points)
    high = min(max(350, 16.5 * len(sites) + 150), 4000)
    figure = drawing.blank(sum(widths) + 140, high, layout="constrained")
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
    if title:
        figure.suptitle(drawing.wrapped(title, sum(widths)), fontsize=drawing.SIZE)
    return figure


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
    bar = axis.figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.7, aspect=30, pad=0.02, format=_plain)
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
        axis.xaxis.set_major_formatter(_plain)
        axis.xaxis.set_minor_formatter("")
        if any(row["bf16_changed"] is not None for row in sites):
            axis.axvline(HALF_STEP, color=PALE, ls="--", lw=1)
            axis.set_xlabel("dashed: half a step of bfloat16", fontsize=8, color=PALE)
    _dots(axis, [(v, y) for v, y in values if v > 0], "o", 14, INK)
    axis.grid(alpha=0.25)


def _plain(value: float, _: float | None = None) -> str:
    """A tick's label without mathematics: names of sites and methods must not be read as such."""
    return drawing.number(value)


def _dots(axis: Axes, points: list[tuple[float, int]], marker: str, size: float, color: str) -> None:
    axis.scatter([v for v, _ in points], [y for _, y in points], s=size, marker=marker, color=color, zorder=3)


def _short(names: list[str]) -> list[str]:
    """Without the parts that all names begin with."""
    parts = [n.split(".") for n in names]
    same = 0
    while len({tuple(p[: same + 1]) for p in parts}) == 1 and all(len(p) > same + 1 for p in parts):
        same += 1
    return [".".join(p[same:]) for p in parts]
