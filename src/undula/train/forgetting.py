"""A model forgets classes, one request after another, and keeps the rest.

OUT/forget.json             the requests, the run that each is trained by, what was taken back
OUT/requests/01 ...         a run of each request (see `train.run`): its adapter, its report, its figures
OUT/bases/01 ...            the model with the first request merged, on which the second is trained, and so on
OUT/adapter_*, run.json     all of the requests on the model as it was: their sum
OUT/report.json, .html      accuracies after each request

A request is a training like any other, its task that of forgetting (see `tasks.forgetting`).  Its adapter is an update
that is added, so the sum without it is the model that never had it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..core.extras import needs
from ..core.turns import turn
from ..host import merging
from ..host.reference import alone
from ..io import files
from ..io.whole import whole
from .base import called_elsewhere, quiet
from .concluding import Diverged
from .fit import train
from .forgetting_rows import check_rows
from .forgetting_runs import named, planned
from .restored import Restored, restored
from .rows import LOG
from .run import REPORT, RUN, Run, write_json
from .tasks.forgetting import Forgets, accuracy, forgetting, h_mean

if TYPE_CHECKING:
    from transformers import TrainerCallback

FORGET, MEASURED = "forget.json", "measured.json"
VERSION = 1


@needs("train")
@turn()
def forget(
    run: Run,
    requests: Sequence[Sequence[str]],
    *,
    resume: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    **options: Any,
) -> dict[str, Any]:
    """Has the model of `run` forget the classes of each request in turn, and returns the report (OUT/report.json).

    run: as for `train`; its model has a head for its classes (one that was trained: a whole folder), its task is
    Classification or ImageClassification, its method is Additive.  `where` by default: the layers of feed-forward
    networks, and all that are linear where a model has none that can be told.
    options: `beta`, `bound`, `shots`, `near`, `apart`, `apart_bound`, see `tasks.forgetting.Forgets`.
    resume: goes on where OUT was left; what is there must have been begun with the same.

    Checkpoints are chosen on validation rows; the report's figures are of the rows of `test` where the data have them,
    and says which.  Raises what `train` raises; LookupError for a class that the model does not know, TypeError for a
    method that cannot be added, ValueError for a class without rows, FileExistsError where OUT holds something else.
    """
    runs = list(planned(run, requests, options))
    if not (run.out / FORGET).is_file():
        check_rows(runs)
    begin(run, requests, options, resume)
    stages = []
    for i, each in enumerate(runs):
        if i:
            merged(runs[i - 1].out, Path(each.model))
        if not (each.out / REPORT).is_file():
            train(each, resume=(each.out / RUN).is_file(), callbacks=callbacks)
        _check_ended(each)
        stages += measured(each, first=i == 0)
    return concluded(run.out, stages)


def begin(run: Run, requests: Sequence[Sequence[str]], options: Mapping[str, Any], resume: bool) -> None:
    """Writes OUT/forget.json, or sees that it says the same.  Raises FileExistsError or ValueError."""
    said = {
        "version": VERSION,
        "run": run.encode(),
        "requests": [[r] if isinstance(r, str) else list(r) for r in requests],
        "options": dict(options),
        "undone": [],
    }
    path = run.out / FORGET
    if path.is_file():
        if not resume:
            raise FileExistsError(f"{run.out} holds requests already: resume=True, --resume, goes on; or name another")
        there = told(run.out)
        odd = [k for k in ("run", "requests", "options") if there[k] != said[k]]
        if odd:
            raise ValueError(f"{path} was begun with other {', '.join(odd)}: begin in another directory")
        return
    if run.out.is_dir() and any(run.out.iterdir()):
        raise FileExistsError(f"{run.out} is not empty: name another directory")
    write_json(path, said)


def told(out: Path) -> dict[str, Any]:
    """What OUT/forget.json says.  Raises FileNotFoundError or ValueError."""
    path = out / FORGET
    if not path.is_file():
        raise FileNotFoundError(f"{out} holds no requests to forget: {FORGET} is missing")
    with files.door(str(path)):
        found: dict[str, Any] = files.parsed(path.read_bytes(), str(path))
        if found.get("version") != VERSION or not {"run", "requests", "options", "undone"} <= set(found):
            raise ValueError(f"{path} is none of version {VERSION}")
        return found


def merged(request: Path, base: Path) -> None:
    """Writes the model of a request with its adapter merged, where it is not there yet."""
    if base.is_dir():
        return
    opened = restored(request)
    merging.merge(opened.model, keep=False)
    with whole(base) as folder, quiet():
        opened.model.save_pretrained(folder)
        opened.processor.save_pretrained(folder)


def _check_ended(run: Run) -> None:
    """Raises Diverged for a request that has, and left no adapter to go on from."""
    if files.parsed((run.out / REPORT).read_bytes(), str(run.out / REPORT))["state"] == "diverged":
        assert isinstance(run.task, Forgets)
        raise Diverged(
            f"the training of the request {', '.join(run.task.forget)} has diverged at lr={run.lr}: begin in another "
            "directory, with a lower rate (--lr)"
        )


def measured(run: Run, first: bool) -> list[dict[str, Any]]:
    """The accuracies of each class after this request, and before it where it is the first; kept beside it."""
    path = run.out / MEASURED
    if not path.is_file():
        opened = restored(run.out)
        examples, split = held(opened)
        found = []
        if first:
            with alone(opened.model):
                found.append({"request": [], **by_class(opened, examples), "split": split})
        report = files.parsed((run.out / REPORT).read_bytes(), str(run.out / REPORT))
        task = opened.run.task
        assert isinstance(task, Forgets)
        after = {"request": list(task.forget), **by_class(opened, examples), "split": split}
        found.append({**after, "groups": [p["result"] for p in report.get("penalties", [])]})
        write_json(path, {"stages": found})
    return _kept(run.out)


def held(opened: Restored) -> tuple[Any, str]:
    """(the rows that figures are of, the name of their split): those by which nothing was chosen, where there are."""
    try:
        return opened.examples(None, "test"), "test"
    except LookupError:
        return opened.examples(), "validation"


def by_class(opened: Restored, examples: Any) -> dict[str, Any]:
    """{classes: {name: accuracy}, rows: {name: how many}}."""
    task = opened.run.task
    assert isinstance(task, Forgets)
    logits, labels = task.logits(opened.model, examples, opened.run.batch), examples.rows["label"][:]
    rows = {name: [i for i, label in enumerate(labels) if label == c] for c, name in enumerate(task.names)}
    found = {name: accuracy(logits[at], [labels[i] for i in at]) for name, at in rows.items() if at}
    return {"classes": found, "rows": {name: len(at) for name, at in rows.items()}}


def concluded(out: Path, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the sum of the requests, and the report; returns it."""
    from .forgetting_page import selected, share, write

    said = told(out)
    run, requests = Run.decode(said["run"], out), [tuple(r) for r in said["requests"]]
    gone = {name for request in requests for name in request}
    kept = [name for name in stages[0]["classes"] if name not in gone]
    rows = []
    for i, (request, stage) in enumerate(zip(requests, stages[1:], strict=True)):
        left = [name for name in stages[0]["classes"] if name not in {n for r in requests[: i + 1] for n in r}]
        before, after, rest = share(stages[i], request), share(stage, request), share(stage, left)
        earlier = [name for r in requests[:i] for name in r]
        rows.append({
            "request": list(request),
            "forgotten_before": before,
            "forgotten": after,
            "kept_before": share(stages[i], left),
            "kept": rest,
            "h_mean": h_mean(before, after, rest),
            "earlier": share(stage, earlier) if earlier else None,
            "groups": stage["groups"],
        })  # fmt: skip
    report = {
        "split": stages[0]["split"],
        "requests": rows,
        "kept": {"classes": kept, "before": share(stages[0], kept), "after": share(stages[-1], kept)},
        "stages": stages,
        "undone": said["undone"],
        "run": said["run"],
        "options": said["options"],
        "out": str(out),
    }
    for row in rows:
        for why in () if row["request"] in said["undone"] else selected(row["groups"]):
            LOG.warning(f"{', '.join(row['request'])}: {why}")
    _summed(out, run, requests, said["undone"])
    write(out, report)
    write_json(out / REPORT, report)
    return report


