"""The runs of a study on disk: one SQLite file that several processes may share and a kill cannot hurt."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .alive import Owner, Watchman
from .trial import Trial

VERSION = 1
BEAT = 5.0  # seconds between signs of life
SCHEMA = """
create table if not exists runs (
    key text primary key,
    trial text not null,       -- the whole configuration, JSON
    state text not null,       -- running | done | failed
    attempts integer not null, -- how often it was begun
    worker text not null,      -- whose it is, see `Owner`
    beat real not null,        -- how often it gave a sign of life: a count, because clocks of machines differ
    result text                -- done: figures, JSON; failed: the error
);
"""
RATES = "create table if not exists rates (key text primary key, found text not null)"  # see `guess`; since version 1


@dataclass(frozen=True)
class Record:
    """What the store knows of a run."""

    state: str
    attempts: int
    worker: str
    beat: float
    result: Mapping[str, Any] | None
    error: str | None

    @property
    def pruned(self) -> bool:
        """Whether successive halving ended it early."""
        return self.result is not None and self.result["pruned"]


class Store:
    """One file.  A run is claimed by one process at a time; that of a process that died is free again.

    Everything raises OSError for a file that cannot be used.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.worker, self.others = path, str(Owner.this()), Watchman()
        with self._open() as db:
            (version,) = db.execute("pragma user_version").fetchone()
            if version not in (0, VERSION):
                raise ValueError(f"{path} is a store of version {version}; this undula reads version {VERSION}")
            if version == 0:  # a new file; one that exists is not touched
                db.executescript(SCHEMA)
                db.execute(f"pragma user_version = {VERSION}")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as db:
                yield db
        except sqlite3.Error as error:
            raise OSError(f"the runs in {self.path} cannot be read or written: {error}") from error

    def records(self, keys: Iterable[str]) -> dict[str, Record]:
        """What is known of these runs."""
        wanted = set(keys)
        with self._open() as db:
            rows = db.execute("select key, state, attempts, worker, beat, result from runs").fetchall()
        found = {}
        for key, state, attempts, who, beat, text in rows:
            if key in wanted:
                result = json.loads(text) if state == "done" else None
                found[key] = Record(state, attempts, who, beat, result, text if state == "failed" else None)
        return found

    def claim(self, trial: Trial) -> bool:
        """Takes a run for this process, if it is free: never begun, or in the hands of a process that is gone."""
        key = trial.key
        with self._open() as db:
            db.execute("begin immediate")
            try:
                row = db.execute("select state, attempts, worker, beat from runs where key = ?", (key,)).fetchone()
                if row is not None and (row[0] != "running" or not self.others.gone(key, row[2], row[3])):
                    return False
                attempts = 1 if row is None else row[1] + 1
                text = json.dumps(trial.encode(), sort_keys=True)
                values = (key, text, "running", attempts, self.worker, 0, None)
                db.execute("insert or replace into runs values (?, ?, ?, ?, ?, ?, ?)", values)
                return True
            finally:
                db.execute("commit")

    def finish(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Records the figures of a run, unless another process has been given it meanwhile."""
        self._end(trial.key, "done", json.dumps(result))

    def fail(self, trial: Trial, error: str) -> None:
        """Records why a run failed."""
        self._end(trial.key, "failed", error)

    def _end(self, key: str, state: str, text: str) -> None:
        with self._open() as db:
            what = (state, text, key, self.worker)
            db.execute("update runs set state = ?, result = ?, beat = beat + 1 where key = ? and worker = ?", what)

    def release(self, keys: Iterable[str]) -> None:
        """Lets go of runs that this process has claimed and not ended."""
        with self._open() as db:
            own = [(key, self.worker) for key in keys]
            db.executemany("delete from runs where key = ? and worker = ? and state = 'running'", own)

    def forget(self, records: Mapping[str, Record]) -> None:
        """Makes runs free again, but those that another process has taken since they were read."""
        with self._open() as db:
            read = [(key, r.state, r.worker, r.beat) for key, r in records.items()]
            db.executemany("delete from runs where key = ? and state = ? and worker = ? and beat = ?", read)

    def rates(self) -> dict[str, dict[str, Any]]:
        """{key: what was found} of the rates around which sweeps begin."""
        with self._open() as db:
            there = db.execute("select 1 from sqlite_master where name = 'rates'").fetchone()
            rows = db.execute("select key, found from rates").fetchall() if there else []
        return {key: json.loads(text) for key, text in rows}

    def keep_rate(self, key: str, found: Mapping[str, Any]) -> None:
        """Records what was found, unless another process was first."""
        with self._open() as db:
            db.execute(RATES)
            db.execute("insert or ignore into rates values (?, ?)", (key, json.dumps(found)))

    def beat(self) -> None:
        """A sign of life of this process."""
        with self._open() as db:
            db.execute("update runs set beat = beat + 1 where worker = ? and state = 'running'", (self.worker,))

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Within the context a thread gives signs of life."""
        over = threading.Event()

        def go() -> None:
            while not over.wait(BEAT):
                with contextlib.suppress(OSError):  # a locked file: the next beat will do
                    self.beat()

        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
