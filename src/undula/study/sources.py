"""What a study reads: its rows, its models' content and shapes.  One object holds it for one call of a study, so that
a file that has changed since is seen by the next call in the same process."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..host.views import site
from ..host.where import choose
from ..train.base import model_folder, open_model, quiet
from ..train.recipe import dtype_called
from ..train.tasks.task import Task
from . import splits
from .sizes import Shapes
from .spec import Arm, Base, Rows, Study

if TYPE_CHECKING:
    from datasets import DatasetDict

BLOCK, BLOCKS = 1 << 20, 512  # a large file is told by so many blocks of so many bytes, evenly over it
WEIGHTS = (".safetensors", ".bin", ".pt", ".json", ".model", ".txt")


class Sources:
    """Everything is read at most once."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, int], tuple[Task, DatasetDict, list[str]]] = {}
        self._digests: dict[tuple[str, int], str] = {}
        self._models: dict[str, str | None] = {}
        self._shapes: dict[tuple[object, ...], Shapes] = {}

    def opened(self, rows: Rows, seed: int) -> tuple[Task, DatasetDict]:
        """See `splits.opened`."""
        return self._read(rows, seed)[:2]

    def left_out(self, rows: Rows, seed: int) -> list[str]:
        """Sentences on rows that are left out for their faults."""
        return self._read(rows, seed)[2]

    def _read(self, rows: Rows, seed: int) -> tuple[Task, DatasetDict, list[str]]:
        key = (repr(rows), seed)
        if key not in self._opened:
            self._opened[key] = splits.read(rows, seed)
        return self._opened[key]

    def digest(self, rows: Rows, seed: int) -> str:
        """See `splits.digest`."""
        key = (repr(rows), seed)
        if key not in self._digests:
            self._digests[key] = splits.digest_of(self.opened(rows, seed)[1])
        return self._digests[key]

    def model(self, source: str) -> str | None:
        """A hash of a model's configuration, tokenizer and weights; None where its files cannot be found."""
        if source not in self._models:
            folder = model_files(source)
            self._models[source] = None if folder is None else content(folder)
        return self._models[source]

    def shapes(self, study: Study, arm: Arm, base: Base, rows: Rows) -> Shapes:
        """The (O, I) of every layer that an arm adapts."""
        where, exclude = (study.settings(arm)[name] for name in ("where", "exclude"))
        key = (base, repr(rows.task), where, exclude, study.split_seed)
        if key not in self._shapes:
            task, _ = self.opened(rows, study.split_seed)
            with quiet():
                model, _ = open_model(base.source, task, dtype_called(base.dtype), seed=0)
            self._shapes[key] = {n: site(n, layer).shape for n, layer in choose(model, where, exclude).items()}
        return self._shapes[key]


def model_files(source: str) -> Path | None:
    """The folder that holds a model's files; of one from the hub, the folder of its cached snapshot."""
    from transformers.utils import cached_file

    folder = Path(model_folder(source))
    if folder.is_dir():
        return folder
    try:
        found = cached_file(source, "config.json")
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def content(folder: Path) -> str:
    """A hash of a folder's files, by their names, sizes and bytes.  Of large ones BLOCKS even blocks stand for all."""
    made = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in WEIGHTS):
        size = path.stat().st_size
        made.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            last = max(size - BLOCK, 0)
            few = range(0, size, BLOCK) if size <= BLOCK * BLOCKS else [last * i // (BLOCKS - 1) for i in range(BLOCKS)]
            for start in few:
                file.seek(start)
                made.update(file.read(BLOCK))
    return made.hexdigest()[:24]
