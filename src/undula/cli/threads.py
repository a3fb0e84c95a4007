"""How many threads a verb computes with: as many as there are physical cores that this process may use.

torch takes all that it sees: on half of a machine's hyper-threads they take each other's units, and in a container with
a quota they wait for each other.  What somebody has said stands: OMP_NUM_THREADS, torch.set_num_threads, --threads.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

SAID = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SYSTEM, PROCESS = Path("/sys"), Path("/proc/self")
THREADS = Annotated[
    int | None,
    typer.Option(
        "--threads",
        help="Of the computation. (default: OMP_NUM_THREADS, else the physical cores that it may use)",
        metavar="N",
        min=1,
    ),
]


def threaded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with --threads, which one that has it already sets itself."""
    signature = inspect.signature(verb, eval_str=True)
    own = "threads" in signature.parameters

    @functools.wraps(verb)
    def run(*args: Any, **options: Any) -> None:
        settle(None if own else options.pop("threads", None))
        verb(*args, **options)

    option = inspect.Parameter("threads", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=THREADS)
    more = [] if own else [option]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])  # type: ignore[attr-defined]
    return run


def settle(asked: int | None = None) -> None:
    """Sets torch's threads: to what is `asked`; else to `sensible`, where neither the environment nor a program that
    called this one has said how many."""
    import torch

    if asked is not None:
        torch.set_num_threads(asked)
    elif not any(os.environ.get(name) for name in SAID) and torch.get_num_threads() in _untouched():
        torch.set_num_threads(sensible())


def sensible() -> int:
    """Physical cores among those that this process may use, and no more than its quota of time is worth."""
    usable = _usable()
    return max(1, min([len({_core(cpu) for cpu in usable}), *(max(1, math.floor(q)) for q in _quotas())]))


def _untouched() -> set[int]:
    """What torch begins with: all that may be used, or their half."""
    usable = _usable()
    return {len(usable), os.cpu_count() or 1, len({_core(cpu) for cpu in usable})}


def _usable() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core(cpu: int) -> tuple[str, str]:
    """Which core of which socket a logical one belongs to; itself where nobody says."""
    place = SYSTEM / f"devices/system/cpu/cpu{cpu}/topology"
    try:
        socket, core = ((place / name).read_text().strip() for name in ("physical_package_id", "core_id"))
        return socket, core
    except OSError:
        return "", str(cpu)


def _quotas() -> Iterator[float]:
    """How many CPUs' time the control groups around this process grant, where they limit it."""
    for line in _lines(PROCESS / "cgroup"):
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kinds and "cpu" not in kinds.split(","):
            continue
        root = SYSTEM / ("fs/cgroup/cpu" if kinds else "fs/cgroup")
        # a container sees its own group as the root, whatever the path says
        for place in {root, *(root / p for p in (path.strip("/"), *map(str, Path(path.strip("/")).parents)))}:
            with contextlib.suppress(OSError, ValueError, IndexError, ZeroDivisionError):
                if kinds:
                    found = [int((place / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period")]
                else:
                    found = [int(word) for word in (place / "cpu.max").read_text().split()]  # "max" is no number
                if found[0] > 0:
                    yield found[0] / found[1]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
