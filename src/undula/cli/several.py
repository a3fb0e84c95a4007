"""Adapters as a command line names them: one, several side by side, or a weighted sum (A:0.5 B:0.5)."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.extras import needs
from ..io import files

if TYPE_CHECKING:
    from ..train.restored import Restored
    from ..train.run import Run

WEIGHT = re.compile(r":[-+.\d][^:/]*$")  # as in adapters/name:0.5


@dataclass(frozen=True)
class Several:
    """Directories of adapters; weights are given for none of them, or count as 1 where they are not."""

    paths: tuple[Path, ...]
    weights: tuple[float, ...] | None = None

    @staticmethod
    def of(path: Path, given: Sequence[str]) -> tuple[Several, list[str]]:
        """(the adapters at the head of a command's arguments, the other arguments).  Raises FileNotFoundError where the
        first of those names a place beside others at which there is nothing: no text is meant."""
        found, rest = [named_directory(str(path)) or (path, None)], list(given)
        while rest and (more := named_directory(rest[0])) is not None:
            found.append(more)
            rest.pop(0)
        if rest:
            _check_no_place(rest[0])
        weights = [w for _, w in found]
        summed = any(w is not None for w in weights)
        return Several(
            tuple(p for p, _ in found), tuple(1.0 if w is None else w for w in weights) if summed else None
        ), rest

    @property
    def beside(self) -> bool:
        """Whether several answer, each for itself."""
        return len(self.paths) > 1 and self.weights is None

    @property
    def names(self) -> list[str]:
        """What each is called: its directory, by its last name where these differ."""
        last = [path.resolve().name for path in self.paths]
        return last if len(set(last)) == len(last) else [str(path) for path in self.paths]

    @needs("train")
    def known(self, model: str | None) -> list[tuple[Run, tuple[str, ...]]]:
        """What those who answer are for, before the base is opened.  Raises ValueError for several bases."""
        from ..train.base import quiet
        from ..train.load import known
        from ..train.several import check_one_base

        with quiet():
            found = [known(path if path.exists() else str(path), model) for path in self.paths]
        check_one_base([run for run, _ in found])
        return found if self.beside else found[:1]

    @needs("train")
    def opened(self, model: str | None) -> list[Restored]:
        """Those who answer; see `undula.load`; without transformers' bars and notes."""
        from ..train import load
        from ..train.base import quiet
        from ..train.several import summed

        with quiet():
            found = load([path if path.exists() else str(path) for path in self.paths], model)
            return found if self.weights is None else [summed(found, self.weights)]

    def merged(self, columns: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
        """The answers to each row in one, under NAME.part."""
        for answers in zip(*columns, strict=True):
            yield {f"{n}.{k}": v for n, answer in zip(self.names, answers, strict=True) for k, v in answer.items()}


def _check_no_place(said: str) -> None:
    """Raises FileNotFoundError for a word that goes on from a directory and ends at nothing."""
    if len(said) > 4000 or "/" not in said or len(said.split()) != 1 or "\0" in said:
        return  # a text
    path = Path(said.rpartition(":")[0] or said) if WEIGHT.search(said) else Path(said)
    if path.exists() or not path.parent.is_dir() or path.parent == Path(path.anchor):
        return
    close = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), 1)
    hint = f" (did you mean {path.parent / close[0]}?)" if close else ""
    raise FileNotFoundError(
        f"there is no {path}{hint}: adapters' directories come first, then a file or texts. If {said!r} is a text, "
        "send it into the input"
    )


def named_directory(said: str) -> tuple[Path, float | None] | None:
    """(directory of an adapter, weight) of DIR or DIR:0.5; None for what is neither.  Raises ValueError for a weight
    that is no number."""
    if len(said) > 4000 or "\n" in said or "\0" in said:
        return None  # a text
    if (Path(said) / files.CONFIG).is_file():
        return Path(said), None
    place, colon, weight = said.rpartition(":")
    if not colon or not (Path(place) / files.CONFIG).is_file():
        return None
    try:
        return Path(place), float(weight)
    except ValueError:
        raise ValueError(f"{said}: what stands behind the colon is a weight, such as {place}:0.5") from None
