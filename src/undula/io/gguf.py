"""Read GGUF, the model file of llama.cpp, with numpy and torch alone.

A GGUF file is a header (magic, version, counts), a list of typed key/value pairs, a list of tensor descriptions and
the tensor data. Quantised tensors are rows of fixed-size blocks: a few scales, then packed integers.

    file = read_gguf("model.gguf")
    file.metadata["general.architecture"]       # "llama"
    file.tensor("blk.0.attn_q.weight")          # float32, in PyTorch's order of dimensions

The file is not trusted. Every length, count and offset in it is compared with the size of the file before anything is
allocated. Arrays of the metadata stay as the bytes that they are in the file, and things that take a Python object each
(pairs, tensors, arrays in arrays) are at most MAX_THINGS of a kind. So the metadata take at most about twice the
file's size (a single text up to six times, while it is decoded) and a fixed 100 MB; a tensor takes its size in float32
when it is asked for.
"""

import math
import mmap
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import ggml

MAX_DIMS = 4  # what ggml itself supports
MAX_NESTING = 4  # arrays of arrays of ...: deeper than anything real, far from Python's recursion limit
MAX_THINGS = 65_536  # pairs, tensors, arrays in arrays: real files have hundreds, thousands and none
MIN_PAIR_BYTES = 8 + 4 + 1  # length of the key, type of the value, the smallest value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length of the name, number of dimensions, one of them, type, offset

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
CODES = {"b": "i1", "B": "u1", "h": "i2", "H": "u2", "i": "i4", "I": "u4", "q": "i8", "Q": "u8", "f": "f4", "d": "f8"}


class GGUFError(ValueError):
    """The file is not a GGUF file, is damaged, or uses a feature that this reader does not know."""


class _Values(Sequence[Any]):
    """An array of the metadata: its values are made when they are asked for. Equal to a list of the same values.

    As a list an array of int8 would take up to 17 times its place in the file, one of short texts seven times.
    """

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        more = f", ... ({len(self)} values)" if len(self) > 8 else ""
        return f"[{', '.join(repr(v) for v in self[:8])}{more}]"


class Numbers(_Values):
    """Numbers or truth values."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: Any) -> Any:
        return self.values[i].tolist()


class Texts(_Values):
    """Texts, each behind its length."""

    def __init__(self, raw: bytes, starts: "array[int]"):
        self.raw, self.starts = raw, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        start = self.starts[i]
        (length,) = struct.unpack_from("<Q", self.raw, start)
        return self.raw[start + 8 : start + 8 + length].decode("utf-8", "replace")


class TensorInfo(NamedTuple):
    """Where one tensor lies in the file, and what it is."""

    name: str
    shape: tuple[int, ...]  # in PyTorch's order (GGUF writes the fastest dimension first)
    encoding: str  # "F32", "Q4_1", ...
    offset: int  # from the start of the file, in bytes
    size: int  # in bytes


@dataclass(frozen=True)
class GGUF:
    """An opened GGUF file: its metadata, and its tensors, which are read one at a time when asked for."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` as float32, dequantised if need be; GGUFError if there is none."""
        if name not in self.tensors:
            known = ", ".join(list(self.tensors)[:8])
            raise GGUFError(f"{self.path}: no tensor {name!r} among the {len(self.tensors)} there: {known}, ...")
        info = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, count=info.size, offset=info.offset)
        if raw.size != info.size:
            raise GGUFError(f"{self.path}: the file has become shorter since it was opened; read it again")
        encoding = ggml.BY_NAME[info.encoding]
        values = encoding.decode(raw.reshape(-1, encoding.block_bytes))
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).reshape(info.shape))


