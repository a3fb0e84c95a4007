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
    digest = hashlib.sha256()
    for name in SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in splits[name]]
        content = "".join(lines).encode()
        digest.update(content)
        (folder / f"{name}.jsonl").write_bytes(content)
    info = {
        "columns": list(splits["train"][0]),
        "labels": labels,
        "origin": origin,
        "rows": {name: len(splits[name]) for name in SPLITS},
        "sha256": digest.hexdigest(),  # of the three files, in the order of SPLITS
    }
    (folder / "info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")


def read_rows(folder: Path) -> "datasets.DatasetDict":
    """Read the folder into memory; AssetError if its rows are no longer those that were written."""
    import datasets

    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    files = {name: (folder / f"{name}.jsonl").read_bytes() for name in SPLITS}
    found = hashlib.sha256(b"".join(files.values())).hexdigest()
    if found != info["sha256"]:
        raise AssetError(
            f"{folder}: the rows have changed since they were written (sha256 {found}, recorded {info['sha256']}).\n"
            "What to do: delete that folder and fetch again."
        )
    features = datasets.Features(
        {
            column: datasets.ClassLabel(names=info["labels"]) if column == "label" else datasets.Value("string")
            for column in info["columns"]
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
