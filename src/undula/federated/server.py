"""The server: what goes out in each round, what is made of what comes back, what is kept of it on disk.

OUT/federation.json              the federation, and what tells its base and the rows that are here from others
OUT/state.{json,safetensors}     the last round: the adapter, what the aggregation keeps, the records of all rounds

A client that fails, or sends what is no answer, is a line in the round's record; the round goes on without it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.adapter import Adapter
from ..io import files
from ..train.fit import adapters_read
from ..train.measure import rows_digest
from ..train.run import write_json
from ..train.tasks.task import Examples
from . import messages
from .aggregation import Aggregation, bias, shares_of
from .desk import Desk
from .flat import flat
from .messages import ROWS, Arrays, Failure, Reply
from .part import WHOLE, Part, unreached
from .rows import Rows
from .spec import ALIKE, Federation, changed

SPEC, STATE, VERSION = "federation.json", "state", 1
RUNTIME = "flower"  # a folder in OUT, of what carries the rounds
Record = dict[str, Any]
# (what was sent, the adapters that count, their weights): what the aggregation gets in their place
Pool = Callable[[Adapter, list[Adapter], list[float]], tuple[list[Adapter], list[float]]]


class Server:
    """round: the last one that is done.  adapter: what it has come to.  records: of round 0, before any, and of each
    since.  pool: what another library makes of the clients' adapters first.

    rows, desk: where this process has them already.  told: what else a federation that goes on must have begun with, by
    what it is called.  With `resume` it goes on from the last round in OUT, to the bit as if it had not ended.  Raises
    FileExistsError where OUT holds another, ValueError where it was begun with something else.
    """

    def __init__(
        self,
        federation: Federation,
        out: Path,
        rows: Rows | None = None,
        desk: Desk | None = None,
        resume: bool = False,
        told: Mapping[str, str] | None = None,
    ):
        rows = rows or Rows(federation)
        self.federation, self.out = rows.settled(federation), Path(out)
        self.desk = (desk or Desk(self.federation, rows.server)).made_for(self.federation)
        self.held = self.desk.examples(rows.server)
        self.test = None if rows.test is None else self.desk.examples(rows.test)
        self.pool: Pool = lambda sent, adapters, weights: (adapters, weights)
        self.sees_each = True  # and not the mean of all in the place of each
        self.state: dict[str, torch.Tensor] = {}
        self.adapter, self.round, self.records = self.desk.first, 0, list[Record]()
        check_goes_on(self.federation.how, self.adapter)  # before OUT holds anything
        self.parts = {party.name: self.desk.part(party) for party in self.federation.clients}
        cut = [] if self.test is None else self.desk.run.task.fits(self.test, self.desk.model, "test")
        self.notes = [f"the server: {note}" for note in (*self.desk.notes, *cut)]
        self.notes += unreached([self.part(name) for name in self.federation.names], self.adapter)
        self._claim(resume, told or {})
        self.asked: list[int] = []  # the rounds that clients were asked for, see `ask`
        if not (resume and self._restored()):
            self.records.append({"round": 0, "server": self.score(self.adapter, self.held)})
            self._save()

    @property
    def result(self) -> Adapter:
        """What the rounds have come to: of a sparse way what clients are sent, for their changes are from there."""
        return self.federation.how.sent(self.adapter, self.desk.first)

    @property
    def moved(self) -> bool:
        """Whether any round has changed the adapter."""
        return any("stayed" not in record for record in self.records[1:])

    def score(self, adapter: Adapter, examples: Examples) -> dict[str, float]:
        """The metrics of what clients would be sent of it."""
        return self.desk.score(self.federation.how.sent(adapter, self.desk.first), examples)

    def chosen(self) -> tuple[str, ...]:
        """The clients of the next round."""
        return self.federation.chosen(self.round + 1)

    def ask(self) -> tuple[str, ...]:
        """The clients of the next round, who are asked now.  Under privacy that is written down before: where the
        round is asked for again after a kill, it has cost twice."""
        if self.federation.privacy is not None:
            self.asked.append(self.round + 1)
            self._save()
        return self.chosen()

    def brief(self, part: Part = WHOLE) -> Arrays:
        """What a client is sent that has such a part; also what it measures on."""
        return messages.brief(self.adapter, self.federation.how, self.desk.base, part, self.desk.first)

    def part(self, name: str) -> Part:
        """What a client has of the adapter."""
        return self.parts.get(name, WHOLE)

    def briefs(self, names: Iterable[str]) -> dict[str, Arrays]:
        """What each of these is sent."""
        made = {part: self.brief(part) for part in {self.part(name) for name in names}}
        return {name: dict(made[self.part(name)]) for name in names}

    def take(self, replies: Mapping[str, Reply | Failure]) -> Record:
        """Ends the next round with what came of its clients, and returns its record.  The same replies make the same
        adapter, in whatever order they came."""
        f, number, told = self.federation, self.round + 1, self.briefs(self.chosen())
        sent = messages.briefed(self.brief(), self.desk.first, f.how, self.desk.base)
        record: Record = {"round": number, "clients": {}, "down": 0, "up": 0}
        adapters, weights = [], []
        for name in self.chosen():
            record["down"] += messages.size(told[name])
            found = self._heard(name, replies.get(name, Failure("absent", "no answer")), sent)
            if isinstance(found, Failure):
                record["clients"][name] = {"failed": found.kind, "why": found.why[:500]}
                continue
            adapter, counts, size = found
            change = {"change": float((flat(adapter) - flat(sent)).norm())} if self.sees_each else {}
            record["clients"][name] = {**counts, **change, "bytes": size}
            record["up"] += size
            adapters.append(adapter)
            weights.append(1.0 if f.weights == ALIKE else float(counts[ROWS]))
        record |= self._moved(sent, adapters, weights)
        self.asked += [number] if number not in self.asked else []  # whoever did not say so before
        record |= self._spent(record)
        self.round = number
        self.records.append(record)
        self._save()
        return record

    def _heard(self, name: str, said: Reply | Failure, sent: Adapter) -> Failure | tuple[Adapter, messages.Counts, int]:
        if isinstance(said, Failure):
            return said
        try:
            arrays, counts = said
            known = messages.counted(counts, name)
            if (privacy := self.federation.privacy) is not None:
                privacy.noise_of(self.federation, name, int(known[ROWS]))
                if why := privacy.declined(self.federation, name, self.round + 1):  # whatever its own file says
                    return Failure("refused", why)
            part = self.part(name)
            adapter = part.into(sent, messages.replied(arrays, part.of(sent), self.federation.how, name))
        except (ValueError, TypeError) as error:
            return Failure("refused", str(error))
        before = next((r["clients"][name][ROWS] for r in self.records[1:] if ROWS in r["clients"].get(name, {})), None)
        if before is not None and known[ROWS] != before:
            return Failure("refused", f"{name}: {before} rows before, now {known[ROWS]}: a client's rows stay as many")
        return adapter, known, messages.size(arrays)

    def _moved(self, sent: Adapter, adapters: list[Adapter], weights: list[float]) -> Record:
        """Goes on to what the aggregation makes, where that is sound; the part of the record on it."""
        f = self.federation
        if len(adapters) < f.min_clients:
            return self._stayed(f"{len(adapters)} replies count, and a round takes {f.min_clients} (min_clients)")
        state, answered = dict(self.state), len(adapters)
        try:
            if f.privacy is not None:
                pooled = f.privacy.pooled(sent, adapters, weights, f, f.seed("noise", self.round + 1))
                adapters, weights = list(pooled[0]), list(pooled[1])
            adapters, weights = self.pool(sent, adapters, weights)
            made = messages.taken_over(self.adapter, f.how(adapters, weights, self.adapter, state))
        except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: a factorisation of what is too large
            return self._stayed(str(error))
        measured = self.score(made, self.held) if _finite(made) else {"loss": math.nan}
        if not all(math.isfinite(v) for v in measured.values()):
            return self._stayed("with what the clients sent the model's answers are not finite")
        self.adapter, self.state = made, state
        # if sparse it is no estimate of the mean; and of one that stands for all no mean can be told
        found = {} if f.how.sparse or len(adapters) != answered else self._bias(adapters, weights, made)
        return {"server": measured, **found}

    def _stayed(self, why: str) -> Record:
        return {"server": self.records[-1]["server"], "stayed": why}

    def _spent(self, record: Record) -> Record:
        f = self.federation
        if f.privacy is None:
            return {}
        rows = {n: c[ROWS] for r in (*self.records[1:], record) for n, c in r["clients"].items() if ROWS in c}
        asked = Counter(name for number in self.asked for name in f.chosen(number))
        return {"privacy": f.privacy.spent(f, asked, rows)}

    def _bias(self, adapters: list[Adapter], weights: list[float], made: Adapter) -> Record:
        try:
            each = list(bias(adapters, shares_of(weights, len(adapters)), made).values())
        except (TypeError, RuntimeError):  # of a rung without updates, or of numbers that are too large
            return {}
        finite = each and all(map(math.isfinite, each))
        return {"bias": {"mean": sum(each) / len(each), "most": max(each)}} if finite else {}

    def measures(self) -> bool:
        """Whether clients are to measure what this round has made, and have not."""
        every, last = self.federation.client_eval_every, self.round == self.federation.rounds
        return self.round > 0 and (last or bool(every and self.round % every == 0)) and "spread" not in self.records[-1]

    def spread(self, said: Mapping[str, Mapping[str, Any] | Failure]) -> None:
        """Adds what clients have measured to the record of this round."""
        found: Record = {}
        for name in self.federation.names:
            counts = said.get(name, Failure("absent", "no answer"))
            try:
                told = counts if isinstance(counts, Failure) else messages.counted(counts, name, 0)
            except ValueError as error:
                told = Failure("refused", str(error))
            found[name] = {"failed": told.kind, "why": told.why[:500]} if isinstance(told, Failure) else told
        self.records[-1]["spread"] = found
        self._save()

    def _claim(self, resume: bool, told: Mapping[str, str]) -> None:
        path, said = self.out / SPEC, self.federation.encode()
        start = messages.digest(self.desk.first, self.federation.how, "").hex()
        own = {"the server's rows": self.held, "the server's test rows": self.test}
        digest = {"model": self.desk.base, **{k: rows_digest(v.rows) for k, v in own.items() if v is not None}, **told,
                  **adapters_read(self.desk.run), "numbers that clients draw themselves": start}  # fmt: skip
        check_place(self.out, resume)
        if not path.is_file():
            write_json(path, {"version": VERSION, "federation": said, "digest": digest})
            return
        there = stored(self.out)
        with files.door(str(path)):  # what is said there may be no federation
            odd = list(changed(there["federation"], said))
        odd += [k for k in digest if there["digest"].get(k, digest[k]) != digest[k]]  # those of old have fewer
        if odd:
            raise ValueError(
                f"{', '.join(odd)}: not what the federation in {self.out} began with. Put it back, or name another "
                "directory"
            )

    def _save(self) -> None:
        tensors = {f"adapter/{name}": t.detach() for name, t in messages.named(self.adapter).items()}
        tensors |= {f"state/{name}": t for name, t in self.state.items()}
        files.write_state(self.out, STATE, {"round": self.round, "records": self.records, "asked": self.asked}, tensors)

    def _restored(self) -> bool:
        if not (self.out / f"{STATE}.json").is_file():  # it ended before its first round
            return False
        values, tensors = files.read_state(self.out, STATE)
        with files.door(str(self.out / STATE)):
            parts = {kind: {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}
                     for kind in ("adapter/", "state/")}  # fmt: skip
            there, own = ({n: t.shape for n, t in a.items()} for a in (parts["adapter/"], messages.named(self.adapter)))
            if there != own:
                raise ValueError("it holds another adapter")
            self.adapter = messages.filled(self.adapter, parts["adapter/"])
            self.state, self.round, self.records = parts["state/"], values["round"], values["records"]
            self.asked = values["asked"]
        return True


def check_place(out: Path, resume: bool) -> None:
    """Raises FileExistsError where OUT holds something, and is not to be gone on with."""
    if (out / SPEC).is_file():
        if not resume:
            raise FileExistsError(f"{out} holds a federation already: --resume goes on with it; or name another")
    elif out.is_dir() and any(p.name != RUNTIME for p in out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name another directory")


def check_goes_on(how: Aggregation, first: Adapter) -> None:
    """That rounds can go on with what the aggregation makes.  Raises TypeError or ValueError."""
    messages.taken_over(first, how([first, first], [1, 1], first, {}))


def _finite(adapter: Adapter) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in adapter.parameters())


def stored(out: Path) -> dict[str, Any]:
    """What OUT/federation.json says.  Raises FileNotFoundError or ValueError."""
    path = Path(out) / SPEC
    if not path.is_file():
        raise FileNotFoundError(f"{out} holds no federation: {SPEC} is missing")
    with files.door(str(path)):
        found: dict[str, Any] = files.parsed(path.read_bytes(), str(path))
        if found.get("version") != VERSION or not {"federation", "digest"} <= set(found):
            raise ValueError(f"{path} is none of version {VERSION}")
        return found
