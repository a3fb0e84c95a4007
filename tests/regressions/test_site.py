"""The site's reference and its navigation are complete."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHOWN = re.compile(r"^::: (\S+)$", re.M)
NAMES = "undula", "undula.io", "undula.starts", "undula.ranks", "undula.train"


def shown():
    """What the reference shows: the objects themselves, by whichever name a page gives them; of a package that a page
    shows as a whole, all that it exports."""
    for page in DOCS.glob("reference/*.md"):
        for path in SHOWN.findall(page.read_text(encoding="utf-8")):
            module, _, name = path.rpartition(".")
            try:
                whole = import_module(path)
                yield from (getattr(whole, public) for public in getattr(whole, "__all__", ()))
            except ModuleNotFoundError:
                yield getattr(import_module(module), name)


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_is_in_the_reference(module):
    told = {id(what) for what in shown()}
    public = import_module(module)
    missing = [n for n in public.__all__ if id(getattr(public, n)) not in told]
    assert [n for n in missing if not inspect.ismodule(getattr(public, n))] == []


def test_every_page_is_in_the_navigation():
    """mkdocs would say so when it builds; this says it in a second."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"[\w/-]+\.md", navigation))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} == listed
