"""Comparing adapters that `undula train` made: the same rows for all, seeds paired, and the statistics of a study."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..core.choice import plain
from ..io import files
from ..train.data.faults import Faults
from ..train.data.load import load_data, sample
from ..train.recipe import Recipe
from ..train.restored import Restored, restored
from ..train.run import REPORT, Run
from ..train.tasks.heads import Classes
from ..train.tasks.task import Examples
from . import statistics as S
from .brief import brief
from .outcome import FINAL, Outcome
from .summary import summarise
from .table import Summary
from .trial import head_size

if TYPE_CHECKING:
    import torch

ALL = sys.maxsize
# What tells arms apart: every field that can change what comes out, but those that all arms have in common, the method,
# which names an arm, and the seed
ELSEWHERE = ("model", "data", "task", "method", "seed")
SETTINGS = tuple(f.name for f in dataclasses.fields(Recipe) if f.metadata["figures"] and f.name not in ELSEWHERE)


@dataclass(frozen=True)
class Entry:
    """One directory: its run, what an arm is called there, and the report of its training, where there is one."""

    path: Path
    run: Run
    arm: str
    report: Mapping[str, Any]


@dataclass(frozen=True)
class RowByRow:
    """Two trained adapters on the same rows.  About these two and rows like these: nothing about other seeds."""

    arm: str
    seed: int
    rows: int
    only_arm: int  # rows that the arm alone has right
    only_baseline: int
    difference: float  # of the accuracies, arm - baseline
    low: float  # the interval of the same test over the rows
    high: float
    p: float  # sign flips over the rows: McNemar's test
    p_holm: float


@dataclass(frozen=True)
class Compared:
    """What a comparison found."""

    summary: Summary
    row_by_row: tuple[RowByRow, ...]  # of arms that share a single seed with the baseline, for classification
    split: str
    rows: int
    entries: tuple[Entry, ...]


def compare(
    paths: Sequence[str | Path],
    *,
    split: str | None = None,
    rows: int | None = None,
    baseline: str | None = None,
    rule: S.Rule = S.Rule(),
    say: Callable[[str], None] = lambda text: None,
) -> Compared:
    """Evaluates every adapter on the same rows: those of `split` (test, where the data have it, else validation), all
    or `rows` of them.  Directories with the same method and settings are seeds of one arm.

    baseline: an arm, a method's name or one of the directories; by default the one arm that is a LoRA, else the first.
    Raises ValueError that lists everything that cannot be compared, LookupError for a baseline that does not exist.
    """
    entries = _entries([Path(p) for p in paths])
    split = _comparable(entries, split)
    base = _baseline(entries, baseline)
    outcomes, right, count = [], {}, 0
    for entry in entries:
        say(f"{entry.path}: {entry.arm}, seed {entry.run.seed}")
        opened = restored(entry.path)
        examples = opened.examples(None, split, ALL)
        examples = Examples(examples.task, sample(examples.rows, rows, 0), examples.processor)
        score, correct = _score(opened, examples)
        outcomes.append(_outcome(entry, opened, score))
        right[entry.arm, entry.run.seed], count = correct, len(examples)
    summary = summarise(outcomes, [], base, rule, split)
    return Compared(summary, _row_by_row(summary, right, rule), split, count, tuple(entries))


def _entries(paths: Sequence[Path]) -> list[Entry]:
    """The directories read.  Raises ValueError with all that is wrong with any of them."""
    found, faults = [], []
    for path in paths:
        try:
            run, report = Run.load(path), path / REPORT
            if not (path / files.CONFIG).is_file():
                raise ValueError(
                    f"{path} holds no adapter: its training has not finished (undula train --resume {path})"
                )
            Adapter.load(path)  # a damaged file is told before what else differs
            found.append((path, run, _report(report)))
        except (OSError, ValueError, LookupError) as error:
            faults.append(str(error))
    faults += [f"{p} is named {n} times" for p, n in Counter(p.resolve() for p in paths).items() if n > 1]
    if faults:
        raise ValueError(_told(faults))
    varied = [name for name in SETTINGS if len({repr(run.encode().get(name)) for _, run, _ in found}) > 1]
    alike = len({report.get("processes", 1) for _, _, report in found if report}) < 2
    return [Entry(path, run, _arm(path, run, varied, report, alike), report) for path, run, report in found]


def _report(path: Path) -> dict[str, Any]:
    """The report of a training; empty where there is none.  Raises ValueError for a damaged one."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no report of a training: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no report of a training: it holds no JSON object")
    return found


def _told(faults: Sequence[str]) -> str:
    return "these adapters cannot be compared:\n" + "\n".join(f"- {fault}" for fault in faults)


