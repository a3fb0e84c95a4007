"""An index over a folder of adapters: their texts and weights as vectors, read again only where files changed.

One file, written whole or not at all: whoever reads it, however many processes write it and whenever one is killed, it
holds the state of the folder at some moment.  It is derived: deleted, damaged or of another version it is made anew.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io import tensorfile
from ..io.draft import Draft, filled
from ..io.strict import door, parsed
from . import entry as entries
from .entry import Entry
from .places import Place, places, written
from .sketching import SEED, WIDTH
from .texts import ENCODER, embedded

FILE = ".undula-index.safetensors"  # in the folder
VERSION = 2
TOGETHER = 256  # adapters that are read before their texts are embedded
SAVED = 4096  # of those that are new: after so many the file is written, so that a kill takes no more
YOUNG = 2_000_000_000  # ns: files may change within the grain of a file system's clock and keep their time
KEY = "undula_index"


@dataclass(frozen=True)
class Index:
    """`texts` (N, d) of length 1 and `weights` (N, WIDTH), float32, of `entries`; rows of zeros where there is none."""

    folder: Path
    entries: tuple[Entry, ...]
    texts: Tensor
    weights: Tensor
    model: str = ENCODER  # that embedded the texts
    read: int = 0  # adapters that the last update read; the others were as they had been

    @property
    def usable(self) -> list[int]:
        """The numbers of those that can be found."""
        return [i for i, e in enumerate(self.entries) if not e.wrong]

    @property
    def skipped(self) -> dict[str, str]:
        """{name: why} of those that could not be read."""
        return {e.name: e.wrong for e in self.entries if e.wrong}

    def rows(self, which: Sequence[int]) -> tuple[list[Entry], Tensor, Tensor]:
        """(entries, texts, weights) of some."""
        at = torch.tensor(list(which), dtype=torch.long)
        return [self.entries[i] for i in which], self.texts[at], self.weights[at]


Seen = Callable[[int, int], object]


def update(
    folder: str | Path, file: str | Path | None = None, model: str = ENCODER, seen: Seen = lambda done, of: None
) -> Index:
    """The index of a folder as it is now, kept in `file` (default: FOLDER/.undula-index.safetensors).

    Only what is new or has changed is read, one adapter at a time and of each one layer at a time; what is gone is
    forgotten.  `seen(done, of)` tells of those that are read.  Memory: 8 KB an adapter, its text, and one layer.
    Raises NotADirectoryError, and before anything is read OSError where `file` cannot be written and FileExistsError
    where it is something else than an index.
    """
    folder = Path(folder)
    path = folder / FILE if file is None else Path(file)
    begun = time.time_ns()
    there = places(folder)
    kept = _kept(path, model)
    fresh = [p for p in there if p.name not in kept or kept[p.name][0].mark != p.mark]
    if fresh:
        _check_writable(path)
    for begin in range(0, len(fresh), TOGETHER):
        some = fresh[begin : begin + TOGETHER]
        kept |= _read(some, begun, model)
        seen(begin + len(some), len(fresh))
        if (begin + len(some)) % SAVED == 0 and begin + len(some) < len(fresh):
            _write(_together(folder, [p for p in there if p.name in kept], kept, model, 0), path)
    made = _together(folder, there, kept, model, len(fresh))
    if fresh or len(kept) > len(there) or not path.is_file():
        _write(made, path)
    return made


Row = tuple[Entry, Tensor | None, Tensor | None]  # and its text, its weights


def _kept(path: Path, model: str) -> dict[str, Row]:
    """What an earlier update left; nothing where there is no file, or one that cannot be used."""
    if not path.is_file():
        return {}
    if path.name != FILE and not written(path):
        raise FileExistsError(f"{path} is no index, and is not written over: name another file for the index")
    try:
        found = load(path)
    except (ValueError, OSError) as error:
        warnings.warn(f"the index {path} cannot be used and is made anew: {error}", stacklevel=3)
        return {}
    if found.model != model:
        return {}
    has_text, has_weights = found.texts.any(1).tolist(), found.weights.any(1).tolist()
    return {
        e.name: (e, found.texts[i] if has_text[i] else None, found.weights[i] if has_weights[i] else None)
        for i, e in enumerate(found.entries)
    }


def _check_writable(path: Path) -> None:
    """Raises OSError, before thousands of adapters are read in vain."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: the index is a file (--index FILE)")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Draft(path):
            pass
    except OSError as error:
        told = f"the index cannot be written there ({error.strerror}): name a file elsewhere (--index FILE)"
        raise OSError(error.errno, told, str(path)) from error