def _summed(out: Path, run: Run, requests: Sequence[tuple[str, ...]], undone: Sequence[Sequence[str]]) -> None:
    """Writes the sum of the requests that stand, as an adapter of the model as it was."""
    taken_back = [tuple(r) for r in undone]
    parts = [Adapter.load(out / "requests" / f"{i + 1:02}") for i in range(len(requests))]
    standing = [part for part, request in zip(parts, requests, strict=True) if request not in taken_back]
    total = sum(standing[1:], standing[0]) if standing else parts[0] * 0.0
    names = tuple(parts[0].about.get("classes", ()))
    gone = tuple(name for r in requests if r not in taken_back for name in r) or requests[0]
    task = forgetting(named(run.task, names), forget=gone)
    dataclasses.replace(run, task=task, out=out).save(None)
    about = {k: v for k, v in parts[0].about.items() if k != "training"}
    dataclasses.replace(total, about=about).save(out, base=called_elsewhere(run.model), task=task.peft)


@needs("train")
def undo(out: str | Path, request: Sequence[str]) -> Adapter:
    """Takes one request back: the adapter in OUT is the sum of the others from then on, and is returned.  Without any
    it changes nothing, to the bit.  Raises LookupError for what was no request."""
    out = Path(out)
    said = told(out)
    asked = [request] if isinstance(request, str) else list(request)
    if asked not in said["requests"]:
        there = "; ".join(", ".join(r) for r in said["requests"])
        raise LookupError(f"{', '.join(asked)} was no request in {out}; there were: {there}")
    if not (out / REPORT).is_file():
        raise ValueError(f"the requests in {out} are not all done: go on with `undula forget --resume {out}` first")
    said["undone"] = [r for r in said["requests"] if r in said["undone"] or r == asked]
    write_json(out / FORGET, said)
    stages = [s for i in range(len(said["requests"])) for s in _kept(out / "requests" / f"{i + 1:02}")]
    concluded(out, stages)
    return Adapter.load(out)


def _kept(place: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = files.parsed((place / MEASURED).read_bytes(), str(place / MEASURED))["stages"]
    return found


@needs("train")
def go_on(out: str | Path, callbacks: Iterable[TrainerCallback] = ()) -> dict[str, Any]:
    """Goes on with the requests in OUT."""
    out = Path(out)
    said = told(out)
    return forget(Run.decode(said["run"], out), said["requests"], resume=True, callbacks=callbacks, **said["options"])
