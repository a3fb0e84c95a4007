"""Reading tables of a study file into values: every fault is collected, with the line that it stands on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..core.given import hints, value
from ..io.toml import Faults, line_of, lines
from ..io.toml import Path as Place
from .sources import Sources

NUMBER = (int, float)
__all__ = ["NUMBER", "Faults", "Reader"]


class Reader:
    """Collects faults while it turns parts of the file into values."""

    def __init__(self, text: str):
        self.where, self.found = lines(text), list[tuple[int | None, str]]()
        self.places = set[Place]()  # that have a fault
        self.sources = Sources()  # what is opened to see that it is there

    def fault(self, place: Place, text: str) -> None:
        self.places.add(place)
        self.found.append((line_of(place, self.where), text))

    def attempt(self, place: Place, make: Callable[[], Any]) -> Any:
        """make(), or None with its error noted."""
        try:
            return make()
        except (LookupError, ValueError, TypeError, OSError, RuntimeError) as error:
            text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            self.fault(place, text)
            return None

    def table(self, place: Place, data: Any, kinds: Mapping[str, Any], needed: Iterable[str] = ()) -> dict[str, Any]:
        """The known entries of the right type."""
        if not isinstance(data, dict):
            self.fault(place, f"{place[-1] if place else 'a study'} is a table, found {data!r:.60}")
            return {}
        kept = {}
        for key, found in data.items():
            if key not in kinds:
                close = difflib.get_close_matches(key, kinds, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                hint = '; a study sweeps it: rates = [1e-3, 3e-3], or rates = "auto"' if key == "lr" else hint
                self.fault((*place, key), f"there is no {key!r} here; there are: {', '.join(kinds)}{hint}")
            elif (
                not isinstance(found, kinds[key]) or isinstance(found, bool) != (kinds[key] is bool) or _endless(found)
            ):
                self.fault((*place, key), f"{key} is {_called(kinds[key])}, found {found!r:.60}")
            else:
                kept[key] = found
        for key in needed:
            if key not in data:
                self.fault(place, f"{key} is missing")
        return kept

    def numbers(self, place: Place, values: Any, kind: Any) -> tuple[Any, ...]:
        """A list of distinct numbers, rates greater than 0."""
        wrong = [v for v in values if not isinstance(v, kind) or isinstance(v, bool)]
        wrong += [v for v in values if kind is NUMBER and v not in wrong and not 0 < v < math.inf]
        if wrong or not values or len(set(values)) < len(values):
            what = "rates greater than 0" if kind is NUMBER else "whole numbers"
            told = ' or "auto"' if kind is NUMBER else ""
            self.fault(place, f"{place[-1]} is a list of different {what}{told}, found {values!r:.60}")
            return ()
        return tuple(float(v) if kind is NUMBER else v for v in values)

    def within(self, place: Place, kind: type, t: dict[str, Any]) -> dict[str, Any]:
        """The entries that `kind` can have, as it declares its fields (see `undula.core.ranges`)."""
        kept = {}
        for key, found in t.items():
            try:
                kept[key] = value(found, hints(kind).get(key, Any), key)
            except ValueError as error:
                self.fault((*place, key), str(error))
        return kept


def _endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _called(kind: Any) -> str:
    names = {
        str: "a text",
        int: "a whole number",
        list: "a list",
        dict: "a table",
        float: "a number",
        bool: "true or false",
    }
    if kind is NUMBER:
        return "a number"
    return " or ".join(names[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
