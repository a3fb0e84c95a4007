# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula collapse`: a plain low-rank adapter from any other, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import compress
from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.method import Additive, LowRank, Method, Reweight
from ..core.options import build
from ..core.ranges import NotNegative, Rank
from ..io.whole import whole
from ..train import Restored, restored
from ..train.base import called_elsewhere
from ..train.run import RUN
from . import shell
from .carry import carry
from .progress import busy

How = Annotated[str | None, typer.Option(help="truncate, substitute or least-squares. (default: by the rung)")]
Rows = Annotated[
    int | None,
    typer.Option(help="Rows to calibrate on, and as many others to measure the error on. (default: 256)", min=1),
]
ROWS = 256


class Recipe(Choice):
    """A way to collapse as a command line can name it: data come from the adapter's own training."""

    def approximation(self, opened: Restored | None, data: str | None, rows: int) -> compress.Approximation:
        """The way itself."""
        raise NotImplementedError

    def alone(self, rung: type[Method]) -> bool:
        """Whether it needs no more than the factors of an adapter on this rung."""
        return False

    def tells(self, rung: type[Method]) -> bool:
        """Whether it knows its own error, without data to measure it on."""
        return self.alone(rung)


@Recipe.register
@dataclasses.dataclass(frozen=True)
class Truncate(Recipe):
    """See `undula.Truncate`."""

    r: Rank = 8

    def approximation(self, opened: Restored | None, data: str | None, rows: int) -> compress.Approximation:
        return compress.Truncate(self.r)

    def alone(self, rung: type[Method]) -> bool:
        return issubclass(rung, Additive)

    def tells(self, rung: type[Method]) -> bool:
        return issubclass(rung, Reweight)


@Recipe.register
@dataclasses.dataclass(frozen=True)
class Substitute(Recipe):
    """See `undula.Substitute`."""

    def approximation(self, opened: Restored | None, data: str | None, rows: int) -> compress.Approximation:
        return compress.Substitute()

    def alone(self, rung: type[Method]) -> bool:
        return issubclass(rung, LowRank)


@Recipe.register
@dataclasses.dataclass(frozen=True)
class LeastSquares(Recipe):
    """See `undula.LeastSquares`."""

    r: Rank = 8
    ridge: NotNegative = 1e-3
    bias: bool = False

    def approximation(self, opened: Restored | None, data: str | None, rows: int) -> compress.Approximation:
        assert opened is not None
        calibration = list(opened.batches(opened.examples(data, "train", rows)))
        return compress.LeastSquares(self.r, calibration, self.ridge, self.bias)


@dataclasses.dataclass(frozen=True)
class Squeezed:
    """What has become of an adapter, and the model that had to be opened for it."""

    made: compress.Collapsed
    opened: Restored | None


def collapse(
    path: shell.Directory,
    *,
    out: shell.Out,
    how: How = None,
    options: shell.Set = [],
    rows: Rows = None,
    data: shell.Data = None,
    model: shell.Base = None,
    to: shell.Json = None,
) -> None:
    """Turn any adapter into a plain low-rank one; the error that this costs is measured and printed."""
    shell.fresh(out)
    adapter = Adapter.load(path)
    found = squeezed(path, adapter, how, options, data, rows, model)
    with whole(out) as folder:
        found.made.adapter.save(folder, *base_and_task(adapter.about, model, found.opened))
        carry(path, found.made.adapter, folder, model)
    show(found.made, to)
    if str(to) != "-":
        shell.note(f"Saved in {out}: an adapter of undula's; `undula export {out} --out OTHER` writes it for PEFT")


def base_and_task(
    about: Mapping[str, Any], model: str | None, opened: Restored | None
) -> tuple[str | None, str | None]:
    """The base and PEFT's task type that an adapter knows."""
    if opened is not None:
        return called_elsewhere(opened.run.model), opened.run.task.peft
    return (called_elsewhere(model) if model else None) or about.get("base_model_name_or_path"), about.get("task_type")


def squeezed(
    path: Path,
    adapter: Adapter,
    how: str | None,
    options: list[str],
    data: str | None,
    rows: int | None,
    model: str | None,
) -> Squeezed:
    """The adapter in `path` collapsed, by default as its rung asks for; its error is measured where it has to be, or
    can be."""
    if how is None:
        how = "truncate" if issubclass(adapter.rung, Reweight) else "least-squares"
    recipe = build(Recipe, how, options)
    measured = data is not None or rows is not None or (path / RUN).is_file() or not recipe.tells(adapter.rung)
    if not measured and recipe.alone(adapter.rung):
        return Squeezed(compress.collapse(adapter, recipe.approximation(None, None, 0)), None)
    with busy("opening the base"):
        opened = restored(path, model)
    number = ROWS if rows is None else rows
    way = recipe.approximation(opened, data, number)
    held_out = list(opened.batches(opened.examples(data, None, number))) if measured else None
    with busy("collapsing"):
        return Squeezed(compress.collapse(opened.model, way, held_out=held_out), opened)


def show(made: compress.Collapsed, to: Path | None) -> None:
    """What the collapse has cost."""
    shell.write(to, {"error": made.error, "measured_on": made.measured_on, "errors": made.errors})
    if str(to) == "-":
        return
    worst = max(made.errors, key=lambda site: made.errors[site])
    mean = sum(made.errors.values()) / len(made.errors)
    what = "the model's change" if made.measured_on == "held-out data" else "the update"
    shell.note(
        f"relative error of {what}, on {made.measured_on}: {made.error:.3g}; "
        f"at its layers {mean:.3g} on average, {made.errors[worst]:.3g} at most ({worst})"
    )
