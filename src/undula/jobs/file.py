"""Many jobs in a file: what they share, and a table for each.

    model = "bundled:smollm2"            any field of a run, for all jobs that do not say another
    task = "causal-lm"
    method = { is = "lora", r = 8 }

    [[jobs]]
    name = "french"                      its directory is OUT/french
    data = "french.jsonl"

    [[jobs]]
    name = "german"
    data = "german.jsonl"
    lr = [3e-4, 1e-3]                    several values where a field has one: a job for each, german-lr0.0003 ...
    seed = [0, 1]                        of several such fields a job for each combination
    [jobs.method]
    r = 16                               options of the shared choice, or with `is` another choice

Values are those of a run's file, see `train.config`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.choice import Choice
from ..core.given import hints
from ..io import toml
from ..io.toml import Faults, line_of
from ..train.config import NONE, value_of
from ..train.fields import bare, default_of
from ..train.fields import told as told_fields
from ..train.recipe import Recipe
from ..train.run import Run
from .beforehand import KINDS, Beforehand, told
from .checks import faults_of
from .place import SUMMARY, WORKERS, check_place

NAME = re.compile(r"\w(?:[\w.+-]*\w)?")
LONGEST = 100  # characters of a name, a directory's
MOST = 1000  # jobs that a file may come to
Place = toml.Path
Table = Mapping[str, Any]
Unfit = Callable[[Mapping[str, Run]], Mapping[str, Sequence[str]]]  # {name: what is wrong with it beside the others}


@dataclass
class Reading:
    """The lines of a file, and what is wrong there."""

    where: dict[Place, int]
    found: list[tuple[int | None, str]] = field(default_factory=list)

    def fault(self, place: Place, text: str) -> None:
        line = line_of(place, self.where)
        if (line, text) not in self.found:  # what all jobs share is wrong once
            self.found.append((line, text))

    def attempt(self, place: Place, make: Callable[[], Any]) -> Any:
        """make(), or None with its error noted."""
        try:
            return make()
        except KINDS as error:
            self.fault(place, told(error))
            return None


@dataclass(frozen=True)
class Asked:
    """A job of a file, and where its table stands."""

    name: str
    recipe: Recipe
    place: Place


def read(
    path: str | Path, out: str | Path, *, resume: bool = False, unfit: Unfit = faults_of, aside: Sequence[str] = ()
) -> dict[str, Run]:
    """{name: run} of a file of jobs, each in OUT/NAME, in the order of the file.  `aside`: keys of a job's table that
    somebody else reads.

    Everything is checked before: names, values, that jobs can train together (by `unfit`, which says what is wrong with
    which), that data can be read by their task and divided, that the model has the layers, that OUT can be written and
    holds no such jobs (with `resume`: no others).  Raises Faults (a ValueError) with all that is wrong and its lines,
    FileNotFoundError for a file that is not there.
    """
    path, out = Path(path), Path(out)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a TOML file of jobs in it")
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} does not exist; TOML files there: {', '.join(there) or 'none'}")
    text = toml.text_of(path)
    data, reading = toml.parsed(text, str(path)), Reading(toml.lines(text))
    asked = list(_jobs(reading, data, aside))
    if not reading.found and not asked:
        reading.fault((), "there is no job: write a table [[jobs]] with a name for each")
    _check_names(reading, asked)
    runs = {job.name: Run.of(job.recipe, out / job.name) for job in asked}
    if not reading.found:
        _check_unfit(reading, asked, runs, unfit)
        _check_beforehand(reading, asked, runs, Beforehand(resume))
    for job in asked if not reading.found else ():
        reading.attempt(job.place, lambda run=runs[job.name]: check_place(run, resume))  # type: ignore[misc]
    if reading.found:
        raise Faults(str(path), reading.found)
    return runs


def _jobs(reading: Reading, data: Table, aside: Sequence[str]) -> Iterator[Asked]:
    shared = {key: value for key, value in data.items() if key != "jobs"}
    tables = data.get("jobs", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        reading.fault(("jobs",), f"jobs are tables, [[jobs]] each, found {tables!r:.60}")
        return
    if not tables:  # what stands there is looked at all the same
        _values(reading, shared, {}, ())
    for i, table in enumerate(tables):
        place = ("jobs", i)
        name = table.get("name")
        if not isinstance(name, str):
            reading.fault(
                (*place, "name"), "a job has a name, a text" + ("" if name is None else f", found {name!r:.60}")
            )
        own = {key: value for key, value in table.items() if key not in ("name", *aside)}
        jobs = list(_grid(reading, place, shared, own))
        if not jobs and isinstance(name, str) and (why := wrong_name(name)):  # beside what else is wrong
            reading.fault((*place, "name"), why)
        for label, values in jobs:
            made = reading.attempt(place, lambda values=values: Recipe(**values))  # type: ignore[misc]
            if made is not None and isinstance(name, str):
                yield Asked(f"{name}{label}", made, place)


def _grid(reading: Reading, place: Place, shared: Table, own: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """(end of the name, values) of each job that a table comes to; none where something is wrong."""
    lists = {name: (value, where) for name, value, where in _said(shared, own, place) if _is_grid(name, value)}
    for name, (several, where) in lists.items():
        if not several or any(several.count(value) > 1 for value in several):
            reading.fault(
                where, f"{name} is one value, or a list of different ones, a job for each; found {several!r:.60}"
            )
            return
    number = 1
    for several, _ in lists.values():
        number *= len(several)
    if number > MOST:
        reading.fault(place, f"these lists come to {number:,} jobs; a file has at most {MOST}")
        return
    names = list(lists)
    for chosen in itertools.product(*(enumerate(several) for several, _ in lists.values())):
        one = {name: value for name, (_, value) in zip(names, chosen, strict=True)}
        label = "".join(f"-{_label(name, value, i)}" for name, (i, value) in zip(names, chosen, strict=True))
        values = _values(reading, {**shared, **{n: v for n, v in one.items() if n not in own}},
                         {**own, **{n: v for n, v in one.items() if n in own}}, place)  # fmt: skip
        if values is not None:
            yield label, values


def _label(name: str, value: Any, number: int) -> str:
    """A value in the name of a job."""
    if isinstance(value, str):
        return value
    return f"{name}{value:g}" if isinstance(value, int | float) else f"{name}{number + 1}"


def _said(shared: Table, own: Table, place: Place) -> Iterator[tuple[str, Any, Place]]:
    """(field, value, where it stands) of what holds for a job, as the file says it."""
    for name, value in {**shared, **own}.items():
        yield name, value, (*place, name) if name in own else (name,)


def _is_grid(name: str, value: Any) -> bool:
    """Whether a list is of several values of a field, which itself is one number or one choice."""
    hint = bare(hints(Recipe)[name]) if name in _fields() else None
    return isinstance(value, list) and (hint in (int, float) or _is_choice(hint))


def _is_choice(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Choice)


def _fields() -> dict[str, Any]:
    return {f.name: f for f in fields(Recipe)}


def _values(reading: Reading, shared: Table, own: Table, place: Place) -> dict[str, Any] | None:
    """The values of a job; None where one is wrong or missing."""
    made: dict[str, Any] = {}
    before = len(reading.found)
    if "begin_from" in {**shared, **own} and "method" not in own:  # the method is that of the adapter
        shared = {**shared, "method": NONE}
    for name, value, where in _said(shared, own, place):
        if name == "out":
            reading.fault(where, "a job has no `out`: its directory is OUT/NAME")
            continue
        meant = _over(shared.get(name), value) if name in own and _is_choice_field(name) else value
        found = reading.attempt(where, lambda name=name, meant=meant: (value_of(Recipe, name, meant),))  # type: ignore[misc]
        made |= {} if found is None else {name: found[0]}
    missing = [f.name for f in told_fields(Recipe) if default_of(f) is MISSING and f.name not in {**shared, **own}]
    if missing:
        reading.fault(place, f"{', '.join(missing)} is said neither here nor for all jobs, at the top of the file")
    wrong = len(reading.found) > before or missing or len(made) < len({**shared, **own})
    return None if wrong else made


def _is_choice_field(name: str) -> bool:
    return name in _fields() and _is_choice(bare(hints(Recipe)[name]))


def _over(shared: Any, own: Any) -> Any:
    """Options of a choice that a job names no other of, over those that all jobs share."""
    if not isinstance(own, Mapping) or "is" in own or "name" in own or shared is None:
        return own
    return {**(shared if isinstance(shared, Mapping) else {"is": shared}), **own}


def _check_names(reading: Reading, asked: Sequence[Asked]) -> None:
    first: dict[str, str] = {}
    for job in asked:
        if why := wrong_name(job.name):
            reading.fault((*job.place, "name"), why)
        elif job.name.casefold() in first:
            other = first[job.name.casefold()]
            told = (
                f"two jobs are called {job.name!r}"
                if other == job.name
                else f"{other!r} and {job.name!r} differ in case alone"
            )
            reading.fault((*job.place, "name"), f"{told}: each has a directory of its own, OUT/NAME")
        first.setdefault(job.name.casefold(), job.name)


def wrong_name(name: str) -> str:
    """Why a text is no name of a job; empty for one that is."""
    if not NAME.fullmatch(name) or len(name) > LONGEST or len(name.encode()) > 2 * LONGEST:  # of 255 bytes mostly
        return (
            f"{name!r:.120} is no name of a job: letters, digits and - + . _ between them, {LONGEST} at most, since "
            "its directory is called so"
        )
    taken = name.casefold() in (SUMMARY, WORKERS)
    return f"a job cannot be called {name!r}: OUT has a file or a folder of that name" if taken else ""


def _check_unfit(reading: Reading, asked: Sequence[Asked], runs: Mapping[str, Run], unfit: Unfit) -> None:
    """What cannot train beside the others, at the setting (or its value) that its words begin with, where the job says
    that."""
    places = {job.name: job.place for job in asked}
    for name, reasons in unfit(runs).items():
        for why in reasons:
            values = {type(getattr(runs[name], f)).__name__: f for f in ("task", "allocator")}
            first = re.split(r"\W", why, maxsplit=1)[0]
            reading.fault((*places[name], values.get(first, first)), f"{name}: {why}")


def _check_beforehand(reading: Reading, asked: Sequence[Asked], runs: Mapping[str, Run], looked: Beforehand) -> None:
    """What would keep a job from beginning, at the first of the settings it is about that the job says itself."""
    for job in asked:
        for settings, why in looked.at(runs[job.name]):
            reading.fault(_place(reading, job, *settings), why)


def _place(reading: Reading, job: Asked, *names: str) -> Place:
    """Where the first of these fields that a job says itself stands; else the first, at the top."""
    return next(((*job.place, name) for name in names if (*job.place, name) in reading.where), names[:1])
