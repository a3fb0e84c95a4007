"""The directories of jobs: what may be begun or gone on with there, by what OUT/jobs.json says that was asked for."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..io import files
from ..train.doubts import finite
from ..train.resume import claim
from ..train.run import REPORT, RUN, Run

SUMMARY, VERSION = "jobs.json", 1  # in OUT
WORKERS = "workers"  # in OUT: what Ray's workers say


def check_place(run: Run, resume: bool) -> None:
    """Refuses a directory as `undula train` does.  With `resume` one where another job than this began, but none where
    it has ended or not begun.  Raises FileExistsError, PermissionError, ValueError."""
    if not (resume and (run.out / RUN).is_file()):
        try:
            claim(run, False)
        except FileExistsError:
            if (run.out / RUN).is_file():  # one such directory is no job's that `undula train` may go on with
                raise FileExistsError(
                    f"{run.out} holds a run already: go on with the jobs there (--resume), or name another --out"
                ) from None
            raise
        return
    before, now = _asked(run.out), as_asked(run)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)] if before else ()
    if changed:
        told = "; ".join(f"{name} was {before.get(name)!r:.60} and is {now.get(name)!r:.60}" for name in changed)
        raise ValueError(f"{run.out} holds another job than this: {told}. A job goes on as it began")
    if not (run.out / REPORT).is_file():
        claim(run, True)
    elif not os.access(run.out, os.W_OK):
        raise PermissionError(f"nothing can be written to {run.out}: mend its permissions")


def as_asked(run: Run) -> dict[str, Any]:
    """A job as it was asked for, before its data told classes and its model what it needs."""
    found: dict[str, Any] = json.loads(json.dumps(finite(run.encode())))  # lists for tuples
    return found


def _asked(out: Path) -> dict[str, Any]:
    """What the summary says that the job in `out` was asked for; nothing where there is no such word."""
    path = out.parent / SUMMARY
    if not path.is_file():
        return {}
    stamp = path.stat()
    found = _summary(path, stamp.st_mtime_ns, stamp.st_size).get(out.name, {}).get("run")
    return dict(found) if isinstance(found, Mapping) else {}


@functools.lru_cache(maxsize=1)
def _summary(path: Path, *_: int) -> dict[str, Any]:
    """The jobs of a summary, which is read once for all of them."""
    return dict(told_in(path).get("jobs", {}))


def told_in(path: Path) -> dict[str, Any]:
    """What a summary says; nothing where there is none, or one of another version.  Raises ValueError for one that is
    broken."""
    if not path.is_file():
        return {}
    advice = f"What was trained lies in the jobs' own directories: delete {path}, and they go on"
    try:
        data = files.parsed(path.read_bytes(), str(path))
    except ValueError as error:
        raise ValueError(f"{error}. {advice}") from None
    if data.get("version") != VERSION:
        return {}
    jobs, tried = data.get("jobs"), data.get("tried") or []
    if not (isinstance(jobs, dict) and all(isinstance(job, dict) for job in jobs.values()) and isinstance(tried, list)):
        raise ValueError(f"{path} is no summary of jobs. {advice}")
    return data
