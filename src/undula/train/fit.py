"""train(run): the verb."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.calls import called
from ..core.extras import needs
from ..core.turns import turn
from . import processes
from .base import model_folder
from .begun import BASES
from .concluding import concluded, course_of, with_best
from .look import check_course
from .measure import PeakMemory, files_digest, rows_digest
from .prepared import Prepared, prepare
from .recipe import Recipe
from .reporting import reporters
from .resume import (
    EVALUATIONS,
    check_processes,
    claim,
    evaluated,
    last_checkpoint,
    progress,
    resume_command,
)
from .run import Run, read_run
from .stages import stage
from .tasks.task import Examples
from .tuning import with_rate

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Interrupted(RuntimeError):
    """The training was stopped, and can be resumed."""


@called("undula.train(undula.Run(model=..., data=..., task=..., method=undula.LoRA(), out=...))")
@needs("train")
@turn()
def train(
    run: Run,
    *,
    resume: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    begins: Callable[[Prepared], None] | None = None,
    report_to: str | Iterable[str] = (),
) -> dict[str, Any]:
    """Trains an adapter with `transformers.Trainer`, saves it in `run.out`, and returns the report (OUT/report.json).

    With `resume`, goes on from the last complete checkpoint of `run.out` (from the beginning if there is none): the
    result is the same to the bit as without the interruption.  A callback may end the training (early stopping): then
    what there is is the result.  `begins` is called with what is in memory, before anything is measured.  `report_to`
    names what hears of losses and evaluations beside the report ("tensorboard": OUT/logs; "wandb", "mlflow" ...).

    Raises Interrupted after Ctrl-C (a checkpoint is saved), Diverged after the report where a number is not finite,
    FileExistsError when `run.out` holds a run already, ValueError when its data or model have changed, LookupError,
    ValueError or FileNotFoundError for bad input.

    Where torchrun started several processes, all call this: each step is of `run.batch` rows in each, the first process
    measures and writes, and all return the same report.  Raises RuntimeError where they cannot be joined.
    """
    begun = time.perf_counter()
    if not isinstance(run, Run):
        what = "a recipe that says no place: Run.of(recipe, out)" if isinstance(run, Recipe) else f"{run!r:.80}"
        raise TypeError(f"train takes a Run(model=..., data=..., task=..., method=..., out=...); found {what}")
    processes.join()
    services = reporters(report_to, run.out)
    processes.by_first(lambda: claim(run, resume))
    with PeakMemory() as memory:
        ready = processes.first_then_all(lambda: prepare(run))
        if begins is not None:
            processes.by_first(lambda: begins(ready))
        check_course(ready)
        ready, tuned = with_rate(ready, resume)
        before = processes.by_first(lambda: measured_before(ready, resume, tuned))
        ready, course = _fit(ready, resume, itertools.chain(services, callbacks))
        return concluded(ready, before, course, memory, begun)


def measured_before(ready: Prepared, resume: bool, tuned: Mapping[str, Any] | None = None) -> dict[str, float]:
    """The metric before training: from run.json where an earlier start measured it.  tuned: how the rate was found."""
    told = read_run(ready.run.out) if resume else {}
    tuned = told.get("tuned", tuned)
    digest = _digest(ready)
    changed = [name for name, made in told.get("digest", digest).items() if digest.get(name) != made]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: not what the run in {ready.run.out} began with. Its rest would be trained and "
            "measured on something else: put it back, or begin another run"
        )
    if told.get("before") is not None:
        return told["before"]
    ready.run.save(None, digest, tuned=tuned)
    with stage("measuring before", len(ready.held)):
        found = ready.run.task.score(ready.model, ready.held, ready.run.batch)
    ready.run.save(found, digest, ready.held.seen.get("written"), tuned)
    return found


def _digest(ready: Prepared) -> dict[str, str]:
    """What rows, model, tokenizer and the adapters that a training reads are, told by their content."""
    folder = Path(model_folder(ready.run.model))
    commit = getattr(ready.model.config, "_commit_hash", None)
    return {
        "model": files_digest(folder) if folder.is_dir() else str(commit),
        "training rows": rows_digest(ready.train.rows),
        "validation rows": rows_digest(ready.held.rows),
        **adapters_read(ready.run),
    }


def adapters_read(run: Run) -> dict[str, str]:
    """The adapters that a training reads, told by the content of their files."""
    read = {} if run.begin_from is None else {"the adapter that it begins from": run.begin_from}
    read |= {f"the adapter in {place}": place for how in run.penalty if how.active for place in how.reads}
    return {name: files_digest(Path(place), ("adapter_", BASES)) for name, place in read.items()}


def _fit(ready: Prepared, resume: bool, callbacks: Iterable[TrainerCallback]) -> tuple[Prepared, dict[str, Any]]:
    """Trains.  Returns what it trained, and the report's part on its course."""
    with stage("preparing the trainer"):
        from transformers import set_seed

        from .evaluating import Evaluations
        from .quality import set_aside
        from .stop import Stop, stopping
        from .trainer import trainer

    run, stop, aside = ready.run, Stop(), None
    if run.allocator is not None and run.allocator.needs_quality:
        train_on, aside = set_aside(ready.train, run.seed)
        ready = dataclasses.replace(ready, train=train_on)
    checkpoint = _checkpoint(run) if resume else None
    if checkpoint is not None and _has_ended(checkpoint):
        return _trained(ready, checkpoint, aside)
    begun_at = 0 if checkpoint is None else progress(checkpoint)[0]
    evaluations = Evaluations(run, len(ready.held))
    fitter = trainer(run, ready.model, ready.train, (*callbacks, evaluations, stop), aside)
    fitter.measure = lambda: run.task.watched(ready.model, ready.held, run.batch)
    set_seed(run.seed)  # whatever the evaluation drew
    begun = time.perf_counter()
    with stopping(stop):
        fitter.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, state = time.perf_counter() - begun, fitter.state
    found: Any = state.stateful_callbacks
    told = found.get(EVALUATIONS, {})
    if stop.agreed and state.global_step < state.max_steps and told.get("ended") is None:
        raise Interrupted(
            f"stopped at step {state.global_step} of {state.max_steps}; go on with: {resume_command(run.out)}"
        )
    course = course_of(state.global_step, state.max_steps, begun_at, seconds, state.log_history)
    return with_best(ready, course, told, state.log_history)


def _checkpoint(run: Run) -> Path | None:
    """The last complete checkpoint, which all processes go on from."""
    found = processes.by_first(lambda: last_checkpoint(run.out, run.procedure is not None))
    if found is not None:
        processes.first_then_all(lambda: check_processes(run.out, found))
    return found


def _has_ended(checkpoint: Path) -> bool:
    steps, asked, _ = progress(checkpoint)
    return steps >= asked or bool(evaluated(checkpoint).get("ended"))


def _trained(ready: Prepared, checkpoint: Path, aside: Examples | None) -> tuple[Prepared, dict[str, Any]]:
    """As `_fit`, of a training that had ended, and was only not measured."""
    from .checkpoints import as_left
    from .quality import quality_of

    steps, asked, log = progress(checkpoint)
    quality = None if aside is None else quality_of(ready.model, aside)
    left = dataclasses.replace(ready, adapter=as_left(ready.run, ready.model, checkpoint, quality))
    return with_best(left, course_of(steps, asked, steps, 0.0, log), evaluated(checkpoint), log)
