"""Which adapters lie in a folder, and whether one is still what it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..io import diffusers, files

EXPERT = "expert.json"  # what a library of experts says of each
README, RUN = "README.md", "run.json"
READ = (files.CONFIG, files.TENSORS, diffusers.WEIGHTS, README, RUN, EXPERT)  # what an entry is made of
SUFFIX = ".safetensors"
OWN = ("expert.safetensors", "generator.safetensors")  # of a library of experts, beside its adapters
LIBRARY, START = "library.json", "start"  # its own, and the adapter that all its experts began from: untrained
KEYS = (b'"undula_index"', b'"undula_encoder"')  # what the header of an index or an encoder of undula's begins with
Mark = list[list[int] | None]  # size, time of change (ns) and number of each of READ, None where it is not there


@dataclass(frozen=True)
class Place:
    """An adapter's directory, or a lone file of tensors; `name` is its path below the folder."""

    name: str
    path: Path
    mark: Mark


def places(folder: Path) -> list[Place]:
    """All adapters below a folder, in the order of their names.  What is in an adapter's directory (its checkpoints)
    is not looked at, nor what is hidden.  Raises NotADirectoryError."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: it should hold directories of adapters")
    return sorted(_below(folder, "", set()), key=lambda place: place.name)


def _below(folder: Path, name: str, seen: set[str]) -> Iterator[Place]:
    real = os.path.realpath(folder)
    if real in seen:  # a link in a circle, or a second way to the same
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            there = {e.name: e for e in entries if not e.name.startswith(".")}
    except OSError:  # gone since, or not ours to read
        return
    if there.keys() & {files.CONFIG, files.TENSORS, diffusers.WEIGHTS}:
        yield Place(name or ".", folder, [_stat(there.get(n)) for n in READ])
        return
    model = "config.json" in there  # a whole model's folder: its files are no adapters
    if LIBRARY in there:
        there.pop(START, None)
    for own, entry in sorted(there.items()):  # of two ways to one folder the first by name
        below = f"{name}/{own}" if name else own
        if _is_folder(entry):
            yield from _below(folder / own, below, seen)
        elif own.endswith(SUFFIX) and own not in OWN and not model and _is_file(entry) and not written(folder / own):
            yield Place(below, folder / own, [_stat(entry)])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Neither a pipe, which would be waited for, nor a link to nothing."""
    try:
        return entry.is_file()
    except OSError:
        return False


def written(path: Path) -> bool:
    """Whether a file is an index or an encoder that undula wrote, whole or cut."""
    try:
        with open(path, "rb") as file:
            begin = file.read(256)
        return any(key in begin for key in KEYS)
    except OSError:
        return False


def _stat(entry: os.DirEntry[str] | None) -> list[int] | None:
    try:
        found = None if entry is None else entry.stat()
    except OSError:  # a link to nothing
        found = None
    return None if found is None else [found.st_size, found.st_mtime_ns, found.st_ino]
