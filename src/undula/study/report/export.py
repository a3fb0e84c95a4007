"""The runs and the table as CSV and Parquet.  In CSV, what is not one value is written as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...io import files
from ..outcome import Outcome
from ..table import Row

MAPS, LINES = ("others", "deployed", "deployed_error"), ("losses", "curve")


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, content)


def content(path: Path, made: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.atomic(path, lambda at: Path(at).write_bytes(made))


def runs_csv(runs: Iterable[Outcome], path: Path) -> None:
    """One line per run."""
    names = [f.name for f in dataclasses.fields(Outcome)]
    rows = [{name: _plain(getattr(run, name)) for name in names} for run in runs]
    text(path, _csv(names, rows))


def table_csv(rows: Sequence[Row], path: Path) -> None:
    """One line per arm and group."""
    flat = [row.flat() for row in rows]
    text(path, _csv(list(dict.fromkeys(name for row in flat for name in row)), flat))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return json.dumps(dict(value), sort_keys=True)
    return json.dumps(value) if isinstance(value, tuple) else value


def _csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    made = io.StringIO()
    writer = csv.DictWriter(made, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    return made.getvalue()


def runs_parquet(runs: Sequence[Outcome], path: Path) -> None:
    """One row per run, with maps and lists of (step, value) as such."""
    import pyarrow as pa
    from pyarrow import parquet

    point = pa.struct([("step", pa.int64()), ("value", pa.float64())])
    special = {name: pa.map_(pa.string(), pa.float64()) for name in MAPS} | {name: pa.list_(point) for name in LINES}
    kinds = {"str": pa.string(), "float": pa.float64(), "int": pa.int64(), "bool": pa.bool_()}
    schema = pa.schema(
        [(f.name, special.get(f.name) or kinds[str(f.type).split(" ")[0]]) for f in dataclasses.fields(Outcome)]
    )
    columns = {f.name: [_arrow(f.name, getattr(run, f.name)) for run in runs] for f in dataclasses.fields(Outcome)}
    made = pa.table(columns, schema=schema)
    files.atomic(path, lambda temporary: parquet.write_table(made, temporary))


def _arrow(name: str, value: Any) -> Any:
    if name in MAPS:
        return sorted(value.items())
    return [{"step": step, "value": v} for step, v in value] if name in LINES else value
