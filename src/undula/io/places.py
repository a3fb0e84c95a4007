"""Which directory or file a path to an adapter means, and what to do about one that is not opened as it is."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from . import diffusers, files

ADAPTERS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")  # files that may be one
MOST_NAMES = 1000  # of a folder
OTHERS = ("config.json", "run.json")  # of a model, of a training


def place(path: str | Path) -> Path:
    """The directory, or the file of diffusers, that `Adapter.load` opens: a file in an adapter's directory means that
    directory.  What is not there is left to whoever opens it.

    Raises ValueError for any other file, with what it is, why it is not opened and the command that converts it.
    """
    path = _only_file(Path(path))
    if not path.is_file():
        return path
    if path.name in (files.CONFIG, files.TENSORS) and (path.parent / files.CONFIG).is_file():
        return path.parent
    if path.suffix not in ADAPTERS:
        return path
    from .spots import COMFY, DIFFUSERS, form_of
    from .stored import stored
    from .verdicts import verdict

    found = stored(path)
    form = form_of(found)
    if form in (DIFFUSERS, COMFY):
        return path
    raise ValueError(f"{path}, stored as: {form}. {verdict(found, form)[1]}")


def _only_file(path: Path) -> Path:
    """The one file of tensors in a folder that nothing else says the content of; else the path itself."""
    if not path.is_dir() or any((path / name).exists() for name in (files.CONFIG, diffusers.WEIGHTS, *OTHERS)):
        return path
    with os.scandir(path) as entries:
        names = [entry.name for entry in itertools.islice(entries, MOST_NAMES)]
    found = [name for name in names if name.endswith((".safetensors", ".gguf")) and name != files.TENSORS]
    return path / found[0] if len(found) == 1 and len(names) < MOST_NAMES else path


def pipeline_file(path: Path) -> Path | None:
    """The file of diffusers that a path means; None for a directory of undula's or PEFT's."""
    if path.suffix in ADAPTERS and path.is_file():
        return path
    file = path / diffusers.WEIGHTS
    return file if file.is_file() and not (path / files.CONFIG).is_file() else None


def layers_of(source: str | Path, part: str | None = None) -> dict[str, tuple[int, ...]]:
    """{name of a layer: shape of its weight} of a model's files, by their headers alone: a folder with safetensors,
    one of a pipeline's parts with `part` (`unet`, `text_encoder` ...), or a file.  Raises FileNotFoundError,
    LookupError and ValueError as `undula.io.inspect` does."""
    from .stored import INDEX, stored

    folder = Path(source)
    if part is not None and (folder / part).is_dir():
        folder /= part
    shards = sorted(folder.glob(f"*.safetensors{INDEX}")) if folder.is_dir() else []
    found = stored(shards[0] if shards else folder).tensors
    told = {name: one.shape for name, one in found.items() if name.endswith(".weight") and len(one.shape) > 1}
    if not told:
        raise ValueError(f"{folder} holds no layers of a model (NAME.weight of two dimensions or more)")
    return {name.removesuffix(".weight"): shape for name, shape in told.items()}