def read_gguf(path: str | Path) -> GGUF:
    """Open `path` and read its metadata and its list of tensors (no tensor data yet).

    Raises GGUFError for a file that is not GGUF version 2 or 3 (little endian), is cut short, or describes sizes that
    do not fit into it; OSError if it cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 24:
            raise GGUFError(f"{path}: {size} bytes are too few for a GGUF header (24 bytes)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            cursor = _Cursor(path, view)
            n_tensors, n_pairs = _header(cursor)
            metadata = _metadata(cursor, n_pairs)
            tensors = _tensors(cursor, n_tensors, metadata.get("general.alignment", 32))
    return GGUF(path, metadata, tensors)


class _Cursor:
    """A position in the file that refuses to step beyond the end."""

    def __init__(self, path: Path, view: mmap.mmap):
        self.path, self.view, self.at, self.size = path, view, 0, len(view)
        self.arrays = 0  # in arrays, so far

    def fail(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path}: {what} (at byte {self.at} of {self.size}); the file is damaged or cut short")

    def need(self, count: int, each: int, what: str) -> int:
        """Check that `count` things of at least `each` bytes can still follow; return their size in bytes."""
        if count * each > self.size - self.at:
            raise self.fail(f"{what} needs {count * each} bytes, only {self.size - self.at} are left")
        return count * each

    def few(self, count: int, what: str) -> None:
        """Check that so many Python objects may be made."""
        if count > MAX_THINGS:
            raise GGUFError(f"{self.path}: {count} {what}, but at most {MAX_THINGS} are read; is this a model at all?")

    def take(self, n_bytes: int, what: str) -> bytes:
        self.need(n_bytes, 1, what)
        start, self.at = self.at, self.at + n_bytes
        return self.view[start : self.at]

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        return self.take(self.scalar("Q", what), what).decode("utf-8", "replace")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has the unknown value type {kind}")
        if depth == MAX_NESTING:
            raise self.fail(f"{what} nests arrays more than {MAX_NESTING} deep")
        inner, count = self.scalar("I", what), self.scalar("Q", what)
        if inner in _SCALARS:
            code = _SCALARS[inner]
            n_bytes = self.need(count, struct.calcsize("<" + code), what)
            kept = np.frombuffer(self.take(n_bytes, what), "?" if code == "?" else f"<{CODES.get(code, code)}")
            return Numbers(kept)
        if inner == _STRING:
            return self.texts(count, what)
        self.need(count, 12, what)
        self.arrays += count
        self.few(self.arrays, "arrays in arrays")
        return [self.value(inner, what, depth + 1) for _ in range(count)]

    def texts(self, count: int, what: str) -> Texts:
        self.need(count, 8, what)
        first, starts = self.at, array("Q")
        for _ in range(count):
            starts.append(self.at - first)
            length = self.scalar("Q", what)
            self.at += self.need(length, 1, what)
        return Texts(self.view[first : self.at], starts)


def _header(cursor: _Cursor) -> tuple[int, int]:
    """Read magic, version and counts; return (number of tensors, number of key/value pairs)."""
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise GGUFError(f"{cursor.path}: not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        hint = "; a big-endian file?" if version >= 1 << 24 else ""
        raise GGUFError(f"{cursor.path}: GGUF version {version}, but versions 2 and 3 are supported{hint}")
    n_tensors, n_pairs = cursor.scalar("Q", "the header"), cursor.scalar("Q", "the header")
    cursor.need(n_pairs, MIN_PAIR_BYTES, f"a list of {n_pairs} key/value pairs")
    cursor.need(n_tensors, MIN_TENSOR_BYTES, f"a list of {n_tensors} tensors")
    cursor.few(n_pairs, "key/value pairs")
    cursor.few(n_tensors, "tensors")
    return n_tensors, n_pairs


def _metadata(cursor: _Cursor, n_pairs: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"the metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I", key), f"metadata {key!r}")
    return metadata


def _tensors(cursor: _Cursor, n_tensors: int, alignment: Any) -> dict[str, TensorInfo]:
    """Read the tensor descriptions; check that each lies inside the file and that none overlap."""
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8 or alignment > cursor.size:
        raise cursor.fail(f"general.alignment is {alignment!r}, not a sensible multiple of 8")
    found = [_tensor(cursor) for _ in range(n_tensors)]
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    end = base
    for info in sorted(found, key=lambda info: info.offset):
        # Overlap is refused too: many names for the same bytes would make a small file unfold into a huge model.
        if base + info.offset < end or base + info.offset + info.size > cursor.size:
            raise cursor.fail(
                f"tensor {info.name!r} {info.shape} ({info.encoding}) claims {info.size} bytes at data offset "
                f"{info.offset}, which do not lie free inside the {max(0, cursor.size - base)} bytes of tensor data"
            )
        if info.name in tensors:
            raise cursor.fail(f"the tensor name {info.name!r} occurs twice")
        end = base + info.offset + info.size
        tensors[info.name] = info._replace(offset=base + info.offset)
    return {info.name: tensors[info.name] for info in found}  # in the file's own order


def _tensor(cursor: _Cursor) -> TensorInfo:
    """Read one description; its offset is still relative to the start of the tensor data."""
    name = cursor.string("a tensor name")
    n_dims = cursor.scalar("I", f"tensor {name!r}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
    shape = tuple(cursor.scalar("Q", f"tensor {name!r}") for _ in range(n_dims))[::-1]
    kind, offset = cursor.scalar("I", f"tensor {name!r}"), cursor.scalar("Q", f"tensor {name!r}")
    if kind not in ggml.ENCODINGS:
        known = ", ".join(encoding.name for encoding in ggml.ENCODINGS.values())
        raise GGUFError(f"{cursor.path}: tensor {name!r} is of ggml type {kind}; this reader knows {known}")
    encoding = ggml.ENCODINGS[kind]
    if min(shape) < 1 or shape[-1] % encoding.block_values:
        raise cursor.fail(f"tensor {name!r} {shape} is not made of {encoding.name} blocks of {encoding.block_values}")
    size = math.prod(shape) // encoding.block_values * encoding.block_bytes  # Python integers do not overflow
    return TensorInfo(name, shape, encoding.name, offset, size)


# Decoders: uint8 blocks [blocks, block_bytes] -> values [blocks, block_values]. The layouts are ggml's.