def _read(some: Sequence[Place], begun: int, model: str) -> dict[str, Row]:
    found = [entries.read(place) for place in some]
    worded = [e for e, _ in found if not e.wrong]
    vectors = dict(zip((e.name for e in worded), embedded([e.text for e in worded], model), strict=True))
    made: dict[str, Row] = {}
    for e, z in found:
        young = any(m is not None and m[1] > begun - YOUNG for m in e.mark or ())
        made[e.name] = (replace(e, mark=None) if young else e), vectors.get(e.name), z
    return made


def _together(folder: Path, there: Sequence[Place], kept: Mapping[str, Row], model: str, read: int) -> Index:
    rows = [kept[p.name] for p in there]
    width = next((len(t) for _, t, _ in rows if t is not None), 0)
    texts, weights = torch.zeros(len(rows), width), torch.zeros(len(rows), WIDTH)
    for i, (_, t, z) in enumerate(rows):
        if t is not None:
            texts[i] = t
        if z is not None:
            weights[i] = z
    return Index(folder, tuple(e for e, _, _ in rows), texts, weights, model, read)


def _write(index: Index, path: Path) -> None:
    text = json.dumps([e.encode() for e in index.entries]).encode()  # ASCII: names may be of any bytes
    raw = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tensors = {"entries": raw, "texts": index.texts, "weights": index.weights}
    told = {"version": VERSION, "seed": SEED, "model": index.model, "sum": tensorfile.checksum(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    filled(path, lambda file: tensorfile.write(file, tensors, {KEY: json.dumps(told)}))


def load(path: str | Path, folder: str | Path | None = None) -> Index:
    """What `update` wrote.  folder: whose index it is, where it lies elsewhere than in that.  Raises FileNotFoundError,
    ValueError for another version and for what is damaged."""
    path = Path(path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(door(str(path)))
        file = stack.enter_context(open(path, "rb"))
        found, metadata = tensorfile.entries(file, str(path))
        told: dict[str, Any] = parsed(metadata.get(KEY, "{}"), str(path))
        if {k: told.get(k) for k in ("version", "seed")} != {"version": VERSION, "seed": SEED}:
            raise ValueError(f"{path} is no index of this version of undula ({VERSION}): it says {told!r:.100}")
        if found.keys() != {"entries", "texts", "weights"}:
            raise ValueError(f"{path} is no index: it holds {', '.join(found)}")
        held = tensorfile.read(file, found, str(path))
    if told.get("sum") != tensorfile.checksum(held):
        raise ValueError(f"{path} is damaged: its numbers are not those that were written")
    with door(str(path)):
        listed = [Entry.decode(e) for e in json.loads(bytes(held["entries"].numpy()))]
    texts, weights = held["texts"], held["weights"]
    if texts.ndim != 2 or weights.shape != (len(listed), WIDTH) or len(texts) != len(listed):
        raise ValueError(f"{path} is damaged: {len(listed)} entries, {tuple(texts.shape)} and {tuple(weights.shape)}")
    return Index(
        path.parent if folder is None else Path(folder),
        tuple(listed),
        texts.float(),
        weights.float(),
        str(told.get("model")),
    )
