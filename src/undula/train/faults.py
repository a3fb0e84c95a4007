"""What is wrong with data, collected, so that one message says all of it: with file, line and column."""

from __future__ import annotations

from collections.abc import Iterator

TOLD = 10  # places that a kind of fault is told with; the rest is counted


class Faults:
    """Faults by kind, each with the places where it stands."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[list[str], list[int]]] = {}
        self.advice: dict[str, None] = {}  # ordered, each once
        self.lookup = False

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def add(self, what: str, place: str = "", advice: str = "") -> None:
        """One fault: `what` is wrong, `place` where ("line 7", or "line 7 has 3")."""
        places, count = self.kinds.setdefault(what, ([], [0]))
        count[0] += 1
        if place and len(places) < TOLD:
            places.append(place)
        if advice:
            self.advice[advice] = None

    def missing(self, what: str, advice: str = "") -> None:
        """The fault that something is not there at all: `check` raises LookupError then."""
        self.lookup = True
        self.add(what, advice=advice)

    def check(self) -> None:
        """Raises ValueError (LookupError where something is missing) with all faults, if there are any."""
        if self:
            raise (LookupError if self.lookup else ValueError)(self.message())

    def message(self) -> str:
        lines, advice = list(self._lines()), ". ".join(self.advice)
        if len(lines) == 1:
            return f"{lines[0]}. {advice}" if advice else lines[0]
        told = "".join(f"\n- {line}" for line in lines)
        return f"the data have faults of {len(lines)} kinds:{told}" + (f"\n{advice}" if advice else "")

    def _lines(self) -> Iterator[str]:
        for what, (places, (count,)) in self.kinds.items():
            more = f" ({count} in all, the first {len(places)} of them)" if count > len(places) > 0 else ""
            yield f"{what}{more}: {', '.join(places)}" if places else what
