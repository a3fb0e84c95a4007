"""Whose a directory is, what a training that ended early has left in it, and how to go on."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..io import files
from ..penalties.penalty import Penalty
from . import processes
from .run import (
    CHECKPOINTS,
    CONFIG,
    REPORT,
    RUN,
    Run,
    read_run,
)

EVALUATIONS = "undula_evaluations"  # under which name checkpoints know what was the best so far
STATE = "allocator.json"  # of an allocator, see `integrations.callback`


def claim(run: Run, resume: bool) -> None:
    """Refuses a directory that holds a run already or files that a run would overwrite, or with `resume` no run; and
    one where nothing can be written, before anything is computed."""
    _check_writable(run.out)
    if resume:
        read_run(run.out)
        if (run.out / REPORT).is_file():
            raise FileExistsError(f"the run in {run.out} is finished: its report is {run.out / REPORT}")
    elif (run.out / RUN).is_file() or (run.out / "adapter_config.json").is_file():
        again = "" if (run.out / REPORT).is_file() else f" resume it ({resume_command(run.out)}), or"
        raise FileExistsError(f"{run.out} holds a run already:{again} name another directory")
    elif foreign := [name for name in (REPORT, CONFIG, CHECKPOINTS, files.TENSORS) if (run.out / name).exists()]:
        raise FileExistsError(
            f"{run.out} holds {', '.join(foreign)} of something else, which this run would overwrite: name another"
        )


def _check_writable(out: Path) -> None:
    """Raises FileExistsError or PermissionError for a place where no directory can be made or written to."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists() or place.is_symlink())
    if not there.is_dir():
        raise FileExistsError(f"{there} is a file, so {out} can be no directory: name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing can be written to {there}: name another directory, or mend its permissions")


def left_behind(out: Path) -> str:
    """What a training that ended at once has left, in a line."""
    run = read_run(out)["run"] if (out / RUN).is_file() else None
    checkpoint = None if run is None else last_checkpoint(out, _accompanied(run))
    if checkpoint is not None:
        done, asked, _ = progress(checkpoint)
        return f"stopped at once; step {done} of {asked} is kept: go on with {resume_command(out)}"
    if run is not None:
        return f"stopped before a checkpoint: nothing that was trained is kept; begin again with {resume_command(out)}"
    return f"stopped before the training began: nothing is kept, nothing was written to {out}"


def _accompanied(run: Mapping[str, Any]) -> bool:
    """Whether a run's checkpoints hold the state of an allocator or a penalty."""
    found = [Penalty.decode(each) for each in run.get("penalty", ())]
    return run.get("allocator") is not None or any(p.active for p in found)


def resume_command(out: Path) -> str:
    """What to type to go on with a run, on as many processes as there are."""
    return f"{processes.launcher()}undula train --resume {shlex.quote(str(out))}"


def last_checkpoint(out: Path, allocated: bool = False) -> Path | None:
    """The latest complete checkpoint of a run: one whose writing a kill did not cut off."""
    found = [p for p in (out / CHECKPOINTS).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2])):
        if _complete(path) and (not allocated or (path / STATE).is_file()):  # the allocator's comes last
            return path
    return None


def processes_of(path: Path) -> int | None:
    """How many processes wrote a checkpoint: each leaves its random generators."""
    return len(list(path.glob("rng_state*.pth"))) or None


def progress(path: Path) -> tuple[int, int, list[Any]]:
    """(steps done, steps in all, log) of a checkpoint."""
    state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"], state["max_steps"], state["log_history"]


def evaluated(path: Path) -> dict[str, Any]:
    """What the evaluations up to a checkpoint have found, see `evaluating.Evaluations`."""
    state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = (state.get("stateful_callbacks") or {}).get(EVALUATIONS) or {}
    return found


def _complete(path: Path) -> bool:
    """The Trainer writes its own state last: where that is whole, all is."""
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (path / files.CONFIG).is_file() and (path / files.TENSORS).is_file()  # rotation deletes in any order


def check_processes(out: Path, checkpoint: Path) -> None:
    """Raises FileNotFoundError where this process does not see the checkpoint, ValueError where others wrote it."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is not seen by each process: {out} has to be a directory that all share")
    wrote = processes_of(checkpoint)
    if wrote not in (None, processes.count()):
        raise ValueError(
            f"the run in {out} trains on {wrote} processes, and {processes.count()} were started: a step would be of "
            "other rows. Go on with as many: "
            + (f"torchrun --nproc-per-node {wrote} -m " if wrote != 1 else "")
            + f"undula train --resume {shlex.quote(str(out))}"
        )
