"""What is given to be answered, as rows: texts, pairs, dicts, conversations, images, tables, files and folders."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .causal_lm import CausalLM
from .columns import named_columns
from .data import load_data, split_of
from .decoding import encoding_of, opened
from .faults import Faults
from .images import KINDS
from .readers import READERS
from .source import Source, described, sound, source_of
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = (".txt", ".text")
FILES = (*READERS, *TEXTS)
TURNS = ({"role", "content"}, {"from", "value"})


@dataclass(frozen=True)
class Question:
    """Rows as they were given, those among them without faults, and the same as a task takes them."""

    rows: Dataset
    asked: Dataset
    single: bool = False  # one thing was given, not a list of one


def question(task: Task, given: Any, trained: Collection[str] = (), faults: Faults | None = None) -> Question:
    """What `given` asks of a task: see `Restored.predict`.  `trained`: the roles that the training had.

    Raises LookupError, ValueError or TypeError with all that is wrong with it; with `faults` that skip rows, these are
    left out.
    """
    found = Faults() if faults is None else faults
    rows, single = rows_of(task, given, found)
    if not len(rows):
        raise ValueError("there are no rows to answer")
    source = source_of(rows)
    found.where = source.name
    found.of(source.name, len(rows))
    read = _read(task, rows, trained, found)
    kept = sound(rows, found)
    found.check()
    if len(kept) < len(rows):
        read = _read(task, kept, trained, Faults())
    return Question(kept, read, single)


def _read(task: Task, rows: Dataset, trained: Collection[str], faults: Faults) -> Dataset:
    """The rows as the task takes them, by the roles that the training had: a pair is a pair, and a text none."""
    columns = task.inputs(rows.column_names, faults)
    if trained and not isinstance(task, CausalLM):
        for role in (r for r in task.roles if r in trained and r not in (*task.targets, *columns)):
            looked = ", ".join(task.roles[role])
            faults.missing(
                f"the adapter was trained on rows with a {role}, and there is none here (looked for {looked}); the "
                f"columns are: {named_columns(rows.column_names)}",
                f"Name it: --column {role}=..., in Python columns={{{role!r}: ...}}",
            )
        columns = {role: column for role, column in columns.items() if role in trained}
    if faults.lookup:
        raise faults.error()
    source = source_of(rows)
    read = task.asked(described(rows.select_columns([*dict.fromkeys(columns.values())]), source), faults)
    if isinstance(task, CausalLM) and "text" in trained and "prompt" in read.column_names:
        return read.rename_column("prompt", "text")  # trained to go on, not to answer
    return read


def rows_of(task: Task, given: Any, faults: Faults) -> tuple[Dataset, bool]:
    """(what was given as rows, whether it was one thing alone)."""
    table = _table(given)
    if table is not None:
        return table, False
    if isinstance(given, Path) or (isinstance(given, str) and _is_file(given, task)):
        path = Path(given)
        single = "image" in task.roles and path.suffix.lower() in KINDS
        return (_made(task, [path]) if single else read_path(path, task, faults)), single
    if isinstance(given, str | bytes | Mapping) or _is_image(given) or is_conversation(given):
        return _made(task, [given]), True
    if not isinstance(given, Iterable):
        raise TypeError(f"predict takes {_taken(task)}; found {given!r:.80} ({type(given).__name__})")
    return _made(task, list(given)), False


def _table(given: Any) -> Dataset | None:
    """What is rows already; None for what is none."""
    from datasets import Dataset, DatasetDict

    if isinstance(given, Dataset):
        return given
    if isinstance(given, DatasetDict):
        return only(given, None)
    if type(given).__name__ == "DataFrame":
        return Dataset.from_pandas(given, preserve_index=False)
    lists = isinstance(given, Mapping) and bool(given) and all(isinstance(v, list) for v in given.values())
    if lists and not any(is_conversation(v) for v in given.values()):
        return Dataset.from_dict(dict(given))
    return None


def _taken(task: Task) -> str:
    if "image" in task.roles:
        return "an image (its path, a PIL image, its bytes), a list of these, a folder of images, or a table"
    one = "a prompt or messages" if isinstance(task, CausalLM) else "a text"
    pair = ", pairs (a, b)" if "pair" in task.roles else ""
    return f"{one}, a list of these{pair}, of dicts, a table, or the Path of a file ({', '.join(FILES)})"


def _is_file(text: str, task: Task) -> bool:
    """Whether a text is meant as the path of a file."""
    suffixes = (*FILES, *KINDS) if "image" in task.roles else FILES
    path = Path(text) if len(text) < 4096 and "\n" not in text and "\0" not in text else None
    if path is None:
        return False
    folder = "image" in task.roles and path.is_dir()
    named = path.suffix.lower() in suffixes and (" " not in text or path.is_file())
    return folder or named or text.startswith("bundled:") or (path / "dataset_dict.json").is_file()


def _is_image(value: Any) -> bool:
    return any(kind.__module__.startswith("PIL.") and kind.__name__ == "Image" for kind in type(value).__mro__)


def is_conversation(value: Any) -> bool:
    """Whether it is one conversation: a list of turns."""
    turns = isinstance(value, list | tuple) and bool(value) and all(isinstance(m, Mapping) for m in value)
    return turns and any(keys <= set(value[0]) for keys in TURNS)


def _made(task: Task, items: Sequence[Any]) -> Dataset:
    """A list as rows.  Raises TypeError where its items are of several kinds, or of one that the task does not take."""
    from datasets import Dataset

    if not items:
        raise ValueError("there are no rows to answer")
    roles = [role for role in task.roles if role not in task.targets]
    if all(isinstance(item, Mapping) for item in items):
        names = list(dict.fromkeys(name for item in items for name in item))
        return Dataset.from_dict({name: [item.get(name) for item in items] for name in names})
    if "image" in roles:
        return _images([item["image"] if isinstance(item, Mapping) else item for item in items])
    if "messages" in roles and all(is_conversation(item) for item in items):
        return Dataset.from_dict({"messages": [list(map(dict, item)) for item in items]})
    if "pair" in roles and all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        first, second = zip(*items, strict=True)
        return Dataset.from_dict({"text": list(first), "pair": list(second)}).rename_columns(
            {"text": task.roles["text"][0], "pair": task.roles["pair"][0]}
        )
    for number, item in enumerate(items, 1):
        if not isinstance(item, str):
            raise TypeError(
                f"item {number} is {item!r:.80} ({type(item).__name__}); predict takes {_taken(task)}, and a list of "
                "one kind"
            )
    role = "text" if "text" in roles and not isinstance(task, CausalLM) else roles[0]
    return Dataset.from_dict({task.roles[role][0]: list(items)})


def _images(items: Sequence[Any]) -> Dataset:
    """Paths, PIL images and bytes as a column of encoded images."""
    import io

    from datasets import Dataset, Features, Image

    def value(item: Any) -> dict[str, Any]:
        if isinstance(item, str | Path):
            if not Path(item).is_file():
                raise FileNotFoundError(f"there is no image {item}")
            return {"path": str(item), "bytes": None}
        if isinstance(item, bytes):
            return {"path": None, "bytes": item}
        if not _is_image(item):
            raise TypeError(f"{item!r:.80} ({type(item).__name__}) is no image: give its path, a PIL image or bytes")
        from PIL import ImageOps

        ImageOps.exif_transpose(item).convert("RGB").save(buffer := io.BytesIO(), "PNG")
        return {"path": None, "bytes": buffer.getvalue()}

    return Dataset.from_dict({"image": [value(i) for i in items]}, features=Features({"image": Image(decode=False)}))


def read_path(path: Path | str, task: Task, faults: Faults, split: str | None = None) -> Dataset:
    """The rows of a file, of a folder of images (classes are not needed), or of a split of what `load_data` reads."""
    place = Path(path)
    if place.suffix.lower() in TEXTS and place.suffix.lower() not in READERS and place.is_file():
        return _lines(place, task, faults)
    if "image" in task.roles and place.is_dir():
        pictures = sorted(p for p in place.rglob("*") if p.suffix.lower() in KINDS and p.is_file())
        if pictures:
            rows = _images(pictures).add_column("file", [str(p.relative_to(place)) for p in pictures])
            return described(rows, Source(str(place)))
    if place.suffix.lower() in KINDS and place.is_file():
        return described(_images([place]).add_column("file", [str(place)]), Source(str(place)))
    return only(load_data(str(path), faults), split)


def only(data: Any, split: str | None) -> Dataset:
    """The named split, or the one that there is.  Raises LookupError where there are several."""
    if split is None and len(data) > 1:
        raise LookupError(f"the data have the splits {', '.join(data)}: say which (--split, in Python data[NAME])")
    return split_of(data, split or next(iter(data)))


def _lines(path: Path, task: Task, faults: Faults) -> Dataset:
    """A text file, a row a line; blank lines are none."""

    with opened(path, encoding_of(path, faults)) as file:
        rows = [(number, line.strip("\r\n")) for number, line in enumerate(file, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} has no rows")
    source = Source(str(path), array("Q", [number for number, _ in rows]), "line")
    return described(_made(task, [text for _, text in rows]), source)


def columns_named(task: Task, columns: Mapping[str, str]) -> Task:
    """The task with its roles in these columns, {role: column}.  Raises LookupError for a role that it has not."""
    unknown = [role for role in columns if role not in task.roles]
    if unknown:
        raise LookupError(
            f"{type(task).__name__} has no column {', '.join(unknown)}; it has: {', '.join(task.roles) or 'none'}"
        )
    return replace(task, **columns) if columns else task  # type: ignore[type-var]
