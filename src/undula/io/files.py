"""Reading and writing the two files of an adapter directory so that they belong together, and trusting nothing that is
read.

The configuration is in `adapter_config.json`, where everybody looks for it, and once more in the metadata of the
tensors' file.  Both copies bear the mark of their save, and the tensors are put in place first.  Where the marks differ
(a save was killed between the two, or two are at work) the configuration that counts is that of the tensors' file: a
reader finds the old adapter or the new one.  An edited configuration keeps its mark, so it counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import tensorfile
from .draft import Draft, atomic, clean, filled, write_text
from .strict import door, parsed

__all__ = ["CONFIG", "PREFIX", "TENSORS", "atomic", "check_finite", "check_name", "configuration", "conversion", "door",
           "headed", "of_one_save", "parsed", "place", "read", "read_state", "write", "write_state",
           "write_text"]  # fmt: skip

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before every name
LARGEST_CONFIG = 16 << 20
EMBEDDED = "undula"  # the key of the configuration in the metadata
SUM = "undula_sum"  # the key of the checksum in the values of a state
# The mark of a save stands in a field that PEFT has for "version@commit" and does not read for these types: a key of
# its own would make PEFT warn of every export.
MARKED, MARK, LAYOUT = "peft_version", "@undula.", "0.21.0"
TRIES, PAUSE = 8, 0.005

Entries = Callable[[BinaryIO, str], tuple[dict[str, tensorfile.Entry], dict[str, str]]]


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], readme: str | None = None) -> None:
    """Writes config and tensors into the directory `path`, and a README where there is none or an older one of ours
    (it begins with the same line).

    Whenever this is interrupted, the directory holds the adapter that it held, or this one, for undula's readers.
    Raises OSError where the files cannot be written, ValueError for what could not be read back.
    """
    for name in config["target_modules"]:
        check_name(name, "site") if name else None
    held = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    check_finite(held, f"the adapter (nothing is written to {path})")
    contents = (part for key in sorted(held) for part in (key.encode(), tensorfile.memory(held[key])))
    place(path, config, contents, lambda file, metadata: tensorfile.write(file, held, metadata), readme)


def place(
    path: Path,
    config: Mapping[str, Any],
    contents: Iterable[bytes | memoryview],
    write_tensors: Callable[[BinaryIO, Mapping[str, str]], object],
    readme: str | None = None,
) -> None:
    """`write` of tensors that `write_tensors(file, metadata)` brings into an open file; `contents` is what tells this
    save from others."""
    text = _marked(config, contents)
    path.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, TENSORS):
        if (path / name).is_dir():
            raise IsADirectoryError(
                f"{path / name} is a directory: an adapter's file belongs there. Nothing is written"
            )
        clean(path / name)
    # a full disk names the inner one, which is the large one
    with Draft(path / CONFIG) as config_file, Draft(path / TENSORS) as tensors_file:
        write_tensors(tensors_file.file, {"format": "pt", EMBEDDED: text})
        config_file.file.write(text.encode("utf-8"))
        tensors_file.flush()
        config_file.flush()
        tensors_file.place()
        config_file.place()
    if readme is not None:
        _write_readme(path / "README.md", readme)


def size(config: Mapping[str, Any], tensors: Mapping[str, Tensor], readme: str) -> int:
    """How many bytes `write` writes into a new directory; of the tensors only shapes and types count."""
    text = _text(config, 16 * "0")
    return len(text.encode()) + tensorfile.size(tensors, {"format": "pt", EMBEDDED: text}) + len(readme.encode())


def _marked(config: Mapping[str, Any], contents: Iterable[bytes | memoryview]) -> str:
    """The configuration as it is written, with the mark of this save: a digest of all that it writes."""
    digest = hashlib.sha256(json.dumps(config).encode())
    for part in contents:
        digest.update(part)
    return _text(config, digest.hexdigest())


def _text(config: Mapping[str, Any], digest: str) -> str:
    try:
        return json.dumps({**config, MARKED: f"{LAYOUT}{MARK}{digest[:16]}"}, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"a field of this adapter is NaN or infinite, which no file may say: {error}") from None


def _mark(config: Mapping[str, Any]) -> str | None:
    found = config.get(MARKED)
    return found.partition(MARK)[2] or None if isinstance(found, str) else None


def _write_readme(path: Path, text: str) -> None:
    """Raises nothing for a README that is not ours: it stays."""
    first = text.partition("\n")[0]
    try:
        ours = path.read_text(encoding="utf-8").partition("\n")[0] == first
    except FileNotFoundError:
        ours = True
    except (OSError, ValueError):
        ours = False
    if ours:
        write_text(path, text)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an adapter directory, of one save.  Raises FileNotFoundError, or ValueError for what is
    malformed."""
    with contextlib.ExitStack() as stack:
        config, file, found = of_one_save(path, stack)
        tensors = tensorfile.read(file, found, str(path / TENSORS))
    check_finite(tensors, str(path / TENSORS))
    return config, tensors


def headed(path: Path, entries: Entries = tensorfile.entries) -> tuple[dict[str, Any], dict[str, tensorfile.Entry]]:
    """(config, what the tensors' header tells) of an adapter directory, of one save: no numbers are read.  Raises as
    `read` does."""
    with contextlib.ExitStack() as stack:
        config, _, found = of_one_save(path, stack, entries)
    return config, found


