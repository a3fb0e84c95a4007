"""How the programs beside this one keep their figures, one JSON file with date, machine, command and torch, and tell
them."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def record(path: Path, figures: dict[str, Any], command: str = "") -> None:
    """Writes PATH whole or not at all.  `command` where the words of this process are not those that repeat it.  Where
    `targets_met` says it of several aims, they stand under `met`, and it is whether all are.  `commands` are all those
    that have made its rows, where one was not enough."""
    if isinstance(each := figures.get("targets_met"), dict):
        figures = {**figures, "met": each, "targets_met": bool(each) and all(each.values())}
    command = command or " ".join(["python", *sys.argv])
    earlier = [each for each in _before(path, figures) if each != command]
    head = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        **({"commands": [*earlier, command]} if earlier else {}),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(head | figures, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _before(path: Path, figures: dict[str, Any]) -> list[str]:
    """The commands that made the rows which PATH holds, where `figures` go on from those."""
    found = json.loads(path.read_text(encoding="utf-8")) if "rows" in figures and path.is_file() else {}
    rows = json.loads(json.dumps(figures.get("rows", [])))
    if not found.get("rows") or found["rows"] != rows[: len(found["rows"])]:
        return []
    return list(found.get("commands", [found["command"]]))


def kept(path: Path | None, how: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that PATH holds; none where there is no file.  Raises ValueError where they were made otherwise."""
    if path is None or not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(how))  # as JSON has it: lists, and keys that are texts
    if odd := [name for name, value in wanted.items() if found.get(name) != value]:
        raise ValueError(
            f"{path} was made with other {', '.join(odd)} ({[found.get(k) for k in odd]}): name another file, or folder"
        )
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def once(path: Path, how: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What `make` gives, made once and kept in PATH, whole or not at all.  Raises ValueError where what PATH holds was
    made otherwise."""
    if not path.is_file():
        record(path, {**how, "rows": [make()]})
    return kept(path, how)[0]


def tell(targets: Mapping[str, float], met: Mapping[str, bool]) -> None:
    """Prints of each aim whether it is met, and what was measured."""
    for what, value in targets.items():
        print(f"{'met   ' if met[what] else 'MISSED'} {what}: {value:.3g}", flush=True)


def mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error
