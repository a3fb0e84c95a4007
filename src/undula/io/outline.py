"""What an adapter directory holds, as far as its configuration and the header of its tensors tell: no number is
read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.adapter import Adapter
from . import diffusers, files, places, tensorfile
from .native import made
from .reading import ABOUT


@dataclass(frozen=True)
class Head:
    """The configuration of an adapter directory, and what the header of its tensors tells."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, tensorfile.Entry]
    layout: bytes  # a digest of the entries

    @property
    def base(self) -> str | None:
        """The model that the adapter says it is for."""
        said = self.config.get("base_model_name_or_path")
        return said if isinstance(said, str) and said else None

    def form(self) -> bytes:
        """A digest of all that `outline` depends on but for what it says of the adapter's training: directories of
        one form have methods, sites, shapes and types in common, and differ in their numbers."""
        own = self.config.get("undula")
        told = {k: v for k, v in self.config.items() if k not in ("undula", files.MARKED, "base_model_name_or_path")}
        if isinstance(own, Mapping):
            told["undula"] = {k: v for k, v in own.items() if k not in ABOUT}
        return hashlib.sha256(self.layout + repr(told).encode(errors="surrogatepass")).digest()

    def outline(self) -> Adapter:
        """What `Adapter.load` gives, with factors on the meta device.  Raises what it raises for names, shapes, types
        and fields that are wrong."""
        with files.door(str(self.path)):
            tensors = {k: torch.empty(e.shape, dtype=e.dtype, device="meta") for k, e in self.entries.items()}
            if diffusers.METADATA in self.config:
                return diffusers.component_of(self.path, None, tensors, self.config[diffusers.METADATA])
            return made(self.config, tensors, self.path)


def head(path: str | Path, layouts: tensorfile.Layouts | None = None) -> Head:
    """The head of an adapter directory of any form that `Adapter.load` reads; with `layouts`, those that are like one
    that was seen cost little.  Raises FileNotFoundError, or ValueError for what is malformed or cut."""
    layouts = layouts or tensorfile.Layouts()
    with files.door(str(path)):
        path = places.place(path)
        file = places.pipeline_file(path)
        if file is None:
            config, entries = files.headed(path, layouts.entries)
            return Head(path, config, entries, layouts.digest(entries))
        with open(file, "rb") as opened:
            entries, metadata = layouts.entries(opened, str(file))
        config = {diffusers.METADATA: metadata.get(diffusers.METADATA)}
        return Head(path, config, entries, layouts.digest(entries))
