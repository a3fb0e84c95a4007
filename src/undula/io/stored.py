"""What lies at a path that may be an adapter of any kind: its files, configuration and the headers of its tensors.

No tensor of more than one number is read, no pickle is opened, a directory is not walked, and of what a file claims
nothing is believed before its size agrees.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import diffusers, files, tensorfile
from .tensorfile import Told

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MOST_NAMES, MOST_SHARDS = 10_000, 4096  # of a directory, and of an index, that are looked at
ADAPTER, MLX, MODEL, INDEX = files.TENSORS, "adapters.safetensors", "model.safetensors", ".index.json"
PLAIN = re.compile(r"[^/\\\x00-\x1f]+\.safetensors")


@dataclass(frozen=True)
class Stored:
    """The headers of an adapter's files."""

    path: Path  # as it was asked for
    config: Mapping[str, Any]  # adapter_config.json, or nothing
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Told]
    files: Mapping[str, int]  # bytes of each that was looked at
    numbers: Mapping[str, float] = field(default_factory=dict)  # tensors of one number, by their names
    gguf: bool = False
    notes: tuple[str, ...] = ()


def stored(path: str | Path) -> Stored:
    """What lies at `path`: a file, or a directory with one adapter.

    Raises FileNotFoundError where nothing is there, ValueError for pickles, for what is malformed or cut, and for what
    is no adapter's; LookupError where there are several, which it names.
    """
    path = Path(path)
    with files.door(str(path)):
        if path.is_dir():
            return _directory(path)
        _check_file(path)
        if path.name == files.CONFIG:
            return _directory(path.parent)
        if path.name.endswith(INDEX):
            return _sharded(path, {}, path)
        if path.name in (ADAPTER, MLX) and (path.parent / files.CONFIG).is_file():
            return _directory(path.parent)
        return _single(path, {}, path)


def _check_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_symlink():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)!r:.200}, where no file is")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    raise ValueError(f"{path} is neither a file nor a directory (a pipe, a socket or a device)")


def _directory(path: Path) -> Stored:
    config = _config(path)
    names = (ADAPTER, ADAPTER + INDEX, diffusers.WEIGHTS, MLX)
    for name in names if config is not None else names[2:]:
        if (path / name).is_file():
            how = _sharded if name.endswith(INDEX) else _single
            return how(path / name, config or {}, path)
    if config is None:
        for name in (MODEL + INDEX, MODEL):
            if (path / name).is_file():
                return (_sharded if name.endswith(INDEX) else _single)(path / name, {}, path)
    return _searched(path, config)


def _config(path: Path) -> dict[str, Any] | None:
    if not os.path.lexists(path / files.CONFIG):
        return None
    return files.configuration(path)


def _searched(path: Path, config: dict[str, Any] | None) -> Stored:
    """The one adapter in a directory of which no name says what it is."""
    names, more = _names(path)
    tensors = [n for n in names if n.endswith((".safetensors", ".gguf")) and (path / n).is_file()]
    pickles = [n for n in names if n.endswith(PICKLES) and n not in ("training_args.bin", "optimizer.pt")]
    pickles = [n for n in pickles if not n.startswith(("rng_state", "scheduler"))]
    if len(tensors) == 1 and not more:
        return _single(path / tensors[0], config or {}, path)
    beyond = f" (of its first {MOST_NAMES:,} names: there are more)" if more else ""
    if tensors:
        told = ", ".join(tensors[:8]) + (" ..." if tensors[8:] else "")
        raise LookupError(f"{path} holds {len(tensors)} files of tensors{beyond}: name one of them: {told}")
    if pickles:
        raise ValueError(pickled(path / pickles[0]))
    inner = itertools.islice((n for n in names if (path / n / files.CONFIG).is_file()), 8)
    if found := list(inner):
        raise LookupError(f"{path} is no adapter, and has some in it{beyond}: name one: {', '.join(found)}")
    what = ", ".join(names[:8]) + (" ..." if names[8:] else "") if names else "nothing"
    raise FileNotFoundError(
        f"{path} holds no adapter{beyond}: no {ADAPTER}, {diffusers.WEIGHTS}, *.safetensors or *.gguf; found {what}"
    )


