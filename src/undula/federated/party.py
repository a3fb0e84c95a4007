"""A client as the file of a federation says it: its rows, and what it has otherwise than the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

from ..core.given import Checked
from ..core.method import Method
from ..core.ranges import Positive, Rank
from ..jobs.file import wrong_name
from ..train.recipe import Recipe, checked_path
from .part import check_cut
from .privacy import Privacy

MORE_RANKS = "client {}: r={}, and the federation's adapter has {}: leave it out, or take fewer"


@dataclass(frozen=True)
class Party(metaclass=Checked):
    """data: its rows, where they are its own (of a `split` it has its share).

    r: it trains so many ranks, the first; where: of the federation's layers those that it has; columns: what the
    columns of its rows are called, by the task's names for them; epsilon: a stricter budget than the federation's.
    """

    name: str
    data: str | None = None
    _: KW_ONLY
    r: Rank | None = None
    where: tuple[str, ...] | None = None
    columns: Mapping[str, str] | None = None
    epsilon: Positive | None = None

    @staticmethod
    def as_meant(name: str, value: Any) -> Any:
        """See `given.Checked`."""
        if name == "data" and value is not None:
            return str(checked_path(name, value))
        return (value,) if name == "where" and isinstance(value, str) else value

    def encode(self) -> dict[str, Any]:
        """As JSON values, without those that say nothing; a path that exists here is made absolute."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.data is not None and Path(self.data).exists():
            found["data"] = str(Path(self.data).resolve())
        if self.where is not None:
            found["where"] = list(self.where)
        return {name: value for name, value in found.items() if value is not None}

    @property
    def part(self) -> dict[str, Any]:
        """What of the adapter it has, which all parties have to agree on."""
        return {name: value for name, value in self.encode().items() if name in ("r", "where")}

    def faults(self, recipe: Recipe, privacy: Privacy | None) -> Iterator[str]:
        """What of it does not go with the rest of the file."""
        if why := wrong_name(self.name):
            yield why.replace("a job", "a client")
        methods = [] if recipe.begin_from else [recipe.method, *recipe.overrides.values()]
        yield from self._of_rank(methods) if self.r is not None else ()
        if self.where == ():
            yield f"client {self.name}: where names no layer: name some, or leave it out"
        roles = [role for role in recipe.task.roles if role in {f.name for f in fields(recipe.task)}]  # type: ignore[arg-type]
        if odd := [role for role in self.columns or () if role not in roles]:
            yield f"client {self.name}: columns are those of {', '.join(roles) or 'no role'}; found {', '.join(odd)}"
        if self.epsilon is not None:
            yield from self._of_epsilon(privacy)

    def _of_rank(self, methods: Sequence[Method | None]) -> Iterator[str]:
        known = []
        for method in methods:
            if method is None:
                yield f"client {self.name}: r={self.r}, and without a method there are no ranks"
                continue
            try:
                check_cut(method, "every layer")
                known.append(method.undropped().r)  # type: ignore[attr-defined]
            except TypeError as error:
                yield f"client {self.name}: {error}"
        if known and self.r > max(known):
            yield MORE_RANKS.format(self.name, self.r, max(known))

    def _of_epsilon(self, privacy: Privacy | None) -> Iterator[str]:
        target = getattr(privacy, "epsilon", None)
        if privacy is None:
            yield f"client {self.name}: epsilon={self.epsilon:g}, and this file has no privacy that could keep to it"
        elif target is not None and self.epsilon > target:  # type: ignore[operator]
            yield f"client {self.name}: epsilon={self.epsilon:g} is looser than all have with {target:g}: leave it out"
