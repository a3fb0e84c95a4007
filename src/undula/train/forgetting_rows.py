"""Whether the classes that a model is to forget have rows by which they can be forgotten, and seen to be."""

from __future__ import annotations

from collections.abc import Sequence

from .data.faults import Faults
from .data.load import load_data, sample
from .rows import LOG, rows_of
from .run import Run
from .tasks.forgetting import Forgets


def quoted(name: str) -> str:
    """The name of a class as `--forget` takes it: in quotes where it holds a comma."""
    return f'"{name}"' if "," in name else name


def check_rows(runs: Sequence[Run]) -> None:
    """Raises ValueError where a class to forget has no training row, or none of a request has one in a part by which
    it is chosen or measured.  Warns of single classes that lack those."""
    rows = rows_of(runs[0])
    parts = {"train": rows.train, "validation": rows.held}
    faults = Faults(runs[0].skip_faulty, runs[0].encoding)
    every = load_data(runs[0].data, faults)
    if "test" in every:
        test = rows.task.splits(every, "test", faults=faults)["test"]
        parts["test"] = sample(test, runs[0].eval_rows, runs[0].seed)
    for name, part in parts.items():
        there = set(part["label"][:])
        for task in (run.task for run in runs):
            assert isinstance(task, Forgets)
            none = [c for c in task.forget if task.names.index(c) not in there]
            if none and (name == "train" or len(none) == len(task.forget)):
                raise ValueError(
                    f"{name} has no row of {', '.join(map(quoted, none))} among its {len(part)}, which is to be "
                    "forgotten: give it one (--train-rows and --eval-rows take a sample), or leave that class out"
                )
            for c in none:
                LOG.warning(f"{name} has no row of {quoted(c)}: what becomes of it is not seen there")
