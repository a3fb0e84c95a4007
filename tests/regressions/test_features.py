"""The table of features names tests that are there, and a reason wherever another tool has more."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ORDER = {"-": 0, "p": 1, "y": 2}


def rows(heading):
    """The cells of the table below a heading, header and rule left out."""
    page = (ROOT / "docs/features.md").read_text(encoding="utf-8")
    table = re.findall(r"^\|(.+)\|$", page.partition(heading)[2].partition("\n## ")[0], flags=re.M)[2:]
    return [[cell.strip() for cell in line.split("|")] for line in table]


def names_in(file):
    return {node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if hasattr(node, "name")}


def test_every_test_that_the_table_names_is_there():
    named = [pair for *_, shown in rows("# Features") for pair in re.findall(r"`([\w/]+\.py)::(\w+)`", shown)]
    assert len(named) > 30
    assert [pair for pair in named if pair[1] not in names_in(pair[0])] == []


def test_what_undula_has_is_shown_and_what_it_lacks_has_a_reason():
    reasons = dict(rows("## Where undula is behind"))
    behind = set()
    for what, *others, ours, shown in rows("# Features"):
        assert ours in ORDER, what
        assert bool(shown) == (ours != "-"), what
        if any(ORDER[cell[0]] > ORDER[ours] for cell in others):
            behind.add(what)
    assert behind == set(reasons)
    assert all(reasons.values())
