"""Whose rows are whose: the server's, and of each client those to train on and those to measure on."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, NamedTuple

from ..train.base import config_of
from ..train.data.faults import Faults
from ..train.data.load import load_data, sample, with_validation
from ..train.measure import rows_digest
from ..train.rows import LOG, in_own_order
from ..train.tasks.heads import Classes
from ..train.tasks.task import Task
from .spec import Federation

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


ALIKE = (
    "In the file of a federation columns and classes are options of the task, for all parties: "
    'task = { is = "classification", text = "COLUMN", label = "COLUMN", names = ["A", "B"] }; a client whose columns '
    'are called otherwise says so in its table: columns = { text = "COLUMN" }. Without names the classes are those of '
    "the server's rows. skip_faulty = SHARE leaves rows out"
)


def _tell(who: str, faults: Faults) -> None:
    """The rows that are left out."""
    for note in faults.told():
        LOG.warning(f"{who}: {note}")


class Parts(NamedTuple):
    """Rows to train on, and rows of the same party to measure on (none where it has one row alone)."""

    train: Dataset
    held: Dataset | None


class Rows:
    """Reads what is asked for, and that once."""

    def __init__(self, federation: Federation):
        self.asked = federation
        self._clients: dict[str, Parts] = {}

    @functools.cached_property
    def task(self) -> Task:
        """The task, fitted (its classes named), which all parties must agree on: by the server's rows, unless the file
        names the classes."""
        task = self.asked.recipe.task
        said = type(task).fitted is Task.fitted or (isinstance(task, Classes) and task.names)
        return task if said else self._server[0]

    def settled(self, federation: Federation) -> Federation:
        """The same with the task fitted."""
        return dataclasses.replace(federation, recipe=dataclasses.replace(federation.recipe, task=self.task))

    @functools.cached_property
    def _server(self) -> tuple[Task, DatasetDict]:
        recipe = self.asked.recipe
        faults = Faults(recipe.skip_faulty, recipe.encoding)
        task, parts = recipe.task.read(load_data(recipe.data, faults), "train", "validation", "test", faults=faults)
        _tell("the server", faults)
        if self.asked.split is not None:
            parts = with_validation(parts, recipe.seed)
        elif "validation" in parts:
            LOG.warning(
                f"the server: its {len(parts['train']):,} training rows are not used, for clients have rows of their "
                "own: it measures on its validation rows"
            )
        task, parts, _ = in_own_order(recipe.task, task, parts, config_of(recipe.model))
        return task, parts

    @functools.cached_property
    def server(self) -> Dataset:
        """What the server measures on after each round."""
        parts, recipe = self._server[1], self.asked.recipe
        return sample(parts["validation"] if "validation" in parts else parts["train"], recipe.eval_rows, recipe.seed)

    @functools.cached_property
    def test(self) -> Dataset | None:
        """What the server measures on at the end, by which nothing was chosen; None where its data have none."""
        test, recipe = self._server[1].get("test"), self.asked.recipe
        return None if test is None else sample(test, recipe.eval_rows, recipe.seed)

    @functools.cached_property
    def divided(self) -> dict[str, Dataset]:
        """{client: its rows} of a data set that is divided."""
        split, recipe = self.asked.split, self.asked.recipe
        assert split is not None
        rows = sample(self._server[1]["train"], recipe.train_rows, recipe.seed)
        names = getattr(self._server[0], "names", ())
        labels = rows["label"][:] if names and "label" in rows.column_names else None
        parts = split.parts(labels, len(rows), self.asked.seed("split"))
        return {name: rows.select(part) for name, part in zip(split.names, parts, strict=True)}

    def client(self, name: str) -> Parts:
        """The rows of one client.  Raises LookupError for one that there is not, ValueError or LookupError for rows
        that its task cannot take, or with which it cannot be as private as the federation asks for."""
        f = self.asked
        if name not in f.names:
            raise LookupError(f"there is no client {name!r}; there are: {', '.join(f.names[:20])}")
        if name not in self._clients:
            parts = {"train": self.divided[name]} if f.split is not None else self._own(name)
            made = self._with_held(name, parts)
            if f.privacy is not None:
                try:
                    f.privacy.noise_of(f, name, len(made.train))
                except ValueError as error:
                    raise ValueError(f"privacy of client {name}: {error}") from error
            self._clients[name] = made
        return self._clients[name]

    def digest(self, name: str) -> str:
        """What tells the rows of one client from others, and from themselves in another order."""
        return "/".join(rows_digest(part) for part in self.client(name) if part is not None)

    def _own(self, name: str) -> dict[str, Dataset]:
        f = self.asked
        party = f.party(name)
        assert party.data is not None
        task = dataclasses.replace(self.task, **(party.columns or {}))  # type: ignore[type-var]
        faults = Faults(f.recipe.skip_faulty, f.recipe.encoding)  # the server's faults are its own
        kinds, rows = (FileNotFoundError, LookupError, ValueError), None
        try:
            rows = load_data(party.data, faults)
            found = task.splits(rows, "train", "validation", faults=faults)
        except kinds as error:
            kind = next(kind for kind in kinds if isinstance(error, kind))
            more = "" if rows is None else f". {ALIKE}"
            raise kind(f"client {name}: {error}{more}") from error
        _tell(f"client {name}", faults)
        return dict(found) | {"train": sample(found["train"], f.recipe.train_rows, f.seed("rows", name))}

    def _with_held(self, name: str, parts: dict[str, Dataset]) -> Parts:
        from datasets import DatasetDict

        if "validation" not in parts and len(parts["train"]) < 2:
            return Parts(parts["train"], None)
        made = with_validation(DatasetDict(parts), self.asked.seed("held", name))
        recipe = self.asked.recipe
        return Parts(made["train"], sample(made["validation"], recipe.eval_rows, recipe.seed))
