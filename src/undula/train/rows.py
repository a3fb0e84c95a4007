"""The rows of a run: read, checked, split, in the order of the base's classes; and what is to be said of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .data.faults import Faults
from .data.load import load_data, sample, with_validation
from .data.source import source_of
from .data.splitting import contradicted, repeated, shared
from .run import Run
from .tasks.heads import Classes
from .tasks.outputs import order_of, own_names
from .tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PretrainedConfig

LOG = logging.getLogger("undula.train")
TOLD = 20  # classes that a sentence names


@dataclass(frozen=True)
class RunRows:
    """A fitted task, its rows, what the report says of them, and sentences for the reader."""

    task: Task
    train: Dataset
    held: Dataset
    figures: dict[str, Any]
    notes: tuple[str, ...]


def rows_of(run: Run) -> RunRows:
    """The rows of a run.  Raises LookupError, ValueError or FileNotFoundError with all that is wrong with the data."""
    from .base import config_of

    faults = Faults(run.skip_faulty, run.encoding)
    data = load_data(run.data, faults)
    task, parts = run.task.read(data, "train", "validation", faults=faults)
    notes = [*faults.told()]
    notes += [f"{s.name}: {note}" for rows in data.values() for s in [source_of(rows)] for note in s.notes]
    notes += task.notes(data["train"])
    made = with_validation(parts, run.seed, by_chance=bool(run.by_chance))
    notes += _duplicates(parts, made)
    task, made, told = in_own_order(run.task, task, made, config_of(run.model))
    notes += [told] if told else []
    most = {"train": run.train_rows, "validation": run.eval_rows}
    chosen = {name: sample(made[name], most[name], run.seed) for name in most}
    left = {"left_out": found} if (found := faults.left_out()) else {}
    figures = {"form": task.reads(data["train"].column_names)} | task.figures(chosen) | left
    if others := {name: len(rows) for name, rows in data.items() if name not in most}:
        figures["other_splits"] = others  # by which nothing is chosen
    notes = [*notes, *_classes(figures), *task.told(figures)]
    return RunRows(task, chosen["train"], chosen["validation"], figures, tuple(notes))


def _classes(figures: Mapping[str, Any]) -> Iterator[str]:
    """What there is to know of the classes: which have no row, how many rows the others have, what guessing scores."""
    if "majority" not in figures:
        return
    for part, counted in figures["classes"].items():
        none = [name for name, rows in counted.items() if not rows]
        if none:
            yield f"classes without a {part} row: {', '.join(none[:TOLD])}{', ...' if len(none) > TOLD else ''}"
    by_rows = sorted(figures["classes"]["train"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {rows}" for name, rows in by_rows[:TOLD]) + (", ..." if len(by_rows) > TOLD else "")
    most = by_rows[0][0]
    yield (
        f"{len(by_rows)} classes in {sum(n for _, n in by_rows)} train rows: {shown}; always answering {most} is right "
        f"in {100 * figures['majority']:.1f} % of the validation rows"
    )


def _duplicates(parts: DatasetDict, made: DatasetDict) -> Iterator[str]:
    again, both = repeated(parts["train"]), shared(made)
    if again:
        other = contradicted(parts["train"])
        told = f"; {other} rows have inputs that stand with several labels" if other else ""
        yield f"{again} of {len(parts['train'])} train rows have the same input as an earlier row{told}"
    if again and "validation" not in parts and not both:
        yield "the validation part was made so that no input is in both parts"
    if both:
        yield (
            f"{both} of {len(made['validation'])} validation rows have an input that is in train too: what is learned "
            "by heart counts as skill there"
        )


def in_own_order(
    asked: Task, task: Task, parts: DatasetDict, config: PretrainedConfig
) -> tuple[Task, DatasetDict, str]:
    """(the fitted task, the parts, what was done): classes in the order of the base's own head, where it has one for
    the same classes and `asked`, the task before it was fitted, does not say another order."""
    own, mine = own_names(config), getattr(task, "names", ())
    if not mine or own is None:
        return task, parts, ""
    order, shown = order_of(own, mine), ", ".join(own[:10]) + (", ..." if len(own) > 10 else "")
    if order is None:
        told = (
            f"the model has a head for other classes ({len(own)}: {shown}); it is replaced by a new one for those of "
            f"the data ({len(mine)}: {', '.join(mine[:10])}). To keep it, name the classes as it does"
        )
        return task, parts, told
    names = tuple(mine[order.index(i)] for i in range(len(order)))
    pairs = [ours if ours == theirs else f"{ours} is its {theirs}" for ours, theirs in zip(names, own, strict=True)]
    shown = ", ".join(pairs[:10]) + (", ..." if len(own) > 10 else "")
    told = f"the model's own head for these classes is kept ({shown})"
    if getattr(asked, "names", ()) or order == list(range(len(order))) or not isinstance(task, Classes):
        return task, parts, told
    parts = type(parts)({name: _renumbered(rows, order, names) for name, rows in parts.items()})
    return replace(task, names=names), parts, told  # type: ignore[type-var]


def _renumbered(rows: Dataset, order: list[int], names: tuple[str, ...]) -> Dataset:
    from datasets import ClassLabel

    feature = rows.features["label"]
    feature = ClassLabel(names=list(names)) if isinstance(feature, ClassLabel) else feature
    labels = [order[i] for i in rows["label"][:]]
    return rows.remove_columns("label").add_column("label", labels, feature=feature)


def spaced(count: int, most: int) -> list[int]:
    """Numbers of `most` of so many rows, of all where there are no more, evenly spaced: of rows that are sorted by
    class each class has its share."""
    some = min(count, most)
    return [i * count // some for i in range(some)]
