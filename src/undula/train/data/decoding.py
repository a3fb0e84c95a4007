"""The bytes of a text file as text: UTF-8, or what a byte order mark or its owner says; nothing is guessed."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .faults import Faults

MARKS = (  # the longer ones first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
COMMON = ("cp1252", "iso8859-1", "iso8859-15", "cp1250", "cp1251", "mac_roman", "shift_jis", "gb18030", "utf-16-le")
HEAD = 4096  # bytes by which UTF-16 without a mark is recognised
LOOKED_AT = "undula.looked-at"  # how a file is read on whose encoding is a fault, for its other faults to be told too


def _looked_at(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error(LOOKED_AT, _looked_at)


def text_encoding(name: str) -> str:
    """The name of an encoding of texts as it is usually written.  Raises LookupError for what is none."""
    try:
        found = codecs.lookup(name)
        "".encode(name)  # there are codecs of bytes too, as of gzip
    except (LookupError, ValueError):
        raise LookupError(
            f"no encoding is called {name!r}; some are: {', '.join(COMMON)} (docs.python.org, codecs, lists all)"
        ) from None
    return found.name


def encoding_of(path: Path, faults: Faults) -> str:
    """The encoding of a text file: what its first bytes say; else `faults.encoding`, where that is given and the file
    is not UTF-8 beyond ASCII; else UTF-8.  Lines that are not of it are a fault of the file, whoever reads on; raises
    ValueError where nobody could."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    marked = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if marked in ("utf-16", "utf-32"):
        return marked
    if faults.encoding is not None and marked is None and not _is_utf8(path):
        return _as_said(path, faults)
    if head.count(b"\0") * 3 > len(head):
        what = f"{path} seems to be UTF-16 or UTF-32 without a byte order mark (it is full of bytes 0)"
        faults.add(what, advice=_advice("utf-16-le"))
        raise faults.error()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                around = line[max(0, error.start - 10) : error.start + 10].decode("cp1252", "replace").strip()
                place = f"line {number} has the byte 0x{line[error.start]:02x} ({around!r} if it is Windows-1252)"
                faults.add(f"{path} is not UTF-8", place, _advice("cp1252"))
    return marked or "utf-8"


def _is_utf8(path: Path) -> bool:
    """Whether a file is UTF-8 and more than ASCII, which hardly any text in another encoding is."""
    more = False
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return False
            more = more or not line.isascii()
    return more


def _as_said(path: Path, faults: Faults) -> str:
    """The encoding that was said, where the file is of it.  Raises ValueError."""
    encoding, read = str(faults.encoding), 0
    try:
        with path.open(encoding=encoding, newline="") as file:
            for line in file:
                if "\0" in line:
                    raise UnicodeError("it is full of characters 0, as UTF-16 is")
                read += 1
    except UnicodeError as error:
        faults.add(f"{path} is not {encoding}", f"line {read + 1} or later: {error!s:.150}", "Say another encoding")
        raise faults.error() from None
    return encoding


def _advice(encoding: str) -> str:
    return (
        f"Say which encoding it is, where you know: --encoding {encoding} (of train; in Python Run(..., "
        f"encoding={encoding!r})); or save it as UTF-8: in a spreadsheet 'CSV UTF-8'"
    )


@contextmanager
def opened(path: Path, encoding: str, newline: str = "") -> Iterator[TextIO]:
    """The text of a file, its line ends as they are.  Raises ValueError for bytes that are not of that encoding."""
    try:
        errors = LOOKED_AT if encoding.startswith("utf-8") else "strict"  # `encoding_of` has seen that it is UTF-8
        with path.open(encoding=encoding, errors=errors, newline=newline) as file:
            yield file
    except UnicodeError as error:
        raise ValueError(f"{path} is not the {encoding} that its first bytes say: {error}") from None


def assumed(encoding: str) -> tuple[str, ...]:
    """What is worth telling of an encoding."""
    return () if encoding in ("utf-8", "utf-8-sig") else (f"read as {encoding.upper()}",)
