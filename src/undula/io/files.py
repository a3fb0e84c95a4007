"""Reading and writing the two files of an adapter directory: atomically, as any file is written here, and trusting
nothing that is read."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before every name
LARGEST_CONFIG = 16 << 20
LARGEST_HEADER = 100 << 20


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], extra: Mapping[str, str]) -> None:
    """Writes config, tensors and text files into the directory `path`.  Each file is complete or not there; the config
    comes last, so a directory with a config is whole."""
    path.mkdir(parents=True, exist_ok=True)
    held = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    atomic(path / TENSORS, lambda temporary: save_file(held, temporary, metadata={"format": "pt"}))
    for name, text in extra.items():
        write_text(path / name, text)
    write_text(path / CONFIG, json.dumps(config, indent=2) + "\n")


def write_state(folder: Path, name: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes JSON values and tensors as NAME.json and NAME.safetensors; the JSON comes last."""
    held = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    atomic(folder / f"{name}.safetensors", lambda temporary: save_file(held, temporary))
    write_text(folder / f"{name}.json", json.dumps(values) + "\n")


def read_state(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `write_state`.  Raises FileNotFoundError."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {path.name}: it is no checkpoint of a training with an allocator")
    return json.loads(path.read_text(encoding="utf-8")), load_file(folder / f"{name}.safetensors")


def write_text(path: Path, text: str) -> None:
    """Writes a text: complete or not at all."""
    atomic(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8", newline="\n"))


def atomic(path: Path, produce: Callable[[str], object]) -> None:
    """`produce` writes the file that it is given; then this is `path`, which is complete or not there."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        produce(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an adapter directory.  Raises FileNotFoundError, or ValueError for what is malformed."""
    for name in (CONFIG, TENSORS):
        if not (path / name).is_file():
            there = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else "no such directory"
            raise FileNotFoundError(f"{path} is no adapter directory: {name} is missing; found {there}")
    if (path / CONFIG).stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path / CONFIG} is larger than {LARGEST_CONFIG >> 20} MiB: not an adapter's")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG} holds a {type(config).__name__}, not an object")
    check_header(path / TENSORS)
    tensors = load_file(path / TENSORS)
    check_finite(tensors, str(path / TENSORS))
    return config, tensors


def check_finite(tensors: Mapping[str, Tensor], path: str) -> None:
    """Raises ValueError for NaN or infinity."""
    for key, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the adapter is damaged or diverged")


def check_header(path: Path) -> None:
    """Refuses a file whose header claims more than the file holds, before anything is allocated for it."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{path} is no safetensors file: its header claims {length} of {size} bytes")
        try:
            header = json.loads(f.read(length))
            entries = [e for k, e in header.items() if k != "__metadata__"]
            claimed = sum(e["data_offsets"][1] - e["data_offsets"][0] for e in entries)
            elements = max((math.prod(e["shape"]) for e in entries), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is no safetensors file: its header is malformed ({error!r})") from None
    if claimed != size - 8 - length or elements > size:
        raise ValueError(f"{path} is cut or damaged: its header claims {claimed} bytes, it holds {size - 8 - length}")


def check_name(name: str, what: str) -> str:
    """A module or factor name from a file: dotted identifiers, nothing that walks a file system."""
    parts = name.split(".")
    if not name or len(name) > 1000 or any(not p or not p.replace("_", "a").replace("-", "a").isalnum() for p in parts):
        raise ValueError(f"{what} {name!r:.100} is not a name of modules joined by dots")
    return name
