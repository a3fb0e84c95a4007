"""The data set wordnet-lemmas: what a dictionary says of a meaning -> the word that has it.

Debian's package wordnet-base holds WordNet 3.0 as its authors publish it; a line of data.noun is (wndb(5WN))

    offset lex_filenum ss_type w_cnt word lex_id [word lex_id ...] p_cnt [pointers ...] | gloss; "an example"

with w_cnt in hexadecimal, and the word that is used the most first.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from .apt import check_apt, download_package, unpack_package
from .asset import Asset, Progress
from .rows import Row, fingerprint, split_rows, write_rows

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
GLOSS_CHARS = (15, 120)


def build_lemmas(asset: Asset, out: Path, progress: Progress) -> None:
    """A row for each meaning whose gloss does not say the word; meanings of one word are in one split."""
    check_apt(asset, "read from a package", "use the data set 'wordnet', which comes with undula")
    with tempfile.TemporaryDirectory() as scratch:
        unpack_package(download_package(asset, Path(scratch), progress), Path(scratch) / "files")
        share = Path(scratch) / "files" / "usr" / "share"
        rows = [row for name in FILES for row in meanings((share / "wordnet" / name).read_text("latin-1").splitlines())]
        shutil.copyfile(share / "doc" / "wordnet-base" / "copyright", out / "LICENSE.txt")
    write_rows(out, split_rows(rows), asset.source)


def meanings(lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
    """(word, row) of each; what begins with two spaces is the licence."""
    for line in lines:
        if line.startswith("  "):
            continue
        told, _, gloss = line.partition(" | ")
        word = told.split(" ")[4].partition("(")[0].replace("_", " ")  # an adjective's place stands in brackets
        text = gloss.partition('; "')[0].strip()
        says = f" {fingerprint(word)} " in f" {fingerprint(text)} "
        if GLOSS_CHARS[0] <= len(text) <= GLOSS_CHARS[1] and not says:
            yield word.casefold(), {"text": text, "summary": word}
