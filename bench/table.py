"""Writes the table of bench/results/relatives.json into docs/choose.md, between its two markers.

python bench/table.py             # writes
python bench/table.py --check     # writes nothing; exit code 1 where the page has another table
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench/results/relatives.json", ROOT / "docs/choose.md"
BEGIN, END = "<!-- relatives: written by bench/table.py -->", "<!-- end of relatives -->"

Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["name"],
    "rung": lambda row: row["rung"] or "-",
    "parameters": lambda row: f"{row['parameters']:,}",
    "learning rate": lambda row: f"{row['lr']:g}",
    "loss, first tenth -> last tenth": lambda row: f"{row['loss_first_tenth']:.3f} -> {row['loss_last_tenth']:.3f}",
    "accuracy, before -> after": lambda row: f"{row['accuracy_before']:.3f} -> {row['accuracy']:.3f}",
    "seconds": lambda row: f"{row['seconds']:.0f}",
    "merge error": lambda row: difference(row, "merge_error"),
    "export difference": lambda row: difference(row, "export"),
}
RIGHT = ("parameters", "learning rate", "seconds")


def difference(row: Row, key: str) -> str:
    return f"{row[key]:.0e}" if key in row else "-"


def table(found: dict[str, Any]) -> str:
    """The runs as Markdown; those that failed follow as a list."""
    rule = " | ".join("---:" if name in RIGHT else "---" for name in COLUMNS)
    lines = [f"`{found['command']}`, {found['date']}: {found['machine']}, torch {found['torch']}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"| {rule} |"]
    done = [row for row in found["rows"] if "accuracy" in row]
    lines += [f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |" for row in done]
    faults = [f"- {row['name']}: {' '.join(row['fault'].split())}" for row in found["rows"] if "fault" in row]
    return "\n".join(lines + (["", "Faults:", "", *faults] if faults else []))


def written(page: str, text: str) -> str:
    """The page with `text` between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the two lines {BEGIN!r} and {END!r}, in this order")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    there = RESULTS.exists()
    text = table(json.loads(RESULTS.read_text())) if there else f"No results yet: {RESULTS.name} is not there."
    page = PAGE.read_text(encoding="utf-8")
    if args.check:
        sys.exit(0 if written(page, text) == page else f"{PAGE.name} has another table than {RESULTS.name}: run me")
    PAGE.write_text(written(page, text), encoding="utf-8")


if __name__ == "__main__":
    main()
