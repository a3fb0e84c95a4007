"""What is wrong with data, collected, so that one message says all of it: with file, line and column; and the rule by
which rows may be left out for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

TOLD = 10  # places that a kind of fault is told with; the rest is counted
FEW = 3  # the same where the rows are left out
Row = tuple[str, int]  # the name of a file (or a split), and the number of a line (or a row) there
OPTION = (
    "--skip-faulty SHARE (of train, eval, predict and generate), in Python Run(..., skip_faulty=SHARE), in a study "
    "skip_faulty = SHARE under [[data]]; SHARE is how much of a file may go at most, such as 0.1"
)


@dataclass
class Kind:
    """One kind of fault."""

    places: list[str] = field(default_factory=list)
    count: int = 0
    name: str | None = None  # the file whose single rows have it; None: of the file as a whole


class Faults:
    """Faults by kind, each with the places where it stands.

    encoding: that of files which do not say theirs (see `decoding.encoding_of`).
    skip: the share of a file's rows that may be left out for their faults.  Whoever reads adds what is wrong and leaves
    such rows out of what it returns; `check` then decides whether that may be.
    """

    def __init__(self, skip: float | None = None, encoding: str | None = None) -> None:
        self.skip = skip or 0.0
        self.encoding = encoding
        self.kinds: dict[str, Kind] = {}
        self.advice: dict[str, None] = {}  # ordered, each once
        self.lookup = False
        self.bad: dict[str, set[int]] = {}  # the rows of a file that have faults
        self.rows: dict[str, int] = {}  # how many rows a file has, faulty ones included
        self.where = ""  # the file that is looked at

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def add(self, what: str, place: str = "", advice: str = "", row: Row | None = None) -> None:
        """One fault: `what` is wrong, `place` where ("line 7", or "line 7 has 3"), `row` the one that could be left
        out; None: the fault is of more than one row."""
        kind = self.kinds.setdefault(what, Kind(name=None if row is None else row[0]))
        if row is None or kind.name != row[0]:
            kind.name = None
        kind.count += 1
        if place and len(kind.places) < TOLD:
            kind.places.append(place)
        if advice:
            self.advice[advice] = None
        if row is not None:
            self.bad.setdefault(row[0], set()).add(row[1])

    def missing(self, what: str, advice: str = "") -> None:
        """The fault that something is not there at all: `check` raises LookupError then."""
        self.lookup = True
        self.add(f"{self.where}: {what}" if self.where else what, advice=advice)

    def of(self, name: str, rows: int) -> None:
        """Says how many rows a file has, faulty ones included; who says it first is right."""
        self.rows.setdefault(name, rows)

    def check(self) -> None:
        """Raises ValueError (LookupError where something is missing) with all faults, if there are any that leaving
        rows out, as far as `skip` allows it, does not mend."""
        if self and not (self.skip and not self._whole() and not list(self._too_many())):
            raise self.error()

    def error(self) -> Exception:
        """The error with all that was found."""
        return (LookupError if self.lookup else ValueError)(self.message())

    def message(self) -> str:
        lines = [_line(what, kind, TOLD) for what, kind in self.kinds.items()]
        advice = [each for each in (". ".join(self.advice), *self._way_out()) if each]
        if len(lines) == 1:
            return ". ".join([*lines, *advice])
        return "\n".join([f"the data have faults of {len(lines)} kinds:", *(f"- {line}" for line in lines), *advice])

    def left_out(self) -> dict[str, int]:
        """{file: how many of its rows are left out}."""
        return {name: len(bad) for name, bad in self.bad.items()}

    def told(self) -> Iterator[str]:
        """Sentences on the rows that are left out: of each file how many of how many, why, and where the first are."""
        for name, bad in self.bad.items():
            own = {what: kind for what, kind in self.kinds.items() if kind.name == name}
            why = "; ".join(_line(what.removeprefix(name).lstrip(":, "), kind, FEW) for what, kind in own.items())
            yield f"{name}: {len(bad)} of {self.rows[name]} rows are left out for their faults: {why}"

    def _whole(self) -> bool:
        return any(kind.name is None for kind in self.kinds.values())

    def _too_many(self) -> Iterator[str]:
        for name, bad in self.bad.items():
            rows = self.rows.get(name, len(bad))
            if len(bad) == rows or len(bad) / rows > self.skip:
                yield f"{len(bad)} of {rows} rows of {name}"

    def _way_out(self) -> Iterator[str]:
        """What leaving rows out would mend, or why it did not."""
        if not self.skip:
            shown = ", ".join(  # rows that were given in Python have no file, and all of a file are not left out
                f"{len(bad)} of {self.rows.get(name, len(bad))} in {name}"
                for name, bad in self.bad.items()
                if name and len(bad) != self.rows.get(name)
            )
            if shown:
                yield f"Rows with faults of their own ({shown}) can be left out: {OPTION}"
        elif self.skip and self._whole():
            yield f"skip_faulty={self.skip:g} leaves single rows out, and not all of this is wrong with single rows"
        if self.skip and (many := ", ".join(self._too_many())):
            yield f"{many} have faults: more than skip_faulty={self.skip:g} lets go, or all there are. Mend the file"


def _line(what: str, kind: Kind, most: int) -> str:
    places = kind.places[:most]
    more = f" ({kind.count} in all, the first {len(places)} of them)" if kind.count > len(places) > 0 else ""
    return f"{what}{more}: {', '.join(places)}" if places else what
