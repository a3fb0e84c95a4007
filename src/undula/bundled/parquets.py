"""Data sets of images or sounds on disk: train.parquet, validation.parquet and test.parquet, and info.json as in
rows.py.

An `image` or `audio` column holds encoded files, `label` the number of a class; every other column is text.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rows import SPLITS, Row, info, verified

if TYPE_CHECKING:
    import datasets

FILES = ("image", "audio")  # columns of encoded files


def write_parquet(folder: Path, splits: dict[str, list[Row]], origin: str, labels: list[str] | None = None) -> None:
    """Write the splits and info.json into the folder; files are given as bytes, labels as numbers."""
    import pyarrow
    from pyarrow import parquet

    encoded = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = list(splits["train"][0])
    for name in SPLITS:
        made = {}
        for column in columns:
            values = [row[column] for row in splits[name]]
            if column in FILES:
                made[column] = pyarrow.array([{"bytes": v, "path": None} for v in values], encoded)
            else:
                made[column] = pyarrow.array(values, pyarrow.int64() if column == "label" else pyarrow.string())
        parquet.write_table(pyarrow.table(made), folder / f"{name}.parquet", compression="none")
    counts = {name: len(splits[name]) for name in SPLITS}
    content = [(folder / f"{name}.parquet").read_bytes() for name in SPLITS]
    (folder / "info.json").write_text(info(columns, labels, origin, counts, content), encoding="utf-8")


def read_parquet(folder: Path) -> "datasets.DatasetDict":
    """Read the folder into memory; AssetError if its rows are no longer those that were written.  Images decode when
    they are asked for; a sound is {bytes, path}, as `undula.train` reads it."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    told, files = verified(folder, "parquet")
    text = datasets.Value("string")
    kinds: dict[str, Any] = {"image": datasets.Image(), "audio": {"bytes": datasets.Value("binary"), "path": text}}
    if told["labels"]:
        kinds["label"] = datasets.ClassLabel(names=told["labels"])
    about = datasets.DatasetInfo(features=datasets.Features({c: kinds.get(c, text) for c in told["columns"]}))
    tables = {name: parquet.read_table(pyarrow.BufferReader(content)) for name, content in files.items()}
    return datasets.DatasetDict({name: datasets.Dataset(table, info=about) for name, table in tables.items()})
