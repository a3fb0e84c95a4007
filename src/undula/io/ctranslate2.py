"""Read CTranslate2's model file (model.bin), with numpy and torch alone.

A file is a version, the name of what the model is, that one's revision, named tensors, and names that stand for other
tensors; all in little endian, texts and sizes behind their lengths.

    file = read_ctranslate2("model.bin")
    file.spec                                        # "WhisperSpec"
    file.tensor("decoder/embeddings/weight")         # float32

The file is not trusted: every length, count and shape in it is compared with the size of the file before anything is
allocated, and at most MAX_THINGS tensors or names are read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

MAX_THINGS = 65_536  # tensors or names of them: real files have hundreds
MAX_DIMS = 8
VERSIONS = range(4, 8)  # versions whose layout this is; the newest today is 6
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # of int8 and smaller no scales are applied here


class CTranslate2Error(ValueError):
    """The file is not one of CTranslate2's, is damaged, or uses a feature that this reader does not know."""


@dataclass(frozen=True)
class CTranslate2:
    """A model file: what it is, and where its tensors lie."""

    path: Path
    spec: str
    tensors: Mapping[str, tuple[tuple[int, ...], str, int]]  # name: (shape, type, offset)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, floating-point ones in float32.  Raises CTranslate2Error where there is none."""
        if name not in self.tensors:
            known = ", ".join(list(self.tensors)[:8])
            raise CTranslate2Error(f"{self.path}: no tensor {name!r} among the {len(self.tensors)} there: {known}, ...")
        shape, kind, offset = self.tensors[name]
        count = math.prod(shape)
        raw = np.fromfile(self.path, kind, count=count, offset=offset)
        if raw.size != count:
            raise CTranslate2Error(f"{self.path}: the file has become shorter since it was opened; read it again")
        if raw.dtype.kind == "f":
            raw = raw.astype(np.float32)
        return torch.from_numpy(raw.reshape(shape))


def read_ctranslate2(path: str | Path) -> CTranslate2:
    """Opens `path` and reads its list of tensors.  Raises CTranslate2Error for a file that is none of CTranslate2's, is
    cut short or describes sizes that do not fit into it; OSError if it cannot be opened."""
    path = Path(path)
    with path.open("rb") as file:
        cursor = _Cursor(path, path.stat().st_size, file)
        version = cursor.number("I")
        if version not in VERSIONS:
            raise CTranslate2Error(f"{path}: version {version} is no layout of CTranslate2 that is known")
        spec = cursor.text()
        cursor.number("I")  # the revision of the spec
        tensors = dict(_tensor(cursor) for _ in range(cursor.count()))
        for _ in range(cursor.count()):
            other, name = cursor.text(), cursor.text()
            if name not in tensors:
                raise CTranslate2Error(f"{path}: {other!r} stands for {name!r}, which is not there")
            tensors[other] = tensors[name]
        if cursor.at != cursor.size:
            raise CTranslate2Error(f"{path}: {cursor.size - cursor.at} bytes follow the end")
    return CTranslate2(path, spec, tensors)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], str, int]]:
    name, dims = cursor.text(), cursor.number("B")
    if dims > MAX_DIMS:
        raise CTranslate2Error(f"{cursor.path}: {name!r} has {dims} dimensions; at most {MAX_DIMS} are read")
    shape = tuple(cursor.number("I") for _ in range(dims))
    kind, size = cursor.number("B"), cursor.number("I")
    if kind not in TYPES:
        raise CTranslate2Error(f"{cursor.path}: {name!r} is of the type {kind}; known are {', '.join(map(str, TYPES))}")
    if math.prod(shape) * np.dtype(TYPES[kind]).itemsize != size:
        raise CTranslate2Error(f"{cursor.path}: {name!r} has the shape {shape}, and {size} bytes, which is not as many")
    offset = cursor.at
    cursor.skip(size)
    return name, (shape, TYPES[kind], offset)


class _Cursor:
    """A position in the file that refuses to step beyond the end."""

    def __init__(self, path: Path, size: int, file: object):
        self.path, self.size, self.file, self.at = path, size, file, 0

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise CTranslate2Error(f"{self.path}: cut short: {count} bytes should follow at {self.at} of {self.size}")
        self.at += count
        self.file.seek(self.at)  # type: ignore[attr-defined]

    def read(self, count: int) -> bytes:
        begin = self.at
        self.skip(count)
        self.file.seek(begin)  # type: ignore[attr-defined]
        found: bytes = self.file.read(count)  # type: ignore[attr-defined]
        return found

    def number(self, kind: str) -> int:
        (found,) = struct.unpack("<" + kind, self.read(struct.calcsize("<" + kind)))
        return int(found)

    def count(self) -> int:
        found = self.number("I")
        if found > MAX_THINGS:
            raise CTranslate2Error(f"{self.path}: {found} tensors or names; at most {MAX_THINGS} are read")
        return found

    def text(self) -> str:
        raw = self.read(self.number("H")).rstrip(b"\0")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise CTranslate2Error(f"{self.path}: a name at {self.at} is no text: {raw[:20]!r}") from None
