"""Running a study: claim what is due, make it, record it, until nothing is due; then report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import splits
from .floors import floor
from .guess import begun, planned
from .orders import Order, make, ordered, record
from .outcome import ChosenRate, Outcome
from .plan import Plan
from .sources import Sources
from .spec import Study
from .store import Record, Store
from .trial import Trial
from .view import Silent, View

STORE, REPORT = "runs.sqlite", "report"
POLL = 2.0  # seconds between looks at what another process has finished
PILOT_STEPS = 4


@dataclass(frozen=True)
class Finished:
    """What a study has come to so far, and its report: an HTML file, the other forms beside it."""

    outcomes: list[Outcome]
    chosen: list[ChosenRate]
    report: Path


def run(
    study: Study,
    out: str | Path,
    *,
    view: View | None = None,
    about: Mapping[str, str] | None = None,
    retry_failed: bool = False,
    together: int | None = None,
) -> Finished:
    """See `undula.study`."""
    view, out = view or Silent(), Path(out)
    plan = Plan(study)
    if together is not None:
        from .together import check_together

        check_together(plan, together)
    store = Store(out / STORE)
    if any(cell.auto for cell in plan.cells):
        plan = begun(plan, store, view)
    if changed := "; ".join(plan.strangers(plan.known(store))):
        raise ValueError(f"{changed}: bring them back, or begin again in another --out than {out}")
    _delete_stale(plan, store, retry_failed)
    mine: set[str] = set()
    try:
        with store.beating():
            _drive(plan, store, view, mine, together)
    finally:
        store.release(mine)
    return _report(plan, store, out, about)


def _delete_stale(plan: Plan, store: Store, retry_failed: bool) -> None:
    """Deletes the records of runs that must be made again: those that do not count, and failed ones if asked to."""
    held = store.records(plan.trials())  # before the rest: what another process begins meanwhile is not among them
    known = plan.known(store)
    store.forget({k: r for k, r in held.items() if k not in known})
    if retry_failed:
        keys = [k for key, t in plan.trials().items() for k in (key, *t.formers)]
        store.forget({k: r for k, r in store.records(keys).items() if r.error is not None})


def _drive(plan: Plan, store: Store, view: View, mine: set[str], together: int | None) -> None:
    """Makes run after run, or so many together; `mine`: what is in hand."""
    several = None
    if together is not None:
        from .together import Together

        several = Together(plan, store, view, mine, together)
    while True:
        known = plan.known(store)
        view.counts(plan.counts(known))
        due = list(plan.due(known))
        if not due:
            return
        if several is not None and several.make(due, known):
            continue
        for trial in due:
            mine.add(trial.key)  # first, so that no interruption leaves a claim behind
            if store.claim(trial):
                break
            mine.remove(trial.key)
        else:  # all in the hands of other processes
            time.sleep(POLL)
            continue
        view.begun(trial)
        ended = record(plan, store, make(ordered(plan, trial, known), view.step))
        mine.remove(trial.key)
        view.ended(ended)


def report(study: Study, out: str | Path, about: Mapping[str, str] | None = None) -> Finished:
    """Writes OUT/report from what has ended so far; nothing is run."""
    store = Store(Path(out) / STORE)
    return _report(planned(study, store), store, Path(out), about)


def _report(plan: Plan, store: Store, out: Path, about: Mapping[str, str] | None) -> Finished:
    from .report import write_report

    study, known = plan.study, plan.known(store)
    outcomes, chosen = plan.outcomes(known)
    if not outcomes:
        told = "".join(f"\n  {text}" for text in _doubts(plan, store, known))
        raise ValueError(f"no run of this study has ended yet in {store.path}: there is nothing to report{told}")
    made = write_report(
        *(out / REPORT, outcomes, chosen), title=study.title, baseline=study.baseline,
        about={**plan.made(known), **(about or {})}, notes=list(_notes(plan, store, known)), floors=_floors(plan),
    )  # fmt: skip
    return Finished(outcomes, chosen, made)


def _floors(plan: Plan) -> dict[str, float]:
    """{data: `floor`} of the data sets that have one."""
    found = {rows.label: floor(rows, plan.study.split_seed, plan.sources) for rows in plan.study.data}
    return {label: value for label, value in found.items() if value is not None}


def _notes(plan: Plan, store: Store, known: Mapping[str, Record]) -> Iterator[str]:
    """What a reader should know before any figure."""
    counts = plan.counts(known)
    if counts["least"]:
        yield f"The study is not complete: {counts['ended']} runs have ended, {counts['least']} at least are to come."
    yield from (f"Mind this: {text}." for text in _doubts(plan, store, known))


def warnings(study: Study, out: str | Path | None = None) -> list[str]:
    """What makes the data of a study doubtful, and the runs in `out`, if there are any."""
    if out is None or not (Path(out) / STORE).is_file():
        return list(_doubts(Plan(study), None, {}))
    store = Store(Path(out) / STORE)
    plan = planned(study, store)
    return list(_doubts(plan, store, plan.known(store)))


def foreseen(study: Study, out: Path) -> Plan:
    """The plan, with the rates that were found in `out`."""
    return planned(study, Store(out / STORE)) if (out / STORE).is_file() else Plan(study)


def _doubts(plan: Plan, store: Store | None, known: Mapping[str, Record]) -> Iterator[str]:
    for rows in plan.study.data:
        _, parts = plan.sources.opened(rows, plan.study.split_seed)
        yield from plan.sources.left_out(rows, plan.study.split_seed)
        yield from (f"{rows.label}: {text}" for text in splits.leaks(parts))
    yield from plan.strangers(known)
    yield from plan.mixtures(known)
    if store is not None and (old := plan.outdated(store)):
        yield (
            f"{old} runs in {store.path} are an earlier version's, which trained otherwise: they are left out and "
            "made anew"
        )
    if store is not None and (other := plan.former(store)):
        yield (
            f"{other} runs in {store.path} chose one rate for all seeds, which this study does not: each of its seeds "
            "sweeps for itself. To see what they came to, write [sweep] seeds = [0] into the study file (no win or "
            "loss is called then)"
        )


def counted(plan: Plan, out: Path) -> dict[str, int]:
    """`Plan.counts` of the runs in `out`."""
    return plan.counts(_known(plan, out))


def _known(plan: Plan, out: Path) -> dict[str, Record]:
    return plan.known(Store(out / STORE)) if (out / STORE).is_file() else {}


@dataclass(frozen=True)
class Estimate:
    """Runs and hours to come, from those that have ended, or from a pilot of a few steps per model and data set."""

    counts: Mapping[str, int]
    seconds_least: float
    seconds_most: float
    based_on: str


def estimate(study: Study, out: str | Path, heard: Callable[[str], None] = lambda _: None) -> Estimate:
    """How long `run` would take.  Only a pilot of the first arm with a method is run: a few steps and one evaluation
    per model and data set; the other arms are taken to be as fast, full fine-tuning included."""
    plan = foreseen(study, Path(out))
    known = _known(plan, Path(out))
    counts = plan.counts(known)
    mean, based_on = _mean_seconds(plan, known, heard)
    return Estimate(counts, counts["least"] * mean, counts["most"] * mean, based_on)


def _mean_seconds(plan: Plan, known: Mapping[str, Record], heard: Callable[[str], None]) -> tuple[float, str]:
    done = [r.result["wall_seconds"] for r in known.values() if r.result is not None]
    if done:
        return sum(done) / len(done), f"{len(done)} runs that have ended"
    spent = []
    for base in plan.study.models:
        for rows in plan.study.data:
            here = [c for c in plan.cells if c.base == base and c.rows == rows]
            cell = next((c for c in here if c.method is not None), here[0])
            heard(f"pilot: {PILOT_STEPS} steps of {cell.arm.name} on {base.label}, {rows.label}")
            spent.append(_pilot(cell.asker, plan.sources))
    return sum(spent) / len(spent), f"a pilot of {PILOT_STEPS} steps"


def _pilot(trial: Trial, sources: Sources) -> float:
    """The seconds that a whole run would take, from a short one."""
    short = replace(trial, run=replace(trial.run, max_steps=PILOT_STEPS), evaluations=1)
    ended = make(Order(short, sources=sources))
    if ended.result is None:
        raise ValueError(f"the pilot failed: {ended.error}")
    _, parts = sources.opened(trial.rows, trial.split_seed)
    steps = steps_of(trial, len(parts["train"]))
    training = ended.result["seconds"] / PILOT_STEPS * steps
    evaluation = ended.result["evaluation_seconds"]
    opening = ended.result["wall_seconds"] - ended.result["seconds"] - evaluation
    return training + evaluation * trial.evaluations + opening


def steps_of(trial: Trial, rows: int) -> int:
    """The optimiser steps of a run on so many rows."""
    per_epoch = max(1, -(-rows // (trial.run.batch * trial.run.accumulate)))
    return trial.run.max_steps or round(per_epoch * trial.run.epochs)
