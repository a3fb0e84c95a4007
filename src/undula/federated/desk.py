"""The base model of a federation, opened once in a process, with the adapter on it: a server measures there, and
clients that are in the process train there one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Adapter
from ..core.extras import needs
from ..host.host import attach, detach
from ..host.where import choose, inner
from ..train.base import model_folder
from ..train.begun import with_method
from ..train.checkpoints import restore
from ..train.measure import files_digest
from ..train.prepared import assembled
from ..train.tasks.task import Examples
from .ffa import linear_factor
from .part import WHOLE, Part, most_ranks, of_layers
from .party import MORE_RANKS
from .spec import Federation, Party

if TYPE_CHECKING:
    from datasets import Dataset


class Desk:
    """federation: its task is fitted.  rows: some of this party's own, for methods that begin with a look at data.

    `adapter` is on the model; what of it clients do not train asks for no gradients.  `first`: what it was.
    """

    @needs("train")
    def __init__(self, federation: Federation, rows: Dataset):
        run = federation.run(Path())
        if getattr(run.task, "names", None) == ():
            raise ValueError("the classes are not named: take Rows(federation).settled(federation)")
        ready = assembled(with_method(run) if run.begin_from is not None else run, rows, rows)
        self.federation, self.run = federation, ready.run
        both = (note.replace(" train rows", " rows").replace(" validation rows", " rows") for note in ready.notes)
        self.notes = tuple(dict.fromkeys(both))  # of one set of rows, which stands for both parts
        self.model, self.processor, self.adapter = ready.model, ready.processor, ready.adapter
        folder = Path(model_folder(run.model))
        self.base = files_digest(folder) if folder.is_dir() else str(getattr(self.model.config, "_commit_hash", None))
        if federation.how.trains == "linear":
            for site, name, t in self.adapter.tensors():
                t.requires_grad_(t.requires_grad and name == linear_factor(self.adapter.methods[site], site))
        self.first = self.adapter.copy()

    def made_for(self, federation: Federation) -> Desk:
        """This desk.  Raises ValueError where it is of other layers, or others of their factors train."""
        if (self.federation.recipe, self.federation.how) != (federation.recipe, federation.how):
            raise ValueError("this desk was made for another federation, with another recipe or aggregation")
        return self

    def examples(self, rows: Dataset) -> Examples:
        """Rows as the model takes them."""
        return Examples(self.run.task, rows, self.processor)

    def put(self, adapter: Adapter) -> None:
        """Takes over the numbers of an adapter made as this one."""
        restore(self.adapter, adapter)

    def part(self, party: Party) -> Part:
        """What a client has of the adapter.  Raises LookupError or ValueError for layers that it has not, TypeError for
        a method that is not cut at a rank."""
        sites = None if party.where is None else self._layers(party.name, party.where)
        part = Part(party.r, sites)
        try:
            if party.r is not None and party.r > (most := most_ranks(self.first, sites)):
                raise ValueError(MORE_RANKS.format(party.name, party.r, most))
            return part if part.of(self.first).methods != self.first.methods else WHOLE
        except TypeError as error:
            raise TypeError(f"client {party.name}: {error}") from error

    def _layers(self, client: str, where: tuple[str, ...]) -> frozenset[str] | None:
        """Those of the adapter that these names choose; None for all."""
        with self._without():
            asked = {each: self._named(client, each) & {*self.first.methods} for each in where}
        if odd := [each for each, found in asked.items() if not found]:
            raise ValueError(f"client {client}: {odd[0]!r} names none of the layers that the federation adapts")
        return of_layers(list(self.first.methods), set().union(*asked.values()))

    def _named(self, client: str, where: str) -> set[str]:
        try:
            return {*choose(inner(self.model), where)}
        except (LookupError, TypeError) as error:
            kind = LookupError if isinstance(error, LookupError) else TypeError
            raise kind(f"client {client}: {error}") from error

    @contextlib.contextmanager
    def _without(self) -> Iterator[None]:
        """The model without the adapter, which goes on afterwards as it was."""
        detach(self.model)
        try:
            yield
        finally:
            attach(self.model, self.adapter)

    @contextlib.contextmanager
    def holding(self, adapter: Adapter, part: Part = WHOLE) -> Iterator[Adapter]:
        """Has the numbers of an adapter on the model, which is such a part of this one; gives it as it is there."""
        if part.whole:
            self.put(adapter)
            yield self.adapter
            return
        with self._without():
            live = attach(self.model, adapter)
            try:
                yield live
            finally:
                detach(self.model)

    def score(self, adapter: Adapter, examples: Examples, part: Part = WHOLE) -> dict[str, float]:
        """The task's metrics of the model with that adapter."""
        with self.holding(adapter, part):
            return self.run.task.score(self.model, examples, self.run.batch)
