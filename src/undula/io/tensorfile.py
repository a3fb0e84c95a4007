"""The safetensors format, from an open file and to an open file: 8 bytes with the length of a JSON header, the header,
and the tensors' bytes without gaps.  Nothing that a header claims is believed before it agrees with the file's size.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .strict import parsed

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
# Bits of a number in every type of the format, those included that no adapter of undula's has.
BITS = {name: dtype.itemsize * 8 for name, dtype in TYPES.items()}
BITS |= {"C64": 64, "U64": 64, "U32": 32, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
METADATA = re.compile(r'\s*\{\s*"__metadata__"\s*:\s*')
LARGEST_HEADER = 100 << 20
DIMENSIONS = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # in the file
    size: int  # in bytes


@dataclass(frozen=True, slots=True)
class Told:
    """One tensor of a file, of whatever type."""

    kind: str  # the format's name of its type
    shape: tuple[int, ...]
    begin: int
    size: int


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors to an open file.  Raises ValueError for a type that no reader would know, and OSError."""
    for key in write_header(file, tensors, metadata):
        file.write(memory(tensors[key].detach().cpu().contiguous()))


def check_types(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a type that no reader would know."""
    odd = [f"{k} is {t.dtype}" for k, t in tensors.items() if t.dtype not in NAMES]
    if odd:
        raise ValueError(f"{odd[0]}; the types that a file can hold are {', '.join(TYPES)}")


def write_header(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[str]:
    """Writes what stands before the bytes of these tensors, of which only shapes and types count; returns the order of
    the bytes.  Raises ValueError for a type that no reader would know."""
    check_types(tensors)
    ordered = sorted(tensors, key=lambda k: (-tensors[k].element_size(), k))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for key in ordered:
        t = tensors[key]
        end = at + t.numel() * t.element_size()
        header[key] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    return ordered


def size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """How many bytes `write` writes; only shapes and types count."""
    head = io.BytesIO()
    write_header(head, tensors, metadata)
    return len(head.getvalue()) + sum(t.numel() * t.element_size() for t in tensors.values())


def memory(t: Tensor) -> bytes | memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    size = t.numel() * t.element_size()
    if not size:
        return b""
    held = (ctypes.c_char * size).from_address(t.data_ptr())
    held.tensor = t  # type: ignore[attr-defined]  # lives as long as the view does
    return memoryview(held).cast("B")


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of tensors on the CPU, in the order of their names: a number that is damaged looks like any
    other."""
    found = 0
    for key in sorted(tensors):
        found = zlib.crc32(memory(tensors[key].contiguous()), found)
    return found


def entries(file: BinaryIO, path: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors, metadata) that the header of an open file tells.  Raises ValueError where it and the file's size do
    not agree: nothing has been allocated for a claim."""
    return _entries(*_header(file, path), path)


def told(file: BinaryIO, path: str) -> tuple[dict[str, Told], dict[str, str]]:
    """`entries`, of types too that undula does not read."""
    return _told(*_header(file, path), path)


class Layouts:
    """Headers that were seen: of files that differ in their metadata and numbers alone the first is looked at."""

    def __init__(self) -> None:
        self.seen: dict[bytes, dict[str, Entry]] = {}
        self.digests: dict[int, bytes] = {}  # by the identity of what is in `seen`

    def entries(self, file: BinaryIO, path: str) -> tuple[dict[str, Entry], dict[str, str]]:
        """`entries`, for names, shapes and types alone: equal layouts are one object, which says where the numbers are
        in the first of its files."""
        text, size = _header(file, path)
        head = METADATA.match(text)
        if head is None:
            return _entries(text, size, path)
        try:
            metadata, end = json.JSONDecoder().raw_decode(text, head.end())
        except (ValueError, RecursionError):
            return _entries(text, size, path)  # which says what is wrong
        digest = hashlib.sha256(f"{size - len(text.encode())} {text[end:]}".encode()).digest()
        if digest not in self.seen:
            found, metadata = _entries(text, size, path)
            self.seen[digest], self.digests[id(found)] = found, digest
        _check_metadata(metadata, path)
        return self.seen[digest], metadata

    def digest(self, found: Mapping[str, Entry]) -> bytes:
        """What tells a layout that `entries` gave from others."""
        if id(found) in self.digests:
            return self.digests[id(found)]
        return hashlib.sha256(repr(sorted(found.items())).encode()).digest()


def _header(file: BinaryIO, path: str) -> tuple[str, int]:
    """(the header's text, the size of the file)."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
    if not 0 < length <= min(size - 8, LARGEST_HEADER):
        raise ValueError(f"{path} is no safetensors file: its header claims {length} of {size} bytes")
    try:
        return file.read(length).decode("utf-8"), size
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the header of this safetensors file is not JSON: {error}") from None


def _entries(text: str, size: int, path: str) -> tuple[dict[str, Entry], dict[str, str]]:
    found, metadata = _told(text, size, path)
    for key, one in found.items():
        if one.kind not in TYPES:
            raise ValueError(f"{path}: {key!r:.100} is of the type {one.kind!r}; undula reads {', '.join(TYPES)}")
    return {key: Entry(TYPES[one.kind], one.shape, one.begin, one.size) for key, one in found.items()}, metadata


def _told(text: str, size: int, path: str) -> tuple[dict[str, Told], dict[str, str]]:
    header = parsed(text, f"{path}: the header of this safetensors file")
    metadata = header.pop("__metadata__", {})
    _check_metadata(metadata, path)
    begin = 8 + len(text.encode())
    found = {key: _entry(key, entry, begin, path) for key, entry in header.items()}
    at = begin
    for key, entry in sorted(found.items(), key=lambda item: (item[1].begin, item[1].size)):
        if entry.begin != at:
            raise ValueError(f"{path} is cut or damaged: {key!r:.100} begins at byte {entry.begin}, not at {at}")
        at += entry.size
    if at != size:
        raise ValueError(f"{path} is cut or damaged: its header claims {at} bytes, it holds {size}")
    return found, metadata


def _check_metadata(metadata: Any, path: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path} is no safetensors file: its metadata are not texts")


def _entry(key: str, entry: Any, begin: int, path: str) -> Told:
    match entry:
        case {"dtype": str(name), "shape": list(shape), "data_offsets": [int(start), int(end)]} if len(entry) == 3:
            pass
        case _:
            raise ValueError(f"{path} is no safetensors file: {key!r:.100} is described by {entry!r:.100}")
    if name not in BITS:
        raise ValueError(f"{path}: {key!r:.100} is of the type {name!r:.20}; undula reads {', '.join(TYPES)}")
    if len(shape) > DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"{path}: {key!r:.100} has the shape {shape!r:.80}; at most {DIMENSIONS} sizes are possible")
    size = -(-math.prod(shape) * BITS[name] // 8)
    if start < 0 or size != end - start:
        raise ValueError(
            f"{path} is cut or damaged: {key!r:.100} has {end - start} bytes, {name} {shape!r:.80} takes {size}"
        )
    return Told(name, tuple(shape), begin + start, size)


def read(file: BinaryIO, found: Mapping[str, Entry], path: str) -> dict[str, Tensor]:
    """The tensors of an open file, copied.  Raises ValueError for a file that has become shorter meanwhile."""
    tensors = {}
    for key, entry in found.items():
        raw = bytearray(entry.size)
        file.seek(entry.begin)
        if file.readinto(raw) != entry.size:  # type: ignore[attr-defined]
            raise ValueError(f"{path} has become shorter while it was read")
        tensors[key] = _tensor(raw, entry)
    return tensors


def _tensor(raw: bytearray, entry: Entry) -> Tensor:
    if not entry.size:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.dtype == torch.bool:  # any byte but 0 and 1 would be no bool
        return torch.frombuffer(raw, dtype=torch.uint8).view(entry.shape).ne(0)
    return torch.frombuffer(raw, dtype=entry.dtype).view(entry.shape).clone()  # aligned as torch's own memory is