def _arm(path: Path, run: Run, varied: Sequence[str], report: Mapping[str, Any], alike: bool) -> str:
    """The method with its settings, and what else is not the same in all of the runs, the number of processes (whose
    steps are of other rows) where that is not `alike`."""
    method = "head only" if run.method is None else brief(run.method)
    given = run.encode()
    others = [f"{name}={_short(given[name])}" for name in varied if given.get(name) not in (None, (), [], {})]
    several = [] if alike or report.get("processes", 1) == 1 else [f"on {report['processes']} processes"]
    return " ".join([method, *others, *several, *([] if report else [f"from {path.name}"])])


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _comparable(entries: Sequence[Entry], split: str | None) -> str:
    """The split on which all can be measured.  Raises ValueError with every reason why they cannot be compared."""
    faults = [
        fault
        for what in ("model", "data", "task")
        if (fault := _differing(what, [(e.path, _short(e.run.encode()[what])) for e in entries]))
    ]
    seen = Counter((e.arm, e.run.seed) for e in entries)
    faults += [f"{n} directories hold {arm} with seed {seed}" for (arm, seed), n in seen.items() if n > 1]
    if len({e.arm for e in entries}) < 2:
        faults.append(f"there is one arm alone ({entries[0].arm}): a comparison takes two")
    if len({e.run.data for e in entries}) == 1:
        found, fault = _split(entries, split)
        faults += [fault] if fault else []
    if faults:
        raise ValueError(_told(faults))
    return found


def _differing(what: str, values: Sequence[tuple[Path, str]]) -> str:
    by_value: dict[str, list[str]] = {}
    for path, value in values:
        by_value.setdefault(value, []).append(str(path))
    if len(by_value) < 2:
        return ""
    return f"the {what} is not the same: " + "; ".join(f"{v} in {', '.join(ps)}" for v, ps in by_value.items())


def _split(entries: Sequence[Entry], split: str | None) -> tuple[str, str]:
    """(the split, why it cannot be used)."""
    names = list(load_data(entries[0].run.data, Faults()))  # whoever reads the rows says what is wrong with them
    chosen = split or ("test" if "test" in names else "validation")
    seeds = sorted({e.run.seed for e in entries})
    if chosen in ("train", "validation") and "validation" not in names:
        if len({bool(e.run.by_chance) for e in entries}) > 1:
            return chosen, (
                "the data have no validation split, and runs of different versions of undula held out different rows: "
                f"compare on a split that none has seen (--split; there are: {', '.join(names)})"
            )
        if len(seeds) == 1:
            return chosen, ""
        return chosen, (
            "the data have no validation split, so each run held out rows by its own seed "
            f"({', '.join(map(str, seeds))}): what one was measured on, another was trained on. Compare on a split "
            f"that none has seen (--split; there are: {', '.join(names)}), or train on data with a validation or test "
            "split"
        )
    return chosen, "" if chosen in names else f"the data have no split {chosen!r}; there are: {', '.join(names)}"


def _baseline(entries: Sequence[Entry], asked: str | None) -> str:
    arms = list(dict.fromkeys(e.arm for e in entries))
    by_method: dict[str, set[str]] = {}
    for e in entries:
        name = "none" if e.run.method is None else plain(type(e.run.method).public().__name__)
        by_method.setdefault(name, set()).add(e.arm)
    lora = by_method.get("lora", set()) & {e.arm for e in entries if e.report}  # one that was trained as such
    if asked is None:
        return next(iter(lora)) if len(lora) == 1 else arms[0]
    named = {asked} & set(arms) or {e.arm for e in entries if e.path.resolve() == Path(asked).resolve()}
    named = named or by_method.get(plain(asked), set())
    if len(named) != 1:
        what = "means several arms" if named else "is no arm, method or directory here"
        raise LookupError(f"baseline={asked!r} {what}; the arms are: {'; '.join(arms)}")
    return next(iter(named))


def _score(opened: Restored, examples: Examples) -> tuple[dict[str, float], torch.Tensor | None]:
    """The metrics, and for classification which rows are right."""
    task, batch = opened.run.task, opened.run.batch
    if not isinstance(task, Classes):
        return task.score(opened.model, examples, batch), None
    import torch

    logits, labels = task.logits(opened.model, examples, batch), examples.rows["label"][:]
    return task.metrics(logits, labels), logits.argmax(1) == torch.tensor(labels)


def _outcome(entry: Entry, opened: Restored, score: Mapping[str, float]) -> Outcome:
    run, report = entry.run, entry.report
    head = head_size(run.task, opened.model, opened.adapter)
    return Outcome(
        *(entry.arm, run.model, run.data, type(run.task).__name__.lower(), FINAL, run.lr or math.nan, run.seed),
        metric=run.task.headline,
        more_is_better=run.task.more_is_better,
        validation=report.get("after", {}).get(run.task.headline),
        test=score[run.task.headline],
        others=score,
        parameters=opened.adapter.num_parameters() - head,
        head_parameters=head,
        steps=report.get("steps"),
        losses=tuple((int(step), float(loss)) for step, loss in report.get("losses", ())),
    )


def _row_by_row(
    summary: Summary, right: Mapping[tuple[str, int], torch.Tensor | None], rule: S.Rule
) -> tuple[RowByRow, ...]:
    found = []
    for row in summary.rows:
        if row.against is None or row.against.pairs != 1:
            continue
        seed = next(s for a, s in right if a == row.arm and (summary.baseline, s) in right)
        arm, base = right[row.arm, seed], right[summary.baseline, seed]
        if arm is None or base is None:
            continue
        d = (arm.double() - base.double()).tolist()
        low, high = S.interval([d], rule) or (-1.0, 1.0)
        only = int((arm & ~base).sum()), int((base & ~arm).sum())
        found.append(RowByRow(row.arm, seed, len(d), *only, sum(d) / len(d), low, high, S.sign_flip(d, rule), 1.0))
    adjusted = S.holm([each.p for each in found])
    return tuple(dataclasses.replace(each, p_holm=p) for each, p in zip(found, adjusted, strict=True))
