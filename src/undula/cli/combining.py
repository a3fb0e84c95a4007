# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula combine`: several adapters of one base as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..combine.combiner import Combiner
from ..combine.folders import Combined, combine_directories
from ..combine.names import NAMED, named
from ..core.choice import plain
from ..io.outline import head
from ..io.places import place
from ..io.whole import whole
from ..train import restored
from ..train.base import same_base
from . import shell
from .accompanying import accompany
from .gating import GATES, gate
from .progress import layers_bar
from .several import named_directory

if TYPE_CHECKING:
    from ..combine.regmean import RegMean
    from ..train.searching import Found, Tried

REGMEAN = "regmean"
ROWS = 256


def combine(
    paths: Annotated[
        list[str], typer.Argument(help="Directories of adapters of one base; DIR:0.5 gives one a weight.")
    ],
    *,
    out: shell.Out,
    how: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(NAMED)}, {REGMEAN} (which runs each adapter's rows), {GATES} (which are to be trained)."
        ),
    ] = "average",
    weights: Annotated[
        list[str], typer.Option(help="One number per adapter, in their order: --weights .5 .3 .2, or .5,.3,.2.")
    ] = [],
    rank: Annotated[int | None, typer.Option(help="The rank to keep at every layer. (default: all of it)")] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of each update that stays: ties, dare, della, breadcrumbs, knots.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of what is drawn: dare, della, and the search. (default: 0)")
    ] = None,
    options: shell.Set = [],
    drop_full: Annotated[
        bool, typer.Option("--drop-full", help="Leave out what is trained in full (heads, norms); else it is averaged.")
    ] = False,
    search: Annotated[
        int | None, typer.Option(help="Try so many ways and weights, and take the best on held-out rows.", min=1)
    ] = None,
    data: shell.Data = None,
    rows: Annotated[
        int | None, typer.Option(help="Rows to search on, or of --how regmean's. (default: 256)", min=1)
    ] = None,
    model: shell.Base = None,
    to: shell.Json = None,
) -> None:
    """Combine several adapters of one base into one.  Needs no model, and the memory of one layer of each, but for
    regmean and --search, which run rows through the model."""
    shell.fresh(out)
    asked = _asked(paths, weights)
    if len(asked.paths) < 2:
        raise ValueError(f"combine takes two adapters or more, found {len(asked.paths)}: {asked.paths[0]}")
    if search is None and plain(how) != REGMEAN and (data is not None or rows is not None):
        raise ValueError("--data and --rows are for --search and for --how regmean: the others look at no rows")
    if plain(how) == GATES:
        others = {"--rank": rank, "--density": density, "--seed": seed, "--search": search}
        gate(asked.paths, asked.weights, options, others, drop_full, out, to)
        return
    found = None
    if search is not None:
        found = _searched(asked, how, search, data, rows, model, rank, density, options, seed or 0, drop_full)
        combiner, given, way = found.best.combiner, found.best.weights, found.best.how
        drop_full = drop_full or data is None
    else:
        combiner = _combiner(asked.paths, how, options, rank, density, seed, data, rows, model)
        given, way = asked.weights or (1.0,) * len(asked.paths), how
    shares = combiner.weights(given, len(asked.paths))
    with whole(out) as folder:
        with layers_bar(way, len({s for p in asked.paths for s in head(p).outline().methods})) as seen:
            made = combine_directories(
                combiner, asked.paths, folder, shares, drop_full=drop_full, same_base=_same, seen=seen
            )
        parts = ", ".join(f"{p.resolve().name} (weight {w:g})" for p, w in zip(asked.paths, shares, strict=True))
        note = f"Combined of {parts} by `{way}`: `{combiner!r}`."
        several = accompany(asked.paths, made.outline, note, folder, out, drop_full)
    if several:
        shell.remark(several)
    _tell(asked.paths, made, combiner, shares, way, found, to, out)


@dataclass(frozen=True)
class _Asked:
    paths: tuple[Path, ...]
    weights: tuple[float, ...] | None


def _asked(words: Sequence[str], weights: Sequence[str]) -> _Asked:
    """Directories and weights: a number among the directories goes on with --weights.  Raises ValueError."""
    said = [part for text in weights for part in text.split(",") if part.strip()]
    paths: list[Path] = []
    own: list[float | None] = []
    for word in words:
        if said and not Path(word).exists() and _number(word) is not None:
            said.append(word)
            continue
        path, weight = named_directory(word) or (Path(word), None)
        paths.append(place(path))
        own.append(weight)
    numbers = [_number(text) for text in said]
    for text, number in zip(said, numbers, strict=True):
        if number is None:
            raise ValueError(f"--weights takes numbers, as in --weights .5 .3 .2 or .5,.3,.2; found {text!r}")
    if any(w is not None for w in own):
        if said:
            raise ValueError("give weights by --weights or as DIR:0.5, not both")
        return _Asked(tuple(paths), tuple(1.0 if w is None else w for w in own))
    return _Asked(tuple(paths), tuple(n for n in numbers if n is not None) or None)


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _same(one: str, other: str) -> bool:
    return same_base(one, other) or same_base(other, one)


