"""Files that rows stand for, images and sounds: folders of them by class, and columns that name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .columns import spot
from .faults import Faults
from .source import Source, described, source_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Medium:
    """A kind of files: the column that rows have it in, what several are called, the suffixes of their names."""

    column: str
    called: str
    suffixes: frozenset[str]

    def listed(self) -> str:
        return ", ".join(sorted(self.suffixes))


IMAGES = Medium(
    "image",
    "images",
    frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}),
)
AUDIO = Medium(
    "audio",
    "sounds",
    frozenset(
        {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".w64", ".rf64", ".caf"}
    ),
)  # what libsndfile reads
MEDIA = {medium.column: medium for medium in (IMAGES, AUDIO)}
LITTER = {"thumbs.db", "desktop.ini"}  # what a file manager leaves, beside names with a dot before


def medium_of(path: Path) -> Medium | None:
    """The medium that a file is of, by its name."""
    return next((m for m in MEDIA.values() if path.suffix.lower() in m.suffixes), None)


def visible(path: Path) -> bool:
    """Whether a file or folder is its owner's, and not a file manager's."""
    return not path.name.startswith(".") and path.name.lower() not in LITTER


def holds_classes(path: Path) -> bool:
    """Whether images or sounds lie in the folders below this one."""
    folders = (p for p in path.iterdir() if p.is_dir() and visible(p))
    return any(medium_of(file) is not None and file.is_file() for p in folders for file in p.rglob("*"))


def holds_files(path: Path) -> bool:
    """Whether images or sounds lie in this folder itself."""
    return any(medium_of(p) is not None and p.is_file() for p in path.iterdir())


def class_folders(path: Path) -> Dataset:
    """The images, or the sounds, below PATH/CLASS/, class by class, in the order of their names; a label is the name of
    its folder.

    Raises ValueError for a class without any, and for folders that hold both.
    """
    from datasets import ClassLabel, Dataset, Features

    folders = sorted(p for p in path.iterdir() if p.is_dir() and visible(p))
    files = {folder: sorted(p for p in folder.rglob("*") if p.is_file() and visible(p)) for folder in folders}
    kinds = {m.column: m for found in files.values() for p in found if (m := medium_of(p)) is not None}
    if len(kinds) > 1:
        first = [next(p for found in files.values() for p in found if medium_of(p) is m) for m in kinds.values()]
        told = " and ".join(f"{m.called} ({p})" for m, p in zip(kinds.values(), first, strict=True))
        raise ValueError(f"{path} holds {told}: rows are of one kind; put the others elsewhere")
    medium = next(iter(kinds.values()), IMAGES)
    rows: list[dict[str, Any]] = []
    for number, (folder, found) in enumerate(files.items()):
        mine = [p for p in found if medium_of(p) is medium]
        if not mine:
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise ValueError(f"{folder} holds no {medium.called} ({medium.listed()}); it has: {there}")
        rows += [{medium.column: {"path": str(p), "bytes": None}, "label": number} for p in mine]
    features = Features({medium.column: encoded(medium), "label": ClassLabel(names=[p.name for p in folders])})
    notes = tuple(_unread(path, medium, [p for found in files.values() for p in found]))
    return described(Dataset.from_list(rows, features=features), Source(str(path), notes=notes))


def _unread(path: Path, medium: Medium, files: Sequence[Path]) -> Iterator[str]:
    """What of such a folder is no row, though its owner may think so."""
    counted = Counter(p.suffix.lower() or p.name for p in files if medium_of(p) is not medium)
    kinds = [f"{count} {kind}" for kind, count in sorted(counted.items())]
    if kinds:
        yield f"files that are not read: {', '.join(kinds)[:200]}; {medium.called} are {medium.listed()}"
    loose = sorted(p.name for p in path.iterdir() if medium_of(p) is medium and p.is_file())
    if loose:
        yield (
            f"{medium.called} that are in no class's folder are not read: {', '.join(loose)[:200]} "
            f"({len(loose)} in all)"
        )


def encoded(medium: Medium) -> Any:
    """The feature of a column of encoded files, {bytes, path}, which nothing decodes unasked."""
    from datasets import Image, Value

    return Image(decode=False) if medium is IMAGES else {"bytes": Value("binary"), "path": Value("string")}


def named_files(rows: Dataset, column: str, medium: Medium, faults: Faults) -> Dataset:
    """The rows with a column of names of files as {bytes: None, path}: a name stands for a file relative to the one
    that holds the rows (to the working folder where none does).  Names of what is not there are faults."""
    from datasets import Dataset, Features

    source, values = source_of(rows), []
    beside = Path(source.name).parent
    for number, name in enumerate(rows[column][:]):
        path = beside / Path(name).expanduser() if isinstance(name, str) and name.strip() else None
        if path is None:
            advice = "Fill or remove these rows"
            faults.add(spot(rows, column, "is empty"), source.place(number), advice, source.key(number))
        elif not path.is_file():
            what = spot(rows, column, "names files that are not there")
            advice = f"Names are relative to {f'the file that they stand in, in {beside}' if source.lines else 'here'}"
            faults.add(what, f"{source.place(number)} names {name!r:.80}", advice, source.key(number))
            path = None
        values.append(None if path is None else {"bytes": None, "path": str(path.absolute())})
    made = Dataset.from_dict({column: values}, features=Features({column: encoded(medium)}))
    return described(made, replace(source, notes=()))
