"""A federation as a value, and in a file: what clients train, how many rounds, what the server makes of it.

model = "bundled:minilm"             fields of a run, for all clients
data = "bundled:wordnet"             the server's: it measures on the validation rows
task = "classification"
method = { is = "lora", r = 4 }
max_steps = 10                       steps, or epochs, of a client in a round (one epoch where nothing is said)
rounds = 20
how = "fedsvd"                       an aggregation
split = { is = "dirichlet", alpha = 0.5, clients = 10 }    of the training rows of `data`; or

[[clients]]                          clients with rows of their own, which nobody else reads, and with parts of theirs
name = "north"
data = "north.csv"
r = 2                                (with a split: tables of those clients that differ, without data)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..core.choice import as_json, from_json
from ..core.given import Checked, hints
from ..core.ranges import Count, Natural, Positive, SomeShare
from ..io import toml
from ..io.toml import Faults
from ..jobs.file import Reading
from ..optim.schedules import Constant
from ..train.config import NONE, said, said_of, value_of
from ..train.fields import default_of, told
from ..train.recipe import Recipe, recipe_of
from ..train.run import Run
from .aggregation import Aggregation
from .fedit import FedIT
from .ffa import linear_factor
from .party import Party
from .privacy import Privacy
from .split import Split

ROWS, ALIKE = WEIGHTS = ("rows", "alike")
# of a client's part of a round, where a file says nothing: rates that stay, and no evaluations
OF_A_ROUND: dict[str, Any] = {"epochs": 1.0, "schedule": Constant(), "warmup": 0.0}
NO_DATA = "client {} needs data: the path of its rows"
NOT_OF_CLIENTS = {
    "allocator": "each client would come to other ranks, which have no average: leave it out",
    "eval_every": "the server measures after each round, and clients after every client_eval_every: leave it out",
    "keep_best": "the server goes on from the last round: leave it out",
    "patience": "a client's part of a round is as long as max_steps or epochs say: leave it out",
    "save_every": "the server keeps each round; a client has nothing to go on from: leave it out",
    "by_chance": "it is for runs of old: leave it out",
}


NOTHING_BEFORE = (
    "keeps away from what the tasks before have used, and rounds leave nothing of that: begin with an adapter that it "
    "has trained (begin_from), or take another, such as AdamW"
)
Place = str | tuple[str, int]  # a field, or one of its tables


class Unfit(ValueError):
    """What does not go together, as (field, why)."""

    def __init__(self, found: list[tuple[Place, str]]):
        self.found = found
        super().__init__("; ".join(why for _, why in found))


@dataclass(frozen=True)
class Federation(metaclass=Checked):
    """What is trained, by whom, and what the server makes of it.

    recipe: as for a training; `data` is the server's, and with `split` its training rows are divided among clients;
    without, `clients` have rows of their own, and all of the server's are for measuring (its validation rows, where it
    has such a part).  epochs or max_steps are of one client in one round, the seed is everybody's.
    how: what the server makes of the clients' adapters.  fraction: of the clients in a round, drawn anew each time;
    min_clients: in a round of fewer replies the adapter stays.  timeout: seconds that the server waits for a client.
    weights: "rows", p_k in proportion to the clients' rows, or "alike".
    client_eval_every: rounds between measurements by clients on rows of theirs; 0: after the last alone.
    """

    recipe: Recipe
    rounds: Count
    _: KW_ONLY
    how: Aggregation = FedIT()
    split: Split | None = None
    clients: tuple[Party, ...] = ()
    fraction: SomeShare = 1.0
    min_clients: Count = 1
    timeout: Positive | None = None
    weights: str = ROWS
    client_eval_every: Natural = 0
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        if found := list(faults_of(self)):
            raise Unfit(found)

    @staticmethod
    def as_meant(name: str, value: Any) -> Any:
        """See `given.Checked`."""
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """The clients, in their order."""
        return self.split.names if self.split is not None else tuple(party.name for party in self.clients)

    def party(self, name: str) -> Party:
        """What the file says of a client."""
        return next((party for party in self.clients if party.name == name), Party(name))

    def seed(self, *what: object) -> int:
        """32 bits that follow the federation's seed and what they are for."""
        text = "/".join(map(str, (self.recipe.seed, *what)))
        return int.from_bytes(sha256(text.encode()).digest()[:4])

    def chosen(self, round: int) -> tuple[str, ...]:
        """The clients of a round, which is counted from 1, in their order."""
        number = max(self.min_clients, math.ceil(self.fraction * len(self.names)))
        drawn = set(random.Random(self.seed("clients", round)).sample(self.names, number))
        return tuple(name for name in self.names if name in drawn)

    @functools.cached_property
    def planned(self) -> dict[str, int]:
        """In how many rounds each client is asked."""
        asked = Counter(name for round in range(1, self.rounds + 1) for name in self.chosen(round))
        return {name: asked[name] for name in self.names}

    def run(self, out: Path) -> Run:
        """The run of which all clients take part."""
        return dataclasses.replace(Run.of(self.recipe, out), eval_every=0.0, keep_best=False)

    def encode(self) -> dict[str, Any]:
        """As JSON values; paths that exist here are made absolute."""
        own = {
            f.name: as_json(getattr(self, f.name)) for f in fields(Federation) if f.name not in ("recipe", "clients")
        }
        return {"recipe": self.recipe.encode(), **own, "clients": [party.encode() for party in self.clients]}

    @staticmethod
    def decode(data: Mapping[str, Any]) -> Federation:
        """The inverse of `encode`.  Raises LookupError or ValueError."""
        kinds = hints(Federation)
        if unknown := sorted(set(data) - set(kinds)):
            raise LookupError(f"a federation has no {', '.join(unknown)}")
        own = {k: from_json(v, kinds[k], k) for k, v in data.items() if k not in ("recipe", "clients")}
        clients = tuple(Party(**each) for each in data.get("clients", ()))
        return Federation(recipe_of(data["recipe"]), clients=clients, **own)


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What of an encoded federation is not as it was: settings, and clients, by their names."""
    old, new = ({f"client {each['name']}": each for each in said.get("clients", ())} for said in (before, now))
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(before, now), (before["recipe"], now["recipe"])]
    for a, b in (*pairs, (old, new)):
        for name in {**a, **b}:
            if name not in ("recipe", "clients") and a.get(name) != b.get(name):
                yield name
    if list(old) != list(new) and {*old} == {*new}:
        yield "the order of clients"


def written(f: Federation) -> str:
    """The federation as a TOML file, from which `read` makes the same one."""
    r = f.recipe
    always = {"epochs": r.epochs, "warmup": r.warmup, "schedule": NONE if r.schedule is None else r.schedule.encode()}
    data = {**said(r), **always, **said_of(Federation, {k: v for k, v in f.encode().items() if k != "recipe"})}
    return f"# undula federate THIS_FILE --out DIRECTORY   repeats this federation\n\n{toml.written(data)}"


def faults_of(f: Federation) -> Iterator[tuple[Place, str]]:
    """(field, why) of what does not go together."""
    default = {x.name: default_of(x) for x in told(Recipe)}
    for name, why in NOT_OF_CLIENTS.items():
        if getattr(f.recipe, name) != default[name]:
            yield name, f"{name}: {why}"
    if f.recipe.lr is None:
        yield "lr", "lr is auto, which no client can find for all: name a rate"
    if f.recipe.optimiser.carries and f.recipe.begin_from is None:
        yield "optimiser", f"{f.recipe.optimiser!r}: {NOTHING_BEFORE}"
    yield from _of_clients(f)
    if f.weights not in WEIGHTS:
        yield "weights", f'weights are "{ROWS}" or "{ALIKE}", found {f.weights!r}'
    yield from _of_linear(f) if f.how.trains == "linear" else ()
    for why in f.privacy.refusals(f) if f.privacy is not None else ():
        yield why.split(" ", 1)[0].strip(":,"), why


def _of_clients(f: Federation) -> Iterator[tuple[Place, str]]:
    if f.split is None and not f.clients:
        yield "split", "clients are those of `split`, who share the rows of `data`, or tables [[clients]]: give one"
    names = [party.name.casefold() for party in f.clients]
    for i, party in enumerate(f.clients):
        for why in (*party.faults(f.recipe, f.privacy), *_of_rows(f, party)):
            yield ("clients", i), why
        if (first := names.index(party.name.casefold())) < i:
            as_it = "" if f.clients[first].name == party.name else f" as {f.clients[first].name!r} is, but for case"
            yield ("clients", i), f"two clients are called {party.name!r}{as_it}"
    if f.names and f.min_clients > len(f.names):
        yield "min_clients", f"min_clients={f.min_clients}, and there are {len(f.names)} clients"


def _of_rows(f: Federation, party: Party) -> Iterator[str]:
    """Whose rows a client of a table has: its own, or its share of a split."""
    if f.split is None and party.data is None:
        yield NO_DATA.format(party.name)
    if f.split is not None and (party.data is not None or party.columns is not None):
        yield f"client {party.name} has its share of the rows of `split`: leave out data and columns, or the split"
    if f.split is not None and party.name not in f.split.names:
        known = f.split.names
        yield f"the split has no client {party.name!r}; its clients are {known[0]} to {known[-1]}"


def _of_linear(f: Federation) -> Iterator[tuple[str, str]]:
    """Where clients train one factor alone."""
    for name, method in (("method", f.recipe.method), *(("overrides", m) for m in f.recipe.overrides.values())):
        try:
            None if method is None else linear_factor(method, "every layer")
        except TypeError as error:
            yield name, str(error)
    if f.recipe.optimiser.paired and f.recipe.optimiser.by_pairs:
        yield "optimiser", f"{f.recipe.optimiser!r} moves pairs of factors, and with {f.how!r} clients train one alone"


def read(path: str | Path) -> Federation:
    """The federation in a TOML file.  Raises Faults (a ValueError) with all that is wrong and its lines,
    FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} is no file of a federation; TOML files there: {', '.join(there) or 'none'}")
    text = toml.text_of(path)
    data, reading = toml.parsed(text, str(path)), Reading(toml.lines(text))
    shared, own = _values(reading, data)
    for kind in (Recipe, Federation):
        missing = [f.name for f in told(kind) if default_of(f) is MISSING and f.name not in (*data, "recipe")]
        if missing:
            reading.fault((), f"{', '.join(missing)} is not said")
    made = None if reading.found else _made(reading, shared, own)
    if made is None:
        raise Faults(str(path), reading.found)
    return made


