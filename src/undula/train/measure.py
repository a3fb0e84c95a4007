"""What a run costs: peak memory, and with what it was made."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from datasets import Dataset

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """A context; afterwards `bytes` is the peak within it, and `how` says what was measured.

    On a GPU: what torch allocated.  On Linux: the resident set's high-water mark (VmHWM), reset at the beginning.
    Elsewhere: the high-water mark of the process since it began.
    """

    bytes: int = 0
    how: str = ""

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            RESET.write_text("5")
            self.fresh = True
        except OSError:
            self.fresh = False
        return self

    def __exit__(self, *_: object) -> None:
        self.read()

    def read(self) -> None:
        """Takes the peak so far."""
        if torch.cuda.is_available():
            self.bytes, self.how = torch.cuda.max_memory_allocated(), "largest allocation of torch on the GPU"
        elif self.fresh:
            line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            self.bytes, self.how = int(line.split()[1]) * 1024, "resident set of the process, its peak within the run"
        else:
            import resource

            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self.bytes = most if sys.platform == "darwin" else most * 1024
            self.how = "resident set of the process, its peak since the process began"


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    names = ("undula", "torch", "transformers", "accelerate", "datasets")
    found = {"python": platform.python_version(), **{name: _version(name) for name in names}}
    return {name: version for name, version in found.items() if version}


@functools.cache  # a look takes milliseconds, and every training takes five
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


WHOLE, PIECES, PIECE = 256 << 20, 256, 1 << 20  # files up to so many bytes are read whole, of others so many pieces


def files_digest(folder: Path, begin: tuple[str, ...] = ("",)) -> str:
    """A hash of the files of a folder, such as a model's and its tokenizer's: names, that begin so, sizes and contents.
    Of files above 256 MiB it reads 256 pieces of 1 MiB, evenly spread."""
    made = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name.startswith(begin)):
        size = path.stat().st_size
        made.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            if size <= WHOLE:
                made.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for i in range(PIECES):
                file.seek((size - PIECE) * i // (PIECES - 1))
                made.update(file.read(PIECE))
    return made.hexdigest()[:24]


def rows_digest(rows: Dataset) -> str:
    """A hash of rows: it changes with any text, label, number, pixel or sample, and with their order."""
    from .data import audio, images

    fingerprint, made = {"image": images.fingerprint, "audio": audio.fingerprint}, hashlib.sha256()
    for column in sorted(rows.column_names):
        tell = fingerprint.get(column)
        values = rows[column][:] if tell is None else [tell(value) for value in rows[column]]
        made.update(json.dumps([column, values]).encode())
    return made.hexdigest()[:24]
