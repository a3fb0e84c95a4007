"""Tensors on their way into a file whose header says more than is known when the first of them comes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor

from . import tensorfile
from .files import check_finite

PIECE = 1 << 20


class Spool:
    """A nameless file in `folder`: what it holds is gone when it is closed, or its process is killed."""

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by __exit__
        self.outlines: dict[str, Tensor] = {}  # on the meta device
        self.places: dict[str, tuple[int, int]] = {}  # the first byte, how many
        self.digests: dict[str, bytes] = {}

    def put(self, key: str, t: Tensor) -> Tensor:
        """Takes the numbers of t; returns its outline.  Raises ValueError for what no adapter holds (NaN ...) or is
        here already, OSError."""
        held = t.detach().cpu().contiguous()
        if key in self.places:
            raise ValueError(f"{key} is written twice")
        check_finite({key: held}, "the adapter (nothing is written)")
        tensorfile.check_types({key: held})
        begin, bytes_of = self.file.seek(0, 2), tensorfile.memory(held)
        self.file.write(bytes_of)
        self.places[key] = begin, len(bytes_of)
        self.digests[key] = hashlib.sha256(bytes_of).digest()
        outline = torch.empty(held.shape, dtype=held.dtype, device="meta")
        self.outlines[key] = outline.requires_grad_(t.requires_grad)
        return self.outlines[key]

    def drop(self, key: str) -> None:
        """The file will not hold this one."""
        del self.outlines[key], self.places[key], self.digests[key]

    def contents(self) -> Iterator[bytes]:
        """What tells these tensors from others."""
        for key in sorted(self.digests):
            yield from (key.encode(), self.digests[key])

    def write(self, file: BinaryIO, metadata: Mapping[str, str]) -> None:
        """Writes a safetensors file of all that was put."""
        for key in tensorfile.write_header(file, self.outlines, metadata):
            for piece in self._pieces(*self.places[key]):
                file.write(piece)

    def _pieces(self, begin: int, size: int) -> Iterable[bytes]:
        self.file.seek(begin)
        while size:
            piece = self.file.read(min(size, PIECE))
            if not piece:
                raise OSError(f"the temporary file lacks {size} bytes that were written to it")
            size -= len(piece)
            yield piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
