"""How undula draws: matplotlib without pyplot, one set of colours, and equal files for equal input.

Nothing here knows what is drawn.  matplotlib is imported when something is.  Its settings belong to the process, so
`styled` lets one thread draw at a time and puts back what was there.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's blue and vermilion are told apart by every kind of colour vision; marks differ in shape too.
LIGHT = {
    **{"paper": "#ffffff", "ink": "#1c2326", "pale": "#5f6a71", "rule": "#dfe4e7", "back": "#c3cbd0"},
    **{"win": "#0072b2", "loss": "#c44e00", "open": "#7a868d"},
}
DARK = {  # the same on a dark page
    **{"paper": "#14191c", "ink": "#e7ecee", "pale": "#9aa6ad", "rule": "#2c353a", "back": "#47535a"},
    **{"win": "#56b4e9", "loss": "#ff9a5c", "open": "#8d99a0"},
}
PIXELS = 96  # of CSS, an inch
POINT = 0.75  # a CSS pixel
SIZE = 12 * POINT  # of letters
SHARP = 150  # pixels an inch of a PNG
STYLE: dict[str, Any] = {
    **{"font.size": SIZE, "text.parse_math": False, "text.color": LIGHT["ink"], "figure.facecolor": LIGHT["paper"]},
    **{"axes.edgecolor": LIGHT["pale"], "axes.labelcolor": LIGHT["pale"], "axes.linewidth": POINT},
    **{"xtick.color": LIGHT["pale"], "ytick.color": LIGHT["pale"], "xtick.labelsize": SIZE, "ytick.labelsize": SIZE},
    **{"grid.color": LIGHT["rule"], "grid.linewidth": POINT, "axes.axisbelow": True, "lines.linewidth": 1.6 * POINT},
    **{"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "undula"},
}
UNDATED: dict[str, dict[str, Any]] = {
    "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
}
_TURN = threading.RLock()


@contextmanager
def styled(**settings: Any) -> Iterator[None]:
    """In it matplotlib has undula's settings alone, whatever a matplotlibrc says; no other thread is in one."""
    import matplotlib

    with _TURN, matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # an SVG holds texts as such: its reader has the fonts
        matplotlib.rcdefaults()
        made: Any = STYLE | settings
        matplotlib.rcParams.update(made)
        yield


def blank(width: float, height: float, **options: Any) -> Figure:
    """A figure of so many CSS pixels.  Called within `styled`, like all that draws on it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / PIXELS, height / PIXELS), **options)
    FigureCanvasAgg(figure)
    return figure


def axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at so many pixels from the left and the top of a figure."""
    wide, high = figure.get_size_inches() * PIXELS
    return figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))


def titled(artist: Artist, title: str) -> None:
    """Gives a mark of its own a text, which a pointer finds in an SVG."""
    artist.set_gid(f"titled {title}")


def rendered(figure: Figure, end: str, title: str = "") -> bytes:
    """The file of a figure: `end` is svg, pdf, png or another that matplotlib knows.  `title`: what an SVG says to
    those who do not see it.  Within `styled`."""
    made = io.BytesIO()
    metadata = UNDATED.get(end, {}) | ({"Title": title} if end == "svg" and title else {})
    figure.savefig(made, format=end, dpi=SHARP, metadata=metadata)
    if end != "svg":
        return made.getvalue()
    text = re.sub(r'id="titled (.*?)">', r"><title>\1</title>", made.getvalue().decode())
    text = re.sub(r"<g\s+>", "<g>", text)
    text = re.sub(r"\n *(<g/>\n)?", "\n", text)
    text = re.sub(r"(?s) *<metadata>.*?</metadata>\n", "", text)  # the title again
    used = set(re.findall(r'(?:"#|url\(#)([\w-]+)', text))  # an id that nothing uses would stand twice in a page
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1).encode()


