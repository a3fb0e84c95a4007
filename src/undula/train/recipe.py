"""What is trained on what, and how, as one value.

A setting is one field.  From it follow the option of `undula train`, the key of a study file's [train] and
[[methods]], the entry of run.json, the setting by which `undula compare` tells arms apart, and what is refused.
`Settings` are what a study may give to all of its runs; a `Recipe` adds what differs between them; `train.run.Run` says
where it is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from ..core.choice import as_json
from ..core.given import Checked
from ..core.method import Method
from ..core.ranges import (
    Bits,
    Count,
    NotNegative,
    PartShare,
    Positive,
    Range,
    Seed32,
)
from ..kernels import units
from ..optim.optimisers import AdamW, Optimiser
from ..optim.schedules import Linear, Schedule
from ..penalties.penalty import Penalty, listed, together
from ..ranks import Procedure
from . import config
from .data.decoding import text_encoding
from .fields import DATA, EVALUATION, LAYERS, OUTPUT, TRAINING, decoded, default_of, facts, option, told
from .refusals import refusals
from .tasks.task import Task

Every = Annotated[float, Range(least=0, most=1e9)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
AUTO = "auto"
# What JSON holds whatever it is.  Fields that came later are there only where they are not at their default, so that
# what was written without them, files and the keys of studies' runs, is what it was.
FIRST = frozenset({
    *("model", "data", "task", "method", "where", "overrides", "allocator", "full", "lr", "head_lr", "epochs"),
    *("max_steps", "batch", "accumulate", "warmup", "weight_decay", "seed", "train_rows", "eval_rows", "save_every"),
    *("dtype", "bits", "by_chance", "probe_batches"),
})  # fmt: skip

PLACES = ("where", "exclude", "overrides", "probe_batches")  # what an adapter that is there says by itself


@dataclass(frozen=True, kw_only=True)
class Settings(metaclass=Checked):
    """How is trained: what a study may give to all of its runs, or to those of one arm."""

    where: str | tuple[str, ...] = option("all-linear", "Layers: a name, its end, or a glob.", layers=True)
    exclude: tuple[str, ...] = option((), "Layers to leave out of these, named likewise.", layers=True)
    overrides: Mapping[str, Method] = field(
        default_factory=dict,
        metadata=facts("Other methods by pattern: PATTERN=METHOD,NAME=VALUE,...", flag="--override", layers=True),
    )
    full: tuple[str, ...] = option((), "Parameters to train in full besides the head.", panel=LAYERS)
    head_lr: Positive | None = option(None, "Of the task's head, where other parameters train too. (default: --lr)")
    b_ratio: Positive | None = option(None, "LoRA+: the factors B learn so many times as fast.", layers=True)
    epochs: Positive = option(3.0, "Times through the rows.")
    max_steps: Count | None = option(None, "Optimiser steps, instead of epochs.")
    batch: Count = option(16, "Rows in a batch, on a device.")
    accumulate: Count = option(1, "Batches in a step: as one of all their rows, a short last one by its rows.")
    optimiser: Optimiser = option(AdamW(), "What takes the steps: {names}.")
    schedule: Schedule | None = option(
        None, "Of the rate, after a linear warm-up: {names}. (default: the allocator's, else linear)"
    )
    warmup: PartShare = option(0.05, "Share of the steps.")
    weight_decay: NotNegative = option(0.0, "Of all that trains but biases and norms: all factors too.")
    max_grad_norm: NotNegative = option(1.0, "Clip gradients to this norm; 0: never.")
    penalty: tuple[Penalty, ...] = option(
        (), "Beside the loss, as NAME,OPTION=VALUE,...: {names}. Repeatable: they add up.", layers=True, panel=TRAINING
    )
    gradient_checkpointing: bool | None = option(
        None,
        "Compute activations again in the backward pass: less memory, a third more time. (default: where those of a "
        "batch would not fit the memory that is free)",
        figures=False,
    )
    plain: bool = option(
        False, "Take each step as it stands: rows padded, logits of every token. For comparison.", figures=False
    )
    probe_batches: Count | None = option(None, "For a method that starts from data. (default: 8)", layers=True)

    @staticmethod
    def as_meant(name: str, value: Any) -> Any:
        """What people write for a field, in its type: a list for a tuple, one name for a tuple of one, None for no
        clipping; see `given.Checked`."""
        if name in ("full", "exclude", "where"):
            return _names(name, value)
        if name == "max_grad_norm":
            return 0.0 if value is None else value
        if name == "overrides":
            return _by_pattern(value)
        if name == "penalty":
            return listed(value)
        return int(value) if isinstance(value, float) and name == "max_steps" and value == value // 1 else value


def _names(name: str, value: Any) -> str | tuple[str, ...]:
    """One name or several; of `where` one stays one, being a rule too ("all-linear").  Raises TypeError."""
    found = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if wrong := [each for each in found if not isinstance(each, str)]:
        raise TypeError(
            f"{name} of a run is text, which its file can hold: a name, its end, a glob, or a list of these; found "
            f"{wrong[0]!r:.80}"
        )
    return value if name == "where" and isinstance(value, str) else found


def _by_pattern(value: Any) -> dict[str, Method]:
    """Raises TypeError for what is not {pattern: method}."""
    found: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else {None: value}
    for pattern, method in found.items():
        if not (isinstance(pattern, str) and isinstance(method, Method)):
            raise TypeError(f'overrides are methods by pattern, such as {{"*.q_proj": LoRA(r=2)}}; found {value!r:.80}')
    return found


@dataclass(frozen=True)
class Recipe(Settings):
    """What is trained on what, and how.

    model: a folder, a name on the model hub, or `bundled:NAME`; data: a JSONL, CSV, TSV or Parquet file, a folder of
    such files named after splits, of images or sounds in SPLIT/CLASS/ or CLASS/, or saved by `datasets`, a name on the
    hub (`NAME:CONFIG`), or `bundled:NAME`.
    method None trains the task's head alone.
    """

    model: str = field(metadata=facts("A folder, a hub name, or bundled:NAME.", panel=DATA))
    data: str = field(metadata=facts("A file, a folder, a hub name, or bundled:NAME.", panel=DATA))
    task: Task = field(metadata=facts("{names}.", panel=DATA))
    method: Method | None = field(
        metadata=facts("See `undula methods`; none: the head alone.", options="--set", panel=LAYERS)
    )
    _: KW_ONLY
    allocator: Procedure | None = option(
        None, "Who gets how much rank, when; or a penalty: see `undula methods`.", options="--allocate", panel=LAYERS
    )
    begin_from: str | None = option(
        None,
        "The directory of an adapter to go on from, squeezed or combined: its methods, layers, numbers and head.",
        flag="--from",
        panel=LAYERS,
    )
    lr: Positive | None = option(  # None, which people write as "auto": found before the training, see `tuning`
        1e-3, "Learning rate, at the top of the schedule; auto: found by a few steps that are taken back.", word=AUTO
    )
    seed: Seed32 = option(0, "Of the factors, a new head, the order of rows, dropout, the split.")
    train_rows: Count | None = option(None, "So many training rows, sampled. (default: all)", panel=DATA)
    eval_rows: Count | None = option(1000, "Rows for the metric, sampled.", figures=False, panel=EVALUATION)
    save_every: Count | None = option(
        None, "Steps between checkpoints. (default: a tenth)", figures=False, panel=OUTPUT
    )
    eval_every: Every | None = option(
        None,
        "Steps between evaluations, or below 1 a share of all; 0: none. (default: each epoch, at most ten and a tenth "
        "of the training's time)",
        panel=EVALUATION,
    )
    keep_best: bool | None = option(
        None, "Save the adapter of the best evaluation. (default: where there are any)", panel=EVALUATION
    )
    patience: Count | None = option(None, "Stop after so many evaluations without a better one.", panel=EVALUATION)
    dtype: torch.dtype = option(
        torch.float32,
        "Type of the frozen model; what trains is float32. auto: bfloat16 where there are units for it.",
        panel=DATA,
    )
    bits: Bits | None = option(None, "4 or 8: quantise the frozen model (bitsandbytes).", panel=DATA)
    skip_faulty: PartShare | None = option(
        None, "Leave out rows with faults: this share of a file at most, as in 0.1.", panel=DATA
    )
    encoding: str | None = option(None, "Of text files that are not UTF-8, as in cp1252.", panel=DATA)
    by_chance: bool | None = option(  # how a validation part is made, see `with_validation`: True for runs of version 1
        None, "", offered=False
    )

    def __post_init__(self) -> None:
        if self.begin_from is not None:
            fixed = [f.name for f in told(Settings) if f.name in PLACES and getattr(self, f.name) != default_of(f)]
            if fixed:
                raise ValueError(
                    f"begin_from (--from) goes on with the adapter there, at its layers: leave out {', '.join(fixed)}"
                )
        known = self.begin_from is None or self.method is not None  # else it is the adapter's: told when it is read
        parts = self.allocator, self.method, self.overrides, self.optimiser, self.penalty
        for _, why in refusals(*parts) if known else ():
            raise ValueError(why)
        own = self.task.own_loss or type(self.task).fitter is not Task.fitter
        if own and (odd := [p for p in self.penalty if p.answers and p.active]):
            raise ValueError(
                f"penalty: {odd[0]!r} looks at the answers that the loss is made of, and {type(self.task).__name__} "
                "has a loss of its own: leave it out, or take a penalty of the factors, such as GroupLasso()"
            )
        if not self.task.probable and (odd := [p for p in self.penalty if p.answers and p.active]):
            raise ValueError(
                f"penalty: {odd[0]!r} compares probabilities of classes, by a softmax over the answers, and "
                f"{type(self.task).__name__} has none: take a penalty of the factors, such as GroupLasso()"
            )
        if self.b_ratio is not None and not self.optimiser.groups:
            raise ValueError(f"b_ratio gives B a rate beside A's, and {self.optimiser!r} has one for a pair: raise lr")
        if self.accumulate > 1 and self.optimiser.at_once:
            raise ValueError(
                f"{self.optimiser!r} takes all rows of a step in one batch, found accumulate={self.accumulate}: give "
                f"batch={self.batch * self.accumulate} and gradient_checkpointing=True where memory is short"
            )
        if (every := self.eval_every) is not None and every >= 1 and every % 1:
            raise ValueError(f"eval_every is a number of steps, or a share of them below 1, found {every:g}")
        if every == 0 and (self.keep_best or self.patience is not None):
            asked = "keep_best" if self.keep_best else f"patience={self.patience}"
            raise ValueError(f"{asked} goes by evaluations, and eval_every=0 makes none: leave one of them out")

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """The recipe in a TOML or JSON file, as `undula train --config` takes it and every run leaves one (run.toml);
        see `train.config`.  Raises FileNotFoundError, ValueError with all that is wrong with it, LookupError."""
        return config.complete(path, Recipe, aside=("out",))

    @staticmethod
    def as_meant(name: str, value: Any) -> Any:
        """See `Settings.as_meant`.  Raises TypeError for what is no value of a field."""
        kinds = {"task": (Task, "Classification()"), "method": (Method, "LoRA(r=8)")}
        if name in kinds and not isinstance(value, kinds[name][0]) and (value is not None or name == "task"):
            kind, such = kinds[name]
            raise TypeError(f"{name} is a {kind.__name__} such as {such}, found {value!r:.80}")
        if name in ("model", "data") or (name == "begin_from" and value is not None):
            return os.fspath(checked_path(name, value))
        if name == "lr":
            return None if value == AUTO else value
        if name == "skip_faulty":  # no row is no share
            return None if type(value) in (int, float) and value == 0 else value
        if name == "encoding" and isinstance(value, str):
            return text_encoding(value)
        if name == "dtype":
            return dtype_called(str(value).removeprefix("torch."))
        return Settings.as_meant(name, value)

    @property
    def procedure(self) -> Procedure | None:
        """What accompanies the training: the allocator and the penalties that do anything."""
        return together(self.allocator, self.penalty)

    def rates(self) -> Schedule:
        """The schedule of the learning rate that applies."""
        return self.schedule or self._brought() or Linear()

    def _brought(self) -> Schedule | None:
        return None if self.allocator is None else self.allocator.schedule()

    def encode(self) -> dict[str, Any]:
        """As JSON values; paths that exist here are made absolute, and the schedule is the one that applies."""
        said = {f.name: getattr(self, f.name) for f in told(Recipe)}
        for name in ("model", "data", "begin_from"):
            here = said[name] is not None and Path(said[name]).exists()
            said[name] = str(Path(said[name]).resolve()) if here else said[name]
        plain = self.rates() == Linear() and self._brought() is None
        said["schedule"] = None if plain else self.rates()
        kept = {f.name for f in told(Recipe) if f.name in FIRST or said[f.name] != default_of(f)}
        return {name: _json(value) for name, value in said.items() if name in kept}


def recipe_of(data: Mapping[str, Any]) -> Recipe:
    """The inverse of `Recipe.encode`.  Raises LookupError or ValueError for what does not belong there."""
    known = [f.name for f in told(Recipe)]
    unknown = sorted(set(data) - set(known))
    missing = sorted(f.name for f in told(Recipe) if default_of(f) is MISSING and f.name not in data)
    if unknown or missing:
        what = f"has no {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise LookupError(f"a run {what}; its fields are: {', '.join(known)}")
    values = {name: decoded(Recipe, name, value, name) for name, value in data.items()}
    found = values.get("allocator")
    if "schedule" not in data and found is not None and found.schedule() is not None:
        values["schedule"] = Linear()  # such a run goes on as it was: it said its schedule where that was another
    return Recipe(**values)


def _json(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else as_json(value)


def checked_path(name: str, value: Any) -> str | os.PathLike[str]:
    """`value`, where it is a text or a path.  Raises TypeError."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is a text or a path, found {value!r:.80}")
    return value


def dtype_called(name: str) -> torch.dtype:
    """The floating type of that name; of "auto" bfloat16 where this machine has units for it, else float32: what was
    chosen is what is written, so that a run goes on elsewhere in its own type.  Raises LookupError that lists the known
    ones."""
    if name == AUTO:
        return torch.bfloat16 if units.has_bfloat16() else torch.float32
    if name not in DTYPES:
        raise LookupError(f"no dtype is called {name!r}; there are: {', '.join(DTYPES)}, and {AUTO}")
    return DTYPES[name]