def _combiner(
    paths: Sequence[Path],
    how: str,
    options: Sequence[str],
    rank: int | None,
    density: float | None,
    seed: int | None,
    data: str | None,
    rows: int | None,
    model: str | None,
) -> Combiner:
    if plain(how) != REGMEAN:
        return named(how, options, rank=rank, density=density, seed=seed)
    if density is not None or seed is not None:
        raise ValueError("regmean leaves nothing out and draws nothing: it has no density and no seed")
    return _regmean(paths, options, rank, data, rows or ROWS, model)


def _regmean(
    paths: Sequence[Path], options: Sequence[str], rank: int | None, data: str | None, rows: int, model: str | None
) -> RegMean:
    """With the Gram matrices of the rows that each adapter was trained on, or of other data."""
    from ..combine.regmean import RegMean, grams
    from ..core.options import split_pair

    said = dict(split_pair(pair, "an option") for pair in options)
    if set(said) - {"shrink"}:
        raise LookupError(f"regmean has no option {', '.join(set(said) - {'shrink'})}; it has: shrink")
    shrink = _number(said.get("shrink", "1"))
    if shrink is None:
        raise ValueError(f"regmean's shrink is a number from 0 to 1, found {said['shrink']!r:.40}")
    way = RegMean((), rank=rank, **({"shrink": shrink} if said else {}))  # refused before rows are run
    measured = []
    for path in paths:
        opened = restored(path, model)
        batches = list(opened.batches(opened.examples(data, "train" if data is None else None, rows)))
        measured.append(dict(grams(opened.model, batches)))
    return replace(way, grams=tuple(measured))


def _searched(
    asked: _Asked,
    how: str,
    trials: int,
    data: str | None,
    rows: int | None,
    model: str | None,
    rank: int | None,
    density: float | None,
    options: Sequence[str],
    seed: int,
    drop_full: bool,
) -> Found:
    """The search over all ways, or over the weights and densities of the one that was named."""
    from ..train.searching import WAYS, search

    if asked.weights is not None or density is not None or options:
        raise ValueError("--search chooses weights and densities itself: leave out --weights, --density and --set")
    ways = WAYS if how == "average" else (how,)

    def told(tried: Tried) -> None:
        value = "cannot be combined so" if tried.value is None else f"{tried.value:.4g}"
        shell.err.print(f"{tried.how}, weights {_shown(tried.weights)}: {value}", soft_wrap=True, highlight=False)

    return search(
        asked.paths, trials=trials, data=data, rows=rows or ROWS, model=model, ways=ways, rank=rank, seed=seed,
        drop_full=drop_full, seen=told,
    )  # fmt: skip


def _tell(
    paths: Sequence[Path],
    made: Combined,
    combiner: Combiner,
    weights: Sequence[float],
    how: str,
    found: Found | None,
    to: Path | None,
    out: Path,
) -> None:
    layers = [{"layer": site, "rank": made.ranks[site], "relative error": e} for site, e in made.errors.items()]
    told: dict[str, Any] = {
        "how": how, "combiner": repr(combiner), "adapters": [str(p) for p in paths], "weights": list(weights),
        "error": made.error, "layers": layers,
    }  # fmt: skip
    if found is not None:
        told["search"] = {
            "metric": found.metric, "best": found.best.value,
            "trials": [{"how": t.how, "weights": list(t.weights), "value": t.value} for t in found.trials],
        }  # fmt: skip
    shell.write(to, told)
    if str(to) == "-":
        return
    if found is not None:
        shell.note(
            f"the best of {len(found.trials)} trials: {how}, weights {_shown(weights)}: {found.metric} "
            f"{found.best.value:.4g} (the first, {found.trials[0].how}: {shell.shown(found.trials[0].value)})"
        )
    ranks = sorted({r for r in made.ranks.values() if r is not None})
    size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
    cost = "nothing is left out" if made.error is None else f"what the rank leaves out: {made.error:.3g} of the update"
    shell.note(
        f"{len(paths)} adapters by {how}, weights {_shown(weights)}: {len(made.errors)} layers, {size}, "
        f"{made.outline.num_parameters():,} numbers; {cost}"
    )
    shell.note(f"Saved in {out}")


def _shown(weights: Sequence[float]) -> str:
    return " ".join(f"{w:.3g}" for w in weights)