def inline(svg: str) -> str:
    """An SVG file as a part of an HTML page, in which CSS variables (--ink ...) say the colours."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg ") :])
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


# Texts


def wide(text: str, bold: bool = False) -> float:
    """Pixels that the longest line of a text takes, by the widths of DejaVu Sans, which are large."""
    return max(_wide(line, bold) for line in text.split("\n"))


@lru_cache(maxsize=4096)
def _wide(line: str, bold: bool) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=SIZE, weight="bold" if bold else "normal")
    return text_to_path.get_text_width_height_descent(line, font, False)[0] / POINT


def wrapped(text: str, room: float, bold: bool = False) -> str:
    """The text in as many lines as it takes to be no wider than so many pixels."""
    for letters in range(len(text), 1, -1):
        lines = textwrap.fill(text, letters)
        if wide(lines, bold) <= room:
            return lines
    return text


def lines(text: str) -> int:
    return text.count("\n") + 1


def labels(names: Sequence[str], most: int) -> dict[str, str]:
    """{name: what of it fits into `most` letters}; names that would become the same are numbered."""
    made: dict[str, str] = {}
    for name in names:
        short = name if len(name) <= most else f"{name[: most - most // 3 - 1]}…{name[-(most // 3) :]}"
        count = 2
        while short in made.values():
            end = f"…#{count}"
            short, count = name[: most - len(end)] + end, count + 1
        made[name] = short
    return made


# Scales


def limits(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """The ends of an axis that shows all of the values; differences of rounding alone do not look like some."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    room = (high - low) * margin if high - low > 1e-9 * size else size * 0.05 or 1.0
    return low - room, high + room


def log_limits(values: Sequence[float]) -> tuple[float, float]:
    """The same for positive values that span decades."""
    low, high = min(values), max(values)
    room = max((high / low) ** 0.07, 1.15)
    return low / room, high * room


def ticks(low: float, high: float, most: int, log: bool = False) -> list[tuple[float, str]]:
    """(value, label) of round values within, `most` at most; the labels differ."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if log:
        for parts in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = LogLocator(subs=parts, numticks=99).tick_values(low, high)
            found = [float(v) for v in found if low <= v <= high]
            if len(found) <= most:
                break
        found = found[:: math.ceil(len(found) / most) or 1]
    else:
        size = 1e-9 * (high - low)
        found = [float(v) for v in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
        found = [0.0 if abs(v) < size else v for v in found if low - size <= v <= high + size]
    for digits in range(4, 17):
        said = [number(t, digits) for t in found]
        if len(set(said)) == len(said):
            break
    return list(zip(found, said, strict=True))


def number(value: float, digits: int = 4) -> str:
    """A tick's label: 0.65, 1e-4, 37.6k, 1.2M."""
    if not value:
        return "0"
    if abs(value) < 1e-3:
        mantissa, _, power = f"{value:.{digits - 3}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / min(unit, 1e3 if name == 'k' else unit):.{digits - 1}g}{name}"
    return f"{value:.{digits}g}"


def mark_axis(axis: Axes, which: str, room: float, most: int, log: bool = False) -> None:
    """Gives the x or the y axis of `room` pixels round ticks whose labels do not run together."""
    low, high = (axis.get_xlim if which == "x" else axis.get_ylim)()
    for count in range(most, 0, -1):
        found = ticks(low, high, count, log)
        shares = [_share(value, low, high, log) * room for value, _ in found]
        sizes = [wide(label) / 2 + 3 if which == "x" else 8 for _, label in found]
        if all(b - a >= u + v for (a, u), (b, v) in pairwise(zip(shares, sizes, strict=True))):
            break
    place = axis.xaxis if which == "x" else axis.yaxis
    place.set_ticks([v for v, _ in found], labels=[label for _, label in found])
    place.set_ticks([], minor=True)
    axis.tick_params(axis=which, length=3 if which == "x" else 0, width=POINT)  # type: ignore[arg-type]


def _share(value: float, low: float, high: float, log: bool) -> float:
    v, a, b = (math.log(u) if log else u for u in (value, low, high))
    return (v - a) / (b - a)


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to the wanted ones (sorted) that are `gap` apart (less where that does not fit), within
    low ... high: isotonic regression by pooling neighbours."""
    last = len(wanted) - 1
    gap = min(gap, (high - low) / max(last, 1))
    blocks: list[tuple[float, int]] = []  # (sum, count) of wanted positions that are pushed together
    for i, w in enumerate(wanted):
        blocks.append((w - i * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            (a, m), (b, n) = blocks.pop(), blocks.pop()
            blocks.append((a + b, m + n))
    means = [total / count for total, count in blocks for _ in range(count)]
    return [min(max(m, low), high - last * gap) + i * gap for i, m in enumerate(means)]
