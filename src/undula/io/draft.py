"""Files that are complete or not there, whoever else writes and whenever it is killed.

A file is written as a draft under a hidden name beside its place, flushed to the disk and renamed.  While its writer
lives a draft is locked; one that is not was left by a kill, and the next writer of that file removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Self

try:
    import fcntl
except ImportError:  # Windows: no such locks
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = " (make room there, or write elsewhere)"
FORGOTTEN = 24 * 3600.0  # where there are no locks, a draft that is a day old has no writer


class Draft:
    """A new file for `path`, open as `file`.  `place` puts it there; left without that, nothing has happened.

    Its mode is that of the file it replaces, else what the umask leaves.
    """

    def __init__(self, path: Path):
        self.path, self.placed = path, False
        while True:
            self.name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            # a mode given here is cut by the umask, which no thread-safe call could ask for
            handle = os.open(self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            if _locked(handle, wait=True) and os.fstat(handle).st_nlink:
                break
            os.close(handle)  # taken for a leftover in the moment before it was locked
        self.file = os.fdopen(handle, "w+b")
        with contextlib.suppress(FileNotFoundError):
            os.chmod(self.name, stat.S_IMODE(os.stat(path).st_mode))

    def flush(self) -> None:
        """What was written is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def place(self) -> None:
        """Renames it to `path`, which is from now on this file."""
        os.replace(self.name, self.path)
        self.placed = True
        sync(self.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            named(error, self.path)
        if not self.placed:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.name)
        with contextlib.suppress(OSError):  # a full disk was told by `flush` already
            self.file.close()


def named(error: OSError, path: Path) -> None:
    """Has an error say where it was: a full disk says no name.  And what to do where that is known."""
    error.filename = str(path)
    if error.errno in FULL and not str(error.strerror).endswith(ROOM):
        error.strerror = f"{error.strerror or os.strerror(error.errno)}{ROOM}"


def atomic(path: Path, produce: Callable[[str], object]) -> None:
    """`produce` writes the file that it is given; then this is `path`, which is complete or not there."""
    clean(path)
    with Draft(path) as draft:
        produce(str(draft.name))
        draft.flush()
        draft.place()


def filled(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """`fill` writes into the open file that it is given; then this is `path`, which is complete or not there."""
    clean(path)
    with Draft(path) as draft:
        fill(draft.file)
        draft.flush()
        draft.place()


def write_text(path: Path, text: str) -> None:
    """Writes a text: complete or not at all."""
    filled(path, lambda file: file.write(text.encode("utf-8")))


def clean(path: Path) -> None:
    """Removes drafts of `path` whose writers were killed."""
    for left in path.parent.glob(f".{_literal(path.name)}.*"):
        with contextlib.suppress(OSError):  # another process was faster, or may and we may not
            handle = os.open(left, os.O_RDWR)
            try:
                if _locked(handle, wait=False) and (fcntl or time.time() - os.fstat(handle).st_mtime > FORGOTTEN):
                    os.unlink(left)
            finally:
                os.close(handle)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _locked(handle: int, wait: bool) -> bool:
    """Takes the lock of an open file, which ends with it.  False: somebody else has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: a writer goes on, a cleaner leaves what it finds
        return wait
    return True


def _literal(name: str) -> str:
    """A name for `glob`."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