def of_one_save(
    path: Path, stack: contextlib.ExitStack, entries: Entries = tensorfile.entries
) -> tuple[dict[str, Any], BinaryIO, dict[str, tensorfile.Entry]]:
    """(config, the tensors' file, what its header tells); the file stays open as long as `stack`."""
    for attempt in range(TRIES):
        text, config = _config(path)
        file = stack.enter_context(_opened(path, TENSORS))
        name = str(path / TENSORS)
        found, metadata = entries(file, name)
        own = config if metadata.get(EMBEDDED) == text else _embedded(metadata, name)
        if own is not None and _mark(own) != _mark(config):
            if attempt < TRIES - 1:  # a save is at work, most likely
                file.close()
                time.sleep(PAUSE)
                continue
            warnings.warn(
                f"{path / CONFIG} is of another save than {TENSORS}: a save was interrupted, or the file was "
                "exchanged. The configuration that was saved with the tensors counts; save the adapter again",
                stacklevel=4,
            )
            config = own
        return config, file, found
    raise AssertionError


def _opened(path: Path, name: str) -> BinaryIO:
    try:
        if (path / name).is_file():  # neither a directory nor a pipe
            return open(path / name, "rb")
    except FileNotFoundError:  # gone since
        pass
    some = itertools.islice(path.iterdir(), 1000) if path.is_dir() else ()
    there = sorted(p.name for p in some)[:8] if path.is_dir() else "no such directory"
    hint = ""
    if (path / "run.json").is_file():
        hint = (
            f". The training that began there has not ended: `undula train --resume {shlex.quote(str(path))}` goes on"
        )
    elif name == CONFIG and (path / "config.json").is_file():
        hint = ". It is the folder of a model; what is asked for is the directory of an adapter for one"
    raise FileNotFoundError(f"{path} is no adapter directory: {name} is missing; found {there}{hint}")


def conversion(path: str | Path) -> str:
    """The command that makes undula's own directory of what cannot be opened without its base."""
    return f"`undula import {shlex.quote(str(path))} --model BASE --out DIRECTORY`"


def configuration(path: Path) -> dict[str, Any]:
    """What adapter_config.json of a directory says, whatever it belongs to.  Raises FileNotFoundError, ValueError."""
    return _config(path)[1]


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    """(the text, what it says)."""
    with _opened(path, CONFIG) as file:
        text = file.read(LARGEST_CONFIG + 1)
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"{path / CONFIG} is larger than {LARGEST_CONFIG >> 20} MiB: not an adapter's")
    config = parsed(text, str(path / CONFIG))
    return text.decode("utf-8"), config


def _embedded(metadata: Mapping[str, str], name: str) -> dict[str, Any] | None:
    text = metadata.get(EMBEDDED)
    if text is None:
        return None
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"{name}: the configuration in it is larger than {LARGEST_CONFIG >> 20} MiB")
    return parsed(text, f"{name}: the configuration in it")


def write_state(folder: Path, name: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes JSON values and tensors as NAME.json and NAME.safetensors; the JSON comes last.  The values, and a
    checksum of the tensors with them, stand in both: those beside the tensors count."""
    held = {key: t.detach().cpu() for key, t in tensors.items()}
    text = json.dumps({**values, SUM: tensorfile.checksum(held)})
    filled(folder / f"{name}.safetensors", lambda file: tensorfile.write(file, held, {EMBEDDED: text}))
    write_text(folder / f"{name}.json", text + "\n")


def read_state(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `write_state`.  Raises FileNotFoundError, or ValueError for what is malformed, and for other
    numbers than those that were written."""
    for path in (folder / f"{name}.json", folder / f"{name}.safetensors"):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}: it is no checkpoint of a training with an allocator")
    with door(str(folder)), open(folder / f"{name}.safetensors", "rb") as file:
        found, metadata = tensorfile.entries(file, file.name)
        text = metadata.get(EMBEDDED) or (folder / f"{name}.json").read_text(encoding="utf-8")
        values, tensors = parsed(text, str(folder / f"{name}.json")), tensorfile.read(file, found, file.name)
        if SUM in values and values.pop(SUM) != tensorfile.checksum(tensors):  # older ones have none
            raise ValueError(f"{file.name} is damaged, or was exchanged: its numbers are not those that were written")
        return values, tensors


def check_finite(tensors: Mapping[str, Tensor], path: str) -> None:
    """Raises ValueError for NaN or infinity, for numbers that would be infinite in float32, and for complex ones."""
    largest = torch.finfo(torch.float32).max
    for key, t in tensors.items():
        if t.is_complex():
            raise ValueError(f"{path}: {key} holds complex numbers, which no adapter has")
        if not t.is_floating_point():
            continue
        # a sum that is finite has finite parts; one that is not may be too large alone
        if not math.isfinite(t.sum()) and not torch.isfinite(t).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the adapter is damaged or diverged")
        if t.dtype == torch.float64 and t.numel() and t.abs().max() > largest:
            raise ValueError(f"{path}: {key} holds numbers beyond float32's range ({largest:.3g})")


def check_name(name: Any, what: str) -> str:
    """A module's or parameter's name: parts that torch allows, joined by dots.  Raises ValueError."""
    if not isinstance(name, str) or not name or len(name) > 1000 or not all(name.split(".")):
        raise ValueError(f"{what} {name!r:.100} is not a name of modules joined by dots")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} {name!r:.100} cannot be written as UTF-8, so no file can hold it") from None
    return name
