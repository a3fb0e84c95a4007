"""`undula squeeze` and `undula quantise`: smaller adapters, one or a folder of them, with a table of what was lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import compress
from ..compress.squeezing import files_of
from ..compress.targets import ByBudget, ByEnergy, ByError, ByRank, BySize, Target
from ..core.adapter import Adapter
from ..io import files
from ..io.diffusers import WEIGHTS
from ..io.native import README
from ..io.outline import head
from ..io.places import place as meant
from ..io.whole import whole
from ..train.card import of_run, put
from ..train.restored import described
from ..train.run import RUN
from . import shell
from .carry import carry
from .progress import layers_bar
from .sizes import bytes_of

Where = Annotated[Path, typer.Argument(help="The directory of an adapter, or a folder of such directories.")]


def squeeze(
    path: Where,
    *,
    out: shell.Out,
    rank: Annotated[int | None, typer.Option(help="This rank at every layer.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="At each layer the least rank that keeps this share of ||dW||^2: 0.99.")
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="At each layer the least rank whose relative error is at most this: 0.05.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="So many ranks over all layers together, where they keep most.", min=1)
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="All files together at most so large: 2MB, 500k, 1.5MiB or bytes.")
    ] = None,
    to: shell.Json = None,
) -> None:
    """Cut an adapter to less rank, each layer's update as near to what it was as can be; what that costs is printed.
    Needs no model.  A folder of adapters is squeezed one by one, to the same target each."""
    target = _target(rank, energy, error, budget, size)

    def one(place: Path, folder: Path, called: Path) -> dict[str, Any]:
        outline = head(place).outline()
        with layers_bar(place.name, len(outline.methods)) as seen:
            made = _squeezed(place, target, folder, called, seen)
        if made.bytes[1] > made.bytes[0] and made.adapter.num_parameters() > outline.num_parameters():
            shell.remark(
                f"{place} is larger as a plain LoRA than it was: its method shares or rebuilds its numbers, and a LoRA "
                "stores them"
            )
        return _lost(outline, made, (_same_files(place, folder), sum_of(folder)))

    _each(path, out, to, one)


def quantise(
    path: Where,
    *,
    out: shell.Out,
    bits: Annotated[int, typer.Option(help="8 or 4: half and a quarter of what 16 bits take.")] = 8,
    group: Annotated[int, typer.Option(help="Numbers that share a scale; fewer: more exact, larger.", min=1)] = 64,
    to: shell.Json = None,
) -> None:
    """Store an adapter as integers; the error at every layer is printed.  It is opened as any other: reading makes
    numbers of the integers.  A folder of adapters is quantised one by one."""

    def one(place: Path, folder: Path, called: Path) -> dict[str, Any]:
        outline = head(place).outline()
        with layers_bar(place.name, len(outline.methods)) as seen:
            made = compress.quantise_directory(place, folder, bits, group, seen)
        what = "the update" if not made.by_factors else "the update, of some layers the factors,"
        note = f"Stored as integers of {bits} bits in groups of {group}; relative error of {what} {made.error:.3g}."
        _card(place, made.adapter, folder, called, note)
        rows = [
            {"layer": s, "relative error": e, "of": "factors" if s in made.by_factors else "update"}
            for s, e in made.errors.items()
        ]
        sizes = {"bytes_before": files_of(place), "bytes": files_of(folder)}
        if sizes["bytes"] >= sizes["bytes_before"]:
            shell.remark(
                f"{place} is no smaller so: its numbers are few beside the names and scales that are stored too"
            )
        return {"error": made.error, "bits": bits, **sizes, "layers": rows}

    _each(path, out, to, one)


def _target(
    rank: int | None, energy: float | None, error: float | None, budget: int | None, size: str | None
) -> Target:
    """The one that was asked for.  Raises ValueError for none or several."""
    options: dict[str, Callable[[], Target]] = {
        "--rank": lambda: ByRank(rank or 0),
        "--energy": lambda: ByEnergy(energy or 0.0),
        "--error": lambda: ByError(error or 0.0),
        "--budget": lambda: ByBudget(budget or 0),
        "--size": lambda: BySize(bytes_of(size or "", "--size")),
    }
    values = (rank, energy, error, budget, size)
    given = [name for name, value in zip(options, values, strict=True) if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"squeeze needs one target: {', '.join(options)}; found {' and '.join(given) if given else 'none'}"
        )
    return options[given[0]]()


def _squeezed(
    place: Path, target: Target, folder: Path, called: Path, seen: Callable[[str], object]
) -> compress.Squeezed:
    """Squeezes one adapter into `folder`.  With a size for a target, all that lies there is counted."""
    asked, beside = target, 0
    while True:
        try:
            made = compress.squeeze_directory(place, folder, asked, seen=seen)
        except ValueError as error:
            if not beside:
                raise
            raise ValueError(
                f"what goes with the adapter (its run, its card) takes {beside:,} bytes: {error}"
            ) from None
        _card(place, made.adapter, folder, called, _told(made))
        if not isinstance(target, BySize) or sum_of(folder) <= target.bytes:
            return made
        beside += sum_of(folder) - target.bytes if beside else sum_of(folder) - made.bytes[1]
        if beside >= target.bytes:
            raise ValueError(
                f"what goes with the adapter (its run, its card) takes {beside:,} bytes alone: no squeezing of the "
                f"adapter reaches {target.bytes:,}"
            )
        asked = BySize(target.bytes - beside)


def sum_of(folder: Path) -> int:
    """The bytes of all files below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _told(made: compress.Squeezed) -> str:
    """A sentence for a card."""
    ranks = [k for k in made.ranks.values() if k]
    gone = len(made.ranks) - len(ranks)
    return (
        f"Squeezed to the ranks {min(ranks)} to {max(ranks)}, {sum(ranks)} in all"
        + (f" ({gone} layers got none)" if gone else "")
        + f"; relative error of the update {made.error:.3g}."
    )


