"""A library of experts: adapters of one recipe and one start, each with a description and the moments of its course.

LIB/library.json               what all share: base, embedding, the start's digest; the names of the experts
LIB/start/                     the adapter that all of them began from, an ordinary adapter directory
LIB/experts/NAME/              an ordinary run's directory: the expert as `undula predict` opens it
LIB/experts/NAME/expert.json, expert.safetensors
                               description and figures; mean, variance (D,), checkpoints (S, D), embedding (E,)
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..io import files
from ..retrieve.describing import readable
from ..retrieve.texts import embedded as texts_as_vectors
from ..train.run import write_json
from .pack import Layout, digest

VERSION = 1
LIBRARY, START, EXPERTS, EXPERT = "library.json", "start", "experts", "expert"


@dataclass(frozen=True, eq=False)
class Expert:
    """One adapter of a library.  mean, variance (D,): of its last checkpoints (S, D); embedding (E,), of length 1: of
    its description.  figures: what its training came to, {metric, before, after, ...}."""

    name: str
    description: str
    embedding: Tensor
    mean: Tensor
    variance: Tensor
    checkpoints: Tensor
    figures: Mapping[str, Any]

    def save(self, folder: Path, start: str) -> None:
        """Writes the two files of `folder` that make a run's directory an expert."""
        values = {"version": VERSION, "name": self.name, "description": self.description, "start": start}
        tensors = {n: getattr(self, n).contiguous() for n in ("mean", "variance", "checkpoints", "embedding")}
        files.write_state(folder, EXPERT, {**values, **self.figures}, tensors)

    @staticmethod
    def load(folder: Path) -> tuple[Expert, str]:
        """(the expert in a folder, its start's digest).  Raises FileNotFoundError or ValueError."""
        if not (folder / f"{EXPERT}.json").is_file():
            raise FileNotFoundError(
                f"{folder} is no expert of a library: {EXPERT}.json is missing. `undula library` builds one"
            )
        values, tensors = files.read_state(folder, EXPERT)
        files.check_finite(tensors, str(folder / f"{EXPERT}.safetensors"))
        with files.door(str(folder / EXPERT)):
            if values.get("version") != VERSION:
                raise ValueError(f"is of version {values.get('version')!r}, and this undula reads {VERSION}")
            kept = ("version", "name", "description", "start")
            figures = {k: v for k, v in values.items() if k not in kept}
            return Expert(values["name"], values["description"], **tensors, figures=figures), str(values["start"])


@dataclass(frozen=True, eq=False)
class Library:
    """Experts of one base, one recipe and one start.

    Averages of the factors of several adapters mean something only where all began at one point: B A is as well
    (B R)(R^-1 A), and training from other starts ends in other gauges.  So a library takes no others.
    """

    path: Path
    model: str
    layout: Layout
    start: Tensor
    experts: tuple[Expert, ...]

    @staticmethod
    def load(path: str | Path, without: Container[str] = ()) -> Library:
        """The library in a folder, but for some experts.  Raises FileNotFoundError; ValueError that names the expert
        whose start, layers, method or size is another."""
        path = Path(path)
        if not (path / LIBRARY).is_file():
            there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "no such folder"
            raise FileNotFoundError(f"{path} is no library: {LIBRARY} is missing; found {there}")
        said = files.parsed((path / LIBRARY).read_bytes(), str(path / LIBRARY))
        if said.get("version") != VERSION or not isinstance(said.get("experts"), dict) or "model" not in said:
            raise ValueError(f"{path / LIBRARY} is no library of version {VERSION}")
        adapter = Adapter.load(path / START)
        layout = Layout.of(adapter, str(path / START))
        start = layout.pack(adapter)
        experts = []
        for name in said["experts"]:
            if name in without:
                continue
            expert, began = Expert.load(path / EXPERTS / name)
            if expert.name != name:
                raise ValueError(f"{path / EXPERTS / name} holds the expert {expert.name}: was the folder renamed?")
            check_start(name, began, digest(start))
            check_size(expert, layout.size)
            experts.append(expert)
        if not experts:
            raise ValueError(f"{path} has no expert" + (" that is not left out" if said["experts"] else ""))
        return Library(path, str(said["model"]), layout, start, tuple(experts))

    def save(self) -> None:
        """Writes LIB/library.json; the experts lie there."""
        experts = {e.name: {"description": e.description, **e.figures} for e in self.experts}
        write_json(self.path / LIBRARY, {
            "version": VERSION, "kind": "undula-library", "model": self.model, "start": digest(self.start),
            "numbers": self.layout.size, "experts": experts,
            "embedding": {"by": self.model, "pooling": "mean", "size": len(self.experts[0].embedding)},
        })  # fmt: skip

    def without(self, names: Container[str]) -> Library:
        """The same without some experts."""
        return replace(self, experts=tuple(e for e in self.experts if e.name not in names))

    @property
    def names(self) -> list[str]:
        return [e.name for e in self.experts]

    @cached_property
    def embeddings(self) -> Tensor:
        """(N, E), of length 1 each."""
        return torch.stack([e.embedding for e in self.experts])

    @cached_property
    def means(self) -> Tensor:
        """(N, D)."""
        return torch.stack([e.mean for e in self.experts])

    @cached_property
    def variances(self) -> Tensor:
        """(N, D)."""
        return torch.stack([e.variance for e in self.experts])

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), E): descriptions as the library's own are embedded."""
        return embedded(self.model, texts)


def check_start(name: str, found: str, wanted: str) -> None:
    """Raises ValueError for an expert that began elsewhere."""
    if found != wanted:
        raise ValueError(
            f"{name} began at another start than the library's ({found[:12]}, not {wanted[:12]}): factors of other "
            "starts have no mean. Train it with the seed of the others, or from LIB/start (--from)"
        )


def check_size(expert: Expert, size: int) -> None:
    """Raises ValueError for moments of another number of parameters."""
    for what in ("mean", "variance", "checkpoints"):
        found = getattr(expert, what).shape
        if found[-1:] != (size,):
            raise ValueError(f"{expert.name}: its {what} has the shape {tuple(found)}, and the start {size} numbers")


def embedded(model: str, texts: Sequence[str]) -> Tensor:
    """(len(texts), E), each of length 1, of descriptions.  Raises ValueError for an empty one."""
    if blank := [i for i, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"description {blank[0] + 1} of {len(texts)} is empty: say what the task is")
    return texts_as_vectors([readable(text) for text in texts], model)
