"""A client: trains what the server sends on rows that stay with it, and says where it has come to."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..train.rows import LOG
from .desk import Desk
from .messages import ROWS, Arrays, Counts, briefed, reply
from .rows import Rows
from .spec import Federation


class Client:
    """What it answers follows from the federation, the round and what it was sent, to the bit; it remembers nothing.

    rows, desk: where this process has them already.
    """

    def __init__(self, federation: Federation, name: str, rows: Rows | None = None, desk: Desk | None = None):
        rows = rows or Rows(federation)
        parts = rows.client(name)
        self.name, self.federation = name, rows.settled(federation)
        self.desk = (desk or Desk(self.federation, parts.train)).made_for(self.federation)
        self.rows = self.desk.examples(parts.train)
        self.held = None if parts.held is None else self.desk.examples(parts.held)
        self.part = self.desk.part(self.federation.party(name))
        self.like = self.part.of(self.desk.first)
        for note in self._looked():
            LOG.warning(note)

    def _looked(self) -> list[str]:
        """What is cut of its rows.  Raises ValueError for rows that the model cannot take; of those that it measures on
        that is a sentence."""
        fits = self.desk.run.task.fits
        notes = fits(self.rows, self.desk.model, self.name)
        try:
            return notes if self.held is None else notes + fits(self.held, self.desk.model, f"{self.name} validation")
        except ValueError as error:
            return [*notes, str(error)]

    def train(self, round: int, arrays: Arrays) -> tuple[Arrays, Counts]:
        """One round, counted from 1: (its adapter's numbers, {"num-examples", "loss", "steps"}), see `messages`.

        Raises ValueError for a brief that is none, RuntimeError where its training diverged, PermissionError where
        its own privacy budget is spent.
        """
        f, desk = self.federation, self.desk
        if f.privacy is not None and (why := f.privacy.declined(f, self.name, round)):
            raise PermissionError(why)
        sent = briefed(arrays, self.like, f.how, desk.base)
        with desk.holding(sent, self.part) as live:
            done = self._fit(round)
            trained = live.copy()
        if not all(torch.isfinite(t).all() for t in trained.parameters()):
            raise RuntimeError(f"{self.name} diverged in round {round}: a number is not finite. Lower lr")
        counts: Counts = {ROWS: len(self.rows), "loss": float(done.training_loss), "steps": int(done.global_step)}
        if f.privacy is not None:
            trained, counts = f.privacy.reply(sent, trained), f.privacy.said(counts)
        return reply(sent, trained, f.how), counts

    def _fit(self, round: int) -> Any:
        from transformers import set_seed
        from transformers.trainer_utils import SaveStrategy

        from ..train.trainer import trainer

        f, desk, seed = self.federation, self.desk, self.federation.seed(round, self.name)
        with tempfile.TemporaryDirectory() as scratch:
            run = dataclasses.replace(desk.run, seed=seed, out=Path(scratch))
            fitter = trainer(run, desk.model, self.rows, ())
            fitter.args.save_strategy = SaveStrategy.NO
            set_seed(seed)
            return fitter.train() if f.privacy is None else f.privacy.fit(fitter, f, len(self.rows), self.name, round)

    def evaluate(self, arrays: Arrays) -> Counts:
        """The metrics of what it is sent on rows of its own that it does not train on; {"num-examples": 0} without
        such rows."""
        if self.held is None:
            return {ROWS: 0}
        sent = briefed(arrays, self.like, self.federation.how, self.desk.base)
        return {ROWS: len(self.held), **self.desk.score(sent, self.held, self.part)}
