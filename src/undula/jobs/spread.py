"""Jobs spread over Ray's workers, each of which packs its share."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.extras import needs
from ..io.whole import alone_in
from ..train.recipe import Recipe
from ..train.run import REPORT, Run
from .checks import check, faults_of
from .ending import remembered
from .job import FAILED, Job
from .many import Many, runs_of, summary
from .place import WORKERS
from .view import Silent, View

TRIES = 2  # of a share whose worker dies: from its last checkpoints, by another worker
STORE = 100 * 2**20  # bytes of a local Ray's objects: of jobs nothing but words passes through it


@needs("ray")
def train_spread(
    jobs: str | Path | Mapping[str, Recipe],
    out: str | Path,
    *,
    workers: int = 2,
    cpus: float = 1.0,
    resume: bool = False,
    budget: int | None = None,
    view: View | None = None,
) -> dict[str, Job]:
    """What `undula.train_many` does, by `workers` tasks of Ray's, which each ask for `cpus`.  OUT is a directory that
    all of them see; `budget` is each worker's.  Which jobs share a worker depends on their names and order alone, so a
    resumed training packs them as before.  A worker that dies loses no job of another, and a new one goes on with its
    jobs once; where that dies too they have failed, and `resume` goes on with them.

    Uses the Ray that this process is connected to, or that RAY_ADDRESS names, or starts a local one. Raises and returns
    what `train_many` does.
    """
    import ray

    runs, out, view = runs_of(jobs, Path(out).resolve(), resume, faults_of), Path(out).resolve(), view or Silent()
    check(runs)
    shares = shared(list(runs), workers)
    began = time.perf_counter()
    with alone_in(out), _connected(workers, cpus):
        worker = ray.remote(num_cpus=cpus, max_retries=0)(_train)

        def begun(i: int, resume: bool) -> Any:
            share = {name: runs[name] for name in shares[i]}
            return worker.remote(share, out / WORKERS / str(i), resume, budget)

        asked, tries = {begun(i, resume): i for i in range(len(shares))}, Counter(range(len(shares)))
        made: dict[str, Job] = {}
        while asked:
            (done, *_), _ = ray.wait(list(asked))
            i = asked.pop(done)
            if (why := _died(ray, done)) and tries[i] < TRIES:
                tries[i] += 1
                view.said(f"the worker of {', '.join(shares[i])} has died, another goes on with them: {why}")
                asked[begun(i, True)] = i
                continue
            made |= _ended(ray, done, [runs[name] for name in shares[i]], view)
    found = {name: made[name] for name in runs}
    summary(out, found, time.perf_counter() - began, {"workers": shares})
    return found


@contextlib.contextmanager
def _connected(workers: int, cpus: float) -> Iterator[None]:
    """Within, there is a Ray: the one that is, that RAY_ADDRESS names, or one of this machine for as long."""
    import ray

    if ray.is_initialized():
        yield
        return
    local = {
        "num_cpus": max(1, math.ceil(workers * cpus)), "include_dashboard": False, "_node_ip_address": "127.0.0.1",
        "object_store_memory": STORE,
    }  # fmt: skip
    ray.init(log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else local))
    try:
        yield
    finally:
        ray.shutdown()


def shared(names: Sequence[str], workers: int) -> list[list[str]]:
    """The names in as many parts as there are workers, none of them empty, as even as they can be."""
    if workers < 1:
        raise ValueError(f"jobs are spread over 1 worker or more, found {workers}")
    return [list(names[i::workers]) for i in range(min(workers, len(names)))]


def _train(runs: Mapping[str, Run], place: Path, resume: bool, budget: int | None) -> dict[str, tuple[str, str | None]]:
    """In a worker: {job: (state, error)}.  What it measures lies in `place`, the jobs themselves where they belong."""
    with alone_in(place):
        found = Many(runs, place, resume, budget, Silent()).run()
    return {name: (job.state, job.error) for name, job in found.items()}


def _died(ray: Any, done: Any) -> str:
    """Why a worker is no more; empty where it has come to an end of its own, an error of its code too."""
    try:
        ray.get(done)
    except ray.exceptions.RayTaskError:
        return ""
    except ray.exceptions.RayError as error:
        return _words(error)
    return ""


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def _ended(ray: Any, done: Any, runs: Sequence[Run], view: View) -> dict[str, Job]:
    """The jobs of a worker that came to an end, whatever end that was."""
    try:
        told = ray.get(done)
    except ray.exceptions.RayError as error:
        told = {run.out.name: (FAILED, f"its worker ended: {_words(error)}") for run in runs}
    made = {}
    for run in runs:
        job = made[run.out.name] = Job(run.out.name, run)
        if (run.out / REPORT).is_file():
            remembered(job)
        else:
            job.state, job.error = told[job.name]
        view.ended(job)
    return made