def _card(place: Path, adapter: Adapter, folder: Path, called: Path, note: str) -> None:
    """The run that goes along, and a README that says what was done."""
    carry(place, adapter, folder)
    if (place / RUN).is_file():
        run = dataclasses.replace(described(place, adapter), out=called)
        put(dataclasses.replace(of_run(run, adapter), notes=(note, "")), folder)
    else:
        files.write_text(folder / "README.md", f"{README}\n{note}\n")


def _same_files(place: Path, folder: Path) -> int:
    """The bytes in `place` of the files that `folder` has too."""
    if place.is_file():
        return files_of(place)
    twins = [place / file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    return sum(twin.stat().st_size for twin in twins if twin.is_file())


def _lost(adapter: Adapter, made: compress.Squeezed, sizes: tuple[int, int]) -> dict[str, Any]:
    """What is said of one adapter; `sizes` are the bytes of its files, before and after."""
    rows = []
    for site, k in made.ranks.items():
        before = adapter.factors[site].get("A")
        rows.append(
            {"layer": site, "rank before": None if before is None else len(before), "rank": k,
             "relative error": made.errors[site]}
        )  # fmt: skip
    return {"error": made.error, "ranks": sum(made.ranks.values()), "bytes_before": sizes[0],
            "bytes": sizes[1], "layers": rows}  # fmt: skip


def adapters_in(path: Path) -> list[Path]:
    """The adapter directory itself, or those directly in a folder.  Raises FileNotFoundError."""

    def is_adapter(place: Path) -> bool:
        return (place / files.CONFIG).is_file() or (place / WEIGHTS).is_file()

    if is_adapter(path) or not path.is_dir():
        return [path]
    found = sorted(place for place in path.iterdir() if place.is_dir() and is_adapter(place))
    if not found:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{path} is no adapter directory ({files.CONFIG} is missing), nor does it hold any: {there}"
        )
    return found


def _each(path: Path, out: Path, to: Path | None, one: Callable[[Path, Path, Path], dict[str, Any]]) -> None:
    """`one(directory, where to write, how that will be called)` for the adapter, or for each of a folder; all of them
    are there in the end, or none."""
    shell.fresh(out)
    path = meant(path)
    places = adapters_in(path)
    several = places != [path]
    found: dict[str, dict[str, Any]] = {}
    with whole(out) as folder:
        for place in places:
            at = folder / place.name if several else folder
            at.mkdir(exist_ok=True)
            try:
                found[place.name] = one(place, at, out / place.name if several else out)
            except (ValueError, TypeError, LookupError) as error:
                if several:
                    raise type(error)(f"{place}: {error}") from None
                raise
    shell.write(to, {"adapters": found} if several else next(iter(found.values())))
    if str(to) == "-":
        return
    if several:
        shell.out.print(shell.table([{"adapter": n, **_short(f)} for n, f in found.items()]))
    else:
        only = next(iter(found.values()))
        shell.out.print(shell.table(only["layers"]))
        shell.note(", ".join(f"{name}: {shell.shown(value)}" for name, value in _short(only).items()))
    shell.note(f"Saved in {out}")


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of one adapter as a whole."""
    return {k.replace("bytes_before", "bytes before"): v for k, v in found.items() if k != "layers"} | {
        "error": found["error"]
    }
