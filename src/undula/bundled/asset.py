"""What an asset is, and where it is kept on disk."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Progress = Callable[[str], None]


class AssetError(RuntimeError):
    """An asset is unknown, cannot be had here, or is not what was expected. The message says what to do."""


@dataclass(frozen=True)
class Asset:
    """One pretrained model or data set that can be had without a model hub.

    Models become ordinary Hugging Face folders. Data sets become train.jsonl, validation.jsonl, test.jsonl and
    info.json (see rows.py), of images *.parquet (see images.py).
    """

    name: str
    kind: Literal["model", "data"]
    title: str  # one line for people
    licence: str
    source: str  # "package==version" where a package holds it, else where it comes from
    sha256: str | None  # of the file that it is made from; None where it is made on this computer
    bytes: int  # of that file; approximate where sha256 is None
    build: Callable[["Asset", Path, Progress], None]  # fills an empty folder with the finished asset
    hub: str | None = None  # what model hubs call the model, where transformers opens it from there
    own_class: bool = False  # a model whose class is undula's, not transformers'
    edition: str = "1"  # raise it when `build` changes what it writes: caches are then built anew

    @property
    def folder(self) -> Path:
        """Where the finished asset is, or would be."""
        return cache_root() / f"{self.name}-{(self.sha256 or 'made-here')[:12]}-{self.edition}"


def cache_root() -> Path:
    """$UNDULA_CACHE, else $XDG_CACHE_HOME/undula, else ~/.cache/undula. Read anew at each call."""
    if own := os.environ.get("UNDULA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "undula"
