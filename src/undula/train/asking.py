"""What is given to be answered, as rows: texts, pairs, dicts, conversations, images, tables, files and folders."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.columns import named_columns
from .data.decoding import encoding_of, opened
from .data.faults import Faults
from .data.load import load_data, split_of
from .data.media import (
    IMAGES,
    MEDIA,
    Medium,
    encoded,
    medium_of,
    visible,
)
from .data.readers import READERS
from .data.source import Source, described, sound, source_of
from .tasks.causal_lm import CausalLM
from .tasks.task import Task

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
    _check_pairs(task, given, trained)
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


def _check_pairs(task: Task, given: Any, trained: Collection[str]) -> None:
    """Raises TypeError for pairs where the training had none: the second text would not be read."""
    single = trained and "pair" in task.optional and "pair" not in trained
    for number, one in enumerate(given if single and isinstance(given, list | tuple) else (), 1):
        if isinstance(one, list | tuple):
            raise TypeError(
                f"item {number} is {len(one)} texts, and this adapter was trained on single ones: give one for each row"
            )


def _read(task: Task, rows: Dataset, trained: Collection[str], faults: Faults) -> Dataset:
    """The rows as the task takes them, by the roles that the training had: a pair is a pair, and a text none."""
    columns = task.inputs(rows.column_names, faults)
    if trained and not isinstance(task, CausalLM):
        for role in (r for r in task.optional if r in trained and r not in (*task.targets, *columns)):
            looked = ", ".join(task.roles[role])
            faults.missing(
                f"the adapter was trained on rows with a {role}, and there is none here (looked for {looked}); the "
                f"columns are: {named_columns(rows.column_names)}",
                f"Name it: --column {role}=..., in Python columns={{{role!r}: ...}}",
            )
        columns = {role: c for role, c in columns.items() if role in trained or role not in task.optional}
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
        single = medium_of(path) is not None and medium_of(path) is medium_asked(task)
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


def medium_asked(task: Task) -> Medium | None:
    """Of which kind the files are that a task asks for; None for one that asks for texts."""
    return next((MEDIA[role] for role in task.roles if role in MEDIA), None)


def _taken(task: Task) -> str:
    medium = medium_asked(task)
    if medium is not None:
        one = "an image (its path, a PIL image, its bytes)" if medium is IMAGES else "a sound (its path, its bytes)"
        return f"{one}, a list of these, a folder of {medium.called}, or a table"
    one = "a prompt or messages" if isinstance(task, CausalLM) else "a text"
    pair = ", pairs (a, b)" if "pair" in task.roles else ""
    return f"{one}, a list of these{pair}, of dicts, a table, or the Path of a file ({', '.join(FILES)})"


def _is_file(text: str, task: Task) -> bool:
    """Whether a text is meant as the path of a file."""
    medium = medium_asked(task)
    suffixes = (*FILES, *(medium.suffixes if medium else ()))
    path = Path(text) if len(text) < 4096 and "\n" not in text and "\0" not in text else None
    if path is None:
        return False
    folder = medium is not None and path.is_dir()
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
    medium = medium_asked(task)
    if medium is not None:
        return _files([_held(item, task, medium) for item in items], medium)
    if all(isinstance(item, Mapping) for item in items):
        names = list(dict.fromkeys(name for item in items for name in item))
        return Dataset.from_dict({name: [item.get(name) for item in items] for name in names})
    if isinstance(task, CausalLM) and all(is_conversation(item) for item in items):
        return Dataset.from_dict({_column(task, "messages"): [list(map(dict, item)) for item in items]})
    if "pair" in roles and all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        first, second = zip(*items, strict=True)
        return Dataset.from_dict({_column(task, "text"): list(first), _column(task, "pair"): list(second)})
    if "tokens" in roles and all(isinstance(item, list | tuple) for item in items):
        return Dataset.from_dict({task.roles["tokens"][0]: [list(item) for item in items]})
    for number, item in enumerate(items, 1):
        if not isinstance(item, str):
            raise TypeError(
                f"item {number} is {item!r:.80} ({type(item).__name__}); predict takes {_taken(task)}, and a list of "
                "one kind"
            )
    role = "text" if "text" in roles and not isinstance(task, CausalLM) else roles[0]
    return Dataset.from_dict({_column(task, role): list(items)})


def _column(task: Task, role: str) -> str:
    """What the column of a role is called: as the training's was, where that was named."""
    return getattr(task, role, None) or task.roles[role][0]


def _held(item: Any, task: Task, medium: Medium) -> Any:
    """What stands in a row for its file."""
    named = getattr(task, medium.column, None)
    columns = task.roles[medium.column] if named is None else (named,)
    return next((item[c] for c in columns if c in item), item) if isinstance(item, Mapping) else item


def _files(items: Sequence[Any], medium: Medium) -> Dataset:
    """Paths, bytes, PIL images and what `datasets` decodes files to, as a column of encoded files."""
    import io

    from datasets import Dataset, Features

    def value(item: Any) -> dict[str, Any]:
        if isinstance(item, str | Path):
            if not Path(item).is_file():
                raise FileNotFoundError(f"there is no file {item}")
            return {"path": str(item), "bytes": None}
        if isinstance(item, bytes):
            return {"path": None, "bytes": item}
        if isinstance(item, Mapping) and {"path", "bytes"} >= set(item):
            return {"path": item.get("path"), "bytes": item.get("bytes")}
        if not (medium is IMAGES and _is_image(item)):
            raise TypeError(f"{item!r:.80} ({type(item).__name__}) is none of the {medium.called}: a path or bytes")
        from PIL import ImageOps

        ImageOps.exif_transpose(item).convert("RGB").save(buffer := io.BytesIO(), "PNG")
        return {"path": None, "bytes": buffer.getvalue()}

    if all(isinstance(item, Mapping) and "array" in item for item in items):
        return Dataset.from_dict({medium.column: list(items)})
    return Dataset.from_dict(
        {medium.column: [value(i) for i in items]}, features=Features({medium.column: encoded(medium)})
    )


def read_path(path: Path | str, task: Task, faults: Faults, split: str | None = None) -> Dataset:
    """The rows of a file, of a folder of images or sounds (classes are not needed), or of a split of what `load_data`
    reads.  Raises as that does."""
    place, medium = Path(path), medium_asked(task)
    if place.suffix.lower() in TEXTS and place.suffix.lower() not in READERS and place.is_file():
        return _lines(place, task, faults)
    if medium is not None and place.is_dir() and split is None:
        found = sorted(p for p in place.rglob("*") if medium_of(p) is medium and p.is_file() and visible(p))
        if found:
            rows = _files(found, medium).add_column("file", [str(p.relative_to(place)) for p in found])
            return described(rows, Source(str(place)))
    if medium is not None and medium_of(place) is medium and place.is_file():
        return described(_files([place], medium).add_column("file", [str(place)]), Source(str(place)))
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
