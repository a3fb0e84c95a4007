"""The documentation is complete and points to what is there."""

import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import undula
from undula.core.choice import plain
from undula.ranks import Allocator
from undula.starts import Start

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def ours(registry):
    """The classes that undula itself registers (other tests register some of their own)."""
    return sorted({c for c in registry.values() if c.__module__.startswith("undula.")}, key=lambda c: c.__name__)


def headings(page: Path) -> list[str]:
    without_code = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    return re.findall(r"^#+ +(.+?)\s*$", without_code, flags=re.M)


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: lower case, spaces to hyphens, punctuation gone."""
    kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
    return "".join(kept).replace(" ", "-")


def links(page: Path) -> list[str]:
    """Relative links and images, those in code left out."""
    found = [a or b for a, b in LINK.findall(CODE.sub("", text_of(page)))]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("method", ours(undula.Method.registry), ids=lambda m: m.__name__)
def test_every_method_has_a_page(method):
    page = DOCS / "methods" / f"{plain(method.__name__)}.md"
    assert page.is_file()
    assert re.match(rf"# {method.__name__}\b", text_of(page))
    rung = re.search(r"^\| Rung \| (.+?) \|$", text_of(page), flags=re.M)
    assert rung is not None
    assert method.rung() in rung[1] or issubclass(method, undula.core.wrapper.Wrapper)
    grade = re.search(r"^\| Grade \| (\w+)", text_of(page), flags=re.M)
    assert grade is not None
    assert grade[1] == method.grade


def test_every_page_is_in_the_index():
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "index.md")}
    assert [str(p.relative_to(DOCS)) for p in PAGES if p.resolve() not in linked | {DOCS / "index.md"}] == []


def test_every_start_has_a_section():
    told = {plain(h) for h in headings(DOCS / "starts.md")}
    assert [s.__name__ for s in ours(Start.registry) if plain(s.__name__) not in told] == []


def test_every_allocator_has_a_section():
    told = {plain(h) for page in ("allocators.md", "restarts.md") for h in headings(DOCS / page)}
    assert [a.__name__ for a in ours(Allocator.registry) if plain(a.__name__) not in told] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_point_to_what_is_there(page):
    wrong = []
    for link in links(page):
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = {anchor(h) for h in headings(target)} if fragment and target.is_file() else set()
        if not target.exists() or (fragment and fragment not in known):
            wrong.append(link)
    assert wrong == []


def test_the_table_of_runs_is_that_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "bench/table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
