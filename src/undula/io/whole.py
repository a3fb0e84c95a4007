"""Folders that are whole or not there: written under another name beside their place, renamed at the end."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from .draft import named, sync

UNFINISHED = ".unfinished-"
NO_LOCKS = -1
FORGOTTEN = 7 * 24 * 3600.0  # seconds after which a folder counts as left over where nothing can be locked


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write into; it becomes `path` when the context ends without an error.

    Whatever happens in between, `path` is not there or has all of it.  What dead processes left beside it is removed:
    each folder is locked while its process lives.  Raises FileExistsError where `path` holds something,
    OSError that names it where nothing can be written.
    """
    place = path.resolve()
    refuse_full(place, path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent)
        folder, lock = _locked(place.parent, place.name)
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {error.strerror or error}") from None
    try:
        yield folder
        for file in folder.rglob("*"):
            sync(file)
        refuse_full(place, path)
        if place.is_dir():
            place.rmdir()  # empty; os.replace does not take its place everywhere
        os.replace(folder, place)
        sync(place.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if (told := _told(error, folder, path)) is error:
            raise
        raise told from error
    finally:
        _unlock(lock)


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A folder in `parent`, for this user alone, until the context ends; a kill leaves it to the next that asks."""
    sweep(parent)
    folder, lock = _locked(parent, name, 0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _told(error: BaseException, folder: Path, path: Path) -> BaseException:
    """An error with the place that was asked for where it says none, or the hidden one; what other libraries say of a
    disk, which name no place either, as an OSError."""
    if isinstance(error, OSError):
        if error.errno and str(error.filename or folder).startswith(str(folder)):
            named(error, path)
        return error
    if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
        return error
    told = OSError(int(number[1]), os.strerror(int(number[1])))
    named(told, path)
    return told


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within, no other process is in the folder, which is made; a kill lets go of it.  Raises BlockingIOError where
    another is."""
    folder.mkdir(parents=True, exist_ok=True)
    if (lock := _lock(folder)) is None:
        raise BlockingIOError(
            f"another process is at work in {folder}: wait until it has ended, or name another directory"
        )
    try:
        yield
    finally:
        _unlock(lock)


def refuse_full(place: Path, called: Path) -> None:
    """Raises FileExistsError where `place` is a file or a folder that holds something."""
    if place.is_dir():
        if any(place.iterdir()):
            raise FileExistsError(f"{called} is not empty: name another directory")
        if place == Path.cwd():
            raise FileExistsError(f"{called} is the directory that you are in: name one below it, or another")
    elif os.path.lexists(place):
        raise FileExistsError(f"{called} is a file, not a directory: name another")


def sweep(parent: Path) -> None:
    """Removes the folders in `parent` that processes which are no more have left unfinished."""
    for folder in parent.glob(f"{UNFINISHED}*"):
        lock = _lock(folder)
        if lock is None or (lock == NO_LOCKS and time.time() - folder.stat().st_mtime < FORGOTTEN):
            continue
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            _unlock(lock)


def _locked(parent: Path, name: str, mode: int = 0o777) -> tuple[Path, int]:
    """A new folder in `parent`, and its lock."""
    while True:
        folder = parent / f"{UNFINISHED}{name}-{secrets.token_hex(4)}"
        folder.mkdir(mode)  # with the modes of the umask, which those of `tempfile` are not
        lock = _lock(folder)
        if lock is not None and folder.is_dir():
            return folder, lock  # else another process swept it between the two lines


def _lock(folder: Path) -> int | None:
    """An exclusive lock on a folder, as long as this process lives: None while another process has it, NO_LOCKS where
    the system or the file system cannot lock folders."""
    try:
        import fcntl
    except ImportError:
        return NO_LOCKS
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None  # gone, or another user's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return None if isinstance(error, BlockingIOError) else NO_LOCKS
    return handle


def _unlock(lock: int) -> None:
    if lock != NO_LOCKS:
        os.close(lock)