def _made(reading: Reading, shared: dict[str, Any], own: dict[str, Any]) -> Federation | None:
    recipe = reading.attempt((), lambda: Recipe(**shared))
    if recipe is None:
        return None
    try:
        return Federation(recipe, **own)
    except Unfit as error:
        for name, why in error.found:
            reading.fault(name if isinstance(name, tuple) else (name,), why)
    return None


def _values(reading: Reading, data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values of the recipe, values of the federation's own fields) of those that can be read."""
    mine = {f.name for f in told(Federation)} - {"recipe"}
    given = {k: v for k, v in OF_A_ROUND.items() if k != "epochs" or "max_steps" not in data}
    shared: dict[str, Any] = {k: v for k, v in given.items() if k not in data}
    own: dict[str, Any] = {}
    for name, value in data.items():
        if name == "clients":
            own[name] = tuple(_parties(reading, value, "split" in data))
            continue
        kind, into = (Federation, own) if name in mine else (Recipe, shared)
        found = reading.attempt((name,), lambda kind=kind, name=name, value=value: (value_of(kind, name, value),))  # type: ignore[misc]
        into |= {} if found is None else {name: found[0]}
    return shared, own


def _parties(reading: Reading, tables: Any, split: bool) -> Iterator[Party]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        reading.fault(("clients",), f"clients are tables, [[clients]] each, found {tables!r:.60}")
        return
    for i, table in enumerate(tables):
        party = reading.attempt(("clients", i), lambda table=table: Party(**table))  # type: ignore[misc]
        if party is not None:
            yield party
        if party is not None and party.data is None and not split:
            reading.fault(("clients", i), NO_DATA.format(party.name))
