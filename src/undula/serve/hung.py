"""A few adapters of directories, all of them on the model: what a command line opens, without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.adapter import Adapter
from ..host.host import attach
from .heads import Body, Worn
from .request import Part, Refused, Unknown


@dataclass(frozen=True, eq=False)
class Hanging:
    """One of them."""

    id: str
    worn: Worn


class Hung:
    """{name: directory} of adapters, each attached to the body at once."""

    def __init__(self, body: Body, places: Mapping[str, Path]):
        self.every: dict[str, Hanging] = {}
        for name, path in places.items():
            part, worn = body.wear(path, Adapter.load(path))
            attach(body.model, part, name=name, frozen=True)
            self.every[name] = Hanging(name, worn)

    def version(self, parts: Sequence[Part]) -> Hanging | None:
        """What these parts mean: one adapter as it is, or none."""
        if not parts:
            return None
        if len(parts) > 1 or parts[0].scale != 1:
            raise Refused("here one adapter at a time answers, as it is: combine them before (undula combine)")
        if parts[0].name not in self.every:
            raise Unknown(f"no adapter is called {parts[0].name!r}; there are: {', '.join(self.every)}")
        return self.every[parts[0].name]

    def kept(self, version: Hanging) -> Worn:
        """What it is over the body."""
        return version.worn

    def acquire(self, version: Hanging) -> str:
        """The name under which it is attached."""
        return version.id

    def release(self, version: Hanging) -> None:
        """Nothing: it stays."""