def _names(path: Path) -> tuple[list[str], bool]:
    """(the first names of a directory, sorted; whether there are more)."""
    with os.scandir(path) as found:
        names = [entry.name for entry in itertools.islice(found, MOST_NAMES + 1)]
    return sorted(names[:MOST_NAMES]), len(names) > MOST_NAMES


def pickled(path: Path) -> str:
    """What there is to say of a pickle."""
    name = shlex.quote(path.name)
    return (
        f"{path} is a pickle: opening one runs whatever its maker put into it, so undula never does. Where you trust "
        f'it, turn it into safetensors once: `python -c "import torch, safetensors.torch as s; s.save_file({{k: '
        f"v.contiguous() for k, v in torch.load({name!r}, map_location='cpu', weights_only=True).items()}}, "
        f'{path.stem + ".safetensors"!r})"` (PEFT: load it and save_pretrained)'
    )


def _single(file: Path, config: Mapping[str, Any], path: Path) -> Stored:
    with open(file, "rb") as opened:
        size, head = os.fstat(opened.fileno()).st_size, opened.read(8)
        if head[:4] == b"GGUF":
            return _gguf(file, path, size)
        if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
            raise ValueError(pickled(file))
        if file.suffix.lower() in PICKLES:
            raise ValueError(pickled(file))
        opened.seek(0)
        found, metadata = tensorfile.told(opened, str(file))
        numbers = dict(_numbers(opened, found))
    return Stored(path, config, metadata, found, {file.name: size}, numbers)


FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "", "I64": "<q", "I32": "<i"}


def _numbers(opened: Any, found: Mapping[str, Told]) -> Iterator[tuple[str, float]]:
    """The scales that kohya's files keep as tensors of one number."""
    for name, one in found.items():
        if one.kind not in FORMATS or one.shape not in ((), (1,)):
            continue
        opened.seek(one.begin)
        raw = opened.read(one.size)
        if one.kind == "BF16":
            raw, form = b"\0\0" + raw, "<f"
        else:
            form = FORMATS[one.kind]
        if len(raw) == struct.calcsize(form):
            yield name, float(struct.unpack(form, raw)[0])


def _sharded(index: Path, config: Mapping[str, Any], path: Path) -> Stored:
    """The files that an index names, which lie beside it."""
    with open(index, "rb") as opened:
        text = opened.read(tensorfile.LARGEST_HEADER + 1)
    if len(text) > tensorfile.LARGEST_HEADER:
        raise ValueError(f"{index} is larger than {tensorfile.LARGEST_HEADER >> 20} MiB: no index of tensors")
    places = files.parsed(text, str(index)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(f"{index} is no index of tensors: its weight_map does not name a file for each")
    names = sorted(set(places.values()))
    if len(names) > MOST_SHARDS:
        raise ValueError(f"{index} names {len(names):,} files, more than the {MOST_SHARDS:,} that are looked at")
    odd = next((n for n in names if PLAIN.fullmatch(n) is None), None)
    if odd is not None:
        kind = (
            pickled(index.parent / Path(odd).name) if odd.endswith(PICKLES) else "is not the name of a file beside it"
        )
        raise ValueError(f"{index} names {odd!r:.100}: {kind}")
    tensors: dict[str, Told] = {}
    sizes: dict[str, int] = {}
    numbers: dict[str, float] = {}
    metadata: dict[str, Any] = {}
    for name in names:
        _check_file(index.parent / name)
        one = _single(index.parent / name, {}, path)
        for key in one.tensors:
            if places.get(key) != name:
                raise ValueError(
                    f"{index.parent / name} holds {key!r:.100}, which the index has elsewhere or not at all"
                )
        tensors |= one.tensors
        sizes |= one.files
        numbers |= one.numbers
        metadata |= one.metadata
    lost = next((key for key in places if key not in tensors), None)
    if lost is not None:
        raise ValueError(f"{index} has {lost!r:.100} in {places[lost]!r:.100}, which does not hold it")
    return Stored(path, config, metadata, tensors, sizes, numbers)


def _gguf(file: Path, path: Path, size: int) -> Stored:
    from .gguf import read_gguf  # which needs numpy, and the command line alone does without

    found = read_gguf(file)
    tensors = {i.name: Told(i.encoding, i.shape, i.offset, i.size) for i in found.tensors.values()}
    return Stored(path, {}, found.metadata, tensors, {file.name: size}, gguf=True)
