"""Opening what a run left: its base with the adapter attached; and evaluate(path)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.adapter import Adapter
from ..core.extras import needs
from ..host.host import attach, detach
from ..io import files
from .base import config_of, lacking, model_folder, open_model, same_base
from .data import load_data, sample, split_of, with_validation
from .faults import Faults
from .foreign import (
    CONFIG,
    Unmeasured,
    base_of,
    named_as,
    own_name,
    task_of,
)
from .heads import HeadTask
from .rows import LOG
from .run import RUN, Run
from .task import Examples, Processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@needs("train")
def evaluate(
    path: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    rows: int | None = None,
    skip_faulty: float | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """The metrics of the adapter that a run left in `path`; which rows: see `Restored.examples`.

    skip_faulty: see `Run`; None: of the training's own data what the training left out, of others nothing.
    columns: {role: column}, where other data call theirs otherwise than the training's.

    Raises LookupError for a split that does not exist, and what `restored` raises.
    """
    return restored(path).reading(columns or {}).score(data, split, rows, skip_faulty)


@dataclass(frozen=True)
class Restored:
    """A finished run: its base with the adapter attached, and what reads its data."""

    run: Run
    model: PreTrainedModel
    processor: Processor
    adapter: Adapter

    @property
    def folder(self) -> str:
        """The base, as `from_pretrained` takes it."""
        return model_folder(self.run.model)

    def reading(self, columns: Mapping[str, str]) -> Restored:
        """The same, its task reading these columns, {role: column}.  Raises LookupError for a role that it has not."""
        unknown = [role for role in columns if role not in self.run.task.roles]
        if unknown:
            name, there = type(self.run.task).__name__, ", ".join(self.run.task.roles)
            raise LookupError(f"{name} has no column {', '.join(unknown)}; it has: {there}")
        return replace(self, run=replace(self.run, task=replace(self.run.task, **columns))) if columns else self  # type: ignore[type-var]

    def examples(
        self,
        data: str | None = None,
        split: str | None = None,
        rows: int | None = None,
        skip_faulty: float | None = None,
    ) -> Examples:
        """Rows of a split as examples: by default those on which the training was measured.

        Other `data` give their validation split, else test, else what they have.  `rows` is how many at most;
        `skip_faulty` as for `evaluate`.
        """
        if rows is not None and rows < 1:
            raise ValueError(f"rows is how many at most, 1 or more; found {rows}")
        if data is None and not self.run.data:
            raise ValueError(f"{self.run.out} was not made by `undula train`: say on which data (data=..., or --data)")
        if skip_faulty is None and data is None:
            skip_faulty = self.run.skip_faulty
        faults = Faults(replace(self.run, skip_faulty=skip_faulty).skip_faulty)  # which checks it
        every = load_data(self.run.data if data is None else data, faults)
        if data is None and split in (None, "train", "validation"):
            parts = self.run.task.splits(every, "train", "validation", faults=faults)
            parts = with_validation(parts, self.run.seed, by_chance=bool(self.run.by_chance))
            part = parts[split or "validation"]
        else:
            name = split or next((n for n in ("validation", "test", "train") if n in every), next(iter(every)))
            split_of(every, name)  # refuses one that is not there
            part = self.run.task.splits(every, name, faults=faults)[name]
        examples = Examples(self.run.task, sample(part, rows or self.run.eval_rows, self.run.seed), self.processor)
        for note in (*faults.told(), *self.run.task.fits(examples, self.model, "these")):
            LOG.warning(note)
        return examples

    def batches(self, examples: Examples) -> Iterator[dict[str, torch.Tensor]]:
        """The examples as the model's inputs, without labels: what `collapse` and `diagnose` run on."""
        collate = self.run.task.collator(self.processor)
        for start in range(0, len(examples), self.run.batch):
            made = [examples[i] for i in range(start, min(start + self.run.batch, len(examples)))]
            yield {k: v.to(self.model.device) for k, v in collate(made).items() if k != "labels"}

    def score(
        self,
        data: str | None = None,
        split: str | None = None,
        rows: int | None = None,
        skip_faulty: float | None = None,
    ) -> dict[str, float]:
        """The metrics on such examples, of the model as it is now."""
        return self.run.task.score(self.model, self.examples(data, split, rows, skip_faulty), self.run.batch)


@needs("train")
def restored(path: str | Path, model: str | None = None) -> Restored:
    """The model that the adapter in `path` is for, with the adapter attached.

    What a run left says by itself what it is for; of any other adapter directory the config says it, or `model` names
    the base.  Raises FileNotFoundError where something is missing, ValueError when the adapter does not fit.
    """
    path = Path(path)
    adapter = Adapter.load(path)
    run = described(path, adapter, model)
    base, processor = open_model(model or run.model, run.task, run.dtype, run.seed, run.bits)
    if not (path / RUN).is_file():
        if isinstance(run.task, HeadTask | Unmeasured):
            named_as(base.config, path, config_of(run.model))
        if (path / "tokenizer_config.json").is_file():
            processor = run.task.processor(str(path))  # the one that it was trained with: its tokens may be more
            run.task.agree(processor, base)
    missing = [n for n in lacking(base) if n not in adapter.full]
    if missing:
        warnings.warn(
            f"the base's files lack {', '.join(missing[:5])}, and the adapter in {path} does not hold them: random "
            "numbers stand there, and the adapter computes with others wherever it is opened. Train it again",
            stacklevel=2,
        )
    return Restored(run, base, processor, attach(base, adapter))


def described(path: Path, adapter: Adapter, model: str | None = None) -> Run:
    """The run that left an adapter directory, or the one that could have where it has no run.json; `model` names
    another base.  Raises ValueError where nothing says what the adapter is for or two files say two things,
    FileNotFoundError for an unknown base.
    """
    check_agreed(path, adapter, model)
    if (path / RUN).is_file():
        run = Run.load(path)
        return run if model is None else replace(run, model=model)
    base = base_of(path, adapter.about, model)
    method = next(iter(adapter.methods.values()), None)
    return Run(model=base, data="", task=task_of(path, adapter.about, adapter, base), method=method, out=path)


def check_agreed(path: Path, adapter: Adapter, model: str | None = None) -> None:
    """Raises ValueError where two files of a directory say that the adapter is for different things: one of them has
    been edited, and nothing tells which is meant.  A base that is named, `model`, counts before both."""
    base, task = adapter.about.get("base_model_name_or_path"), adapter.about.get("task_type")
    run = Run.load(path) if (path / RUN).is_file() else None
    other, own = (path / CONFIG, own_name(path)) if run is None else (path / RUN, run.model)
    if model is None and base is not None and own is not None and not same_base(own, base):
        raise ValueError(
            f"{other} says that the base is {own}, {path / files.CONFIG} says {base}: make them agree, or name the "
            "base (model=..., or --model)"
        )
    if run is not None and task is not None and task != run.task.peft:
        raise ValueError(
            f"{path / RUN} says {type(run.task).__name__} (task_type {run.task.peft}), {path / files.CONFIG} says "
            f"task_type {task}: make them agree"
        )


def dense(opened: Restored) -> Restored:
    """The same on ordinary weights: a quantised base is dequantised, any other returned as it is."""
    if not getattr(opened.model, "is_quantized", False):
        return opened
    adapter = detach(opened.model)
    model = opened.model.dequantize()
    model.__dict__.pop("_weight_conversions", None)  # how to quantise on saving: transformers 5.23 forgets to forget it
    return replace(opened, model=model, adapter=attach(model, adapter))
