"""Rows of text on disk and in memory: cleaning, splitting, writing, reading.

A data set is a folder with train.jsonl, validation.jsonl and test.jsonl (one JSON object a line), and info.json with
the names of the columns, the names of the labels if there are any, and the hash of all rows.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .asset import AssetError

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
VALIDATION_PERCENT, TEST_PERCENT = 10, 15

Row = dict[str, Any]


def fingerprint(text: str) -> str:
    """The same for texts that differ only in case, spacing or punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def split_rows(rows: Iterable[tuple[str, Row]]) -> dict[str, list[Row]]:
    """Share (group, row) pairs out into train, validation and test; drop repeated texts (the first one stays).

    A whole group goes into one split, chosen by the hash of its name alone, and rows are put in the order of the
    hashes of their texts: neither depends on what other rows there are, or on a random generator, and the first
    n rows of a split are a fair sample of it.
    """
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    for group, row in rows:
        if (key := fingerprint(row["text"])) in seen or not key:
            continue
        seen.add(key)
        percent = int(_digest(group)[:8], 16) % 100
        test = percent < TEST_PERCENT
        validation = percent < TEST_PERCENT + VALIDATION_PERCENT
        splits["test" if test else "validation" if validation else "train"].append(row)
    return {name: sorted(split, key=lambda row: _digest(row["text"])) for name, split in splits.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_rows(folder: Path, splits: dict[str, list[Row]], origin: str, labels: list[str] | None = None) -> None:
    """Write the splits and info.json into the folder; `origin` tells people what they were made from."""
    files = []
    for name in SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in splits[name]]
        files.append("".join(lines).encode())
        (folder / f"{name}.jsonl").write_bytes(files[-1])
    counts = {name: len(splits[name]) for name in SPLITS}
    told = info(list(splits["train"][0]), labels, origin, counts, files)
    (folder / "info.json").write_text(told, encoding="utf-8")


def info(
    columns: list[str], labels: list[str] | None, origin: str, counts: dict[str, int], files: Iterable[bytes]
) -> str:
    """What info.json says of rows in these files."""
    told = {
        "columns": columns,
        "labels": labels,
        "origin": origin,
        "rows": counts,
        "sha256": hashlib.sha256(b"".join(files)).hexdigest(),  # of the three files, in the order of SPLITS
    }
    return json.dumps(told, indent=2)


def verified(folder: Path, suffix: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(info.json, {split: content of its file}); AssetError if the rows are no longer those that were written."""
    try:
        told = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        files = {name: (folder / f"{name}.{suffix}").read_bytes() for name in SPLITS}
    except (OSError, ValueError) as error:
        raise AssetError(f"{folder}: {error}.\nWhat to do: delete that folder and fetch again.") from None
    found = hashlib.sha256(b"".join(files.values())).hexdigest()
    if found != told["sha256"]:
        raise AssetError(
            f"{folder}: the rows have changed since they were written (sha256 {found}, recorded {told['sha256']}).\n"
            "What to do: delete that folder and fetch again."
        )
    return told, files


def read_rows(folder: Path) -> "datasets.DatasetDict":
    """Read the folder into memory; AssetError if its rows are no longer those that were written."""
    import datasets

    told, files = verified(folder, "jsonl")
    features = datasets.Features(
        {
            column: datasets.ClassLabel(names=told["labels"]) if column == "label" else datasets.Value("string")
            for column in told["columns"]
        }
    )
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(
                [json.loads(line) for line in content.decode().split("\n") if line], features=features
            )
            for name, content in files.items()
        }
    )
