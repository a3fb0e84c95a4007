"""What runs must have in common to train together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..core.choice import Choice
from ..methods.dropout import Dropout
from ..train import processes
from ..train.base import called_elsewhere, config_of
from ..train.run import Run
from ..train.tasks.causal_lm import CausalLM
from ..train.tasks.classification import Classification
from ..train.tasks.described import DescribedClassification

TASKS = (CausalLM, Classification, DescribedClassification)
HEADS = ("classifier", "cls_", "pooler", "qa_", "seq_classif", "summary")  # beginnings of dropouts behind the layers
ALONE = "Train it by itself: undula train"


def check(runs: Mapping[str, Run]) -> None:
    """Raises ValueError with all that is wrong with the runs."""
    found = [f"{name}: {why}" for name, faults in faults_of(runs).items() for why in faults]
    if not runs:
        found.append("no job is given")
    if processes.started() > 1:
        found.append("several jobs are trained by one process, and torchrun started several: start one")
    if found:
        raise ValueError("\n".join(found))


def faults_of(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """{name: what is wrong}, of those runs that cannot train beside the others; what they share the first one says."""
    first = next(iter(runs.items()), None)
    places: dict[Path, str] = {}
    found: dict[str, list[str]] = {}
    for name, run in runs.items():
        own = [*unfit(run), *(_shared(run, *first) if first else ())]
        other = places.setdefault(run.out.resolve(), name)
        if other != name:
            own.append(f"it writes to {run.out}, and so does {other}: name another directory")
        if own:
            found[name] = own
    return found


def wishes(run: Run) -> tuple[Any, ...]:
    """What it asks for of all that jobs share: equal ones train together."""
    return tuple(told(run) for _, told in AGREED)


def unfit(run: Run) -> Iterator[str]:
    """Why a run cannot train beside others."""
    if type(run.task) not in TASKS:
        there = ", ".join(task.__name__ for task in TASKS)
        yield f"{type(run.task).__name__} cannot be trained among other jobs, the tasks that can are: {there}. {ALONE}"
    if run.lr is None:
        yield f"lr is auto, which is found for one training at a time: name a rate, as `undula tune` finds it. {ALONE}"
    if run.allocator is not None:
        yield f"{run.allocator!r} changes the layers while it trains, which jobs share. {ALONE}"
    if why := run.optimiser.apart:
        yield f"{run.optimiser!r} {why}. {ALONE}"
    if given := [p for p in run.penalty if p.active]:
        yield f"penalty={given[0]!r} acts on layers that jobs share. {ALONE}"
    if run.gradient_checkpointing and (found := [*drops(run, HEADS)]):
        yield (
            f"gradient_checkpointing computes dropout again, which among jobs would draw other numbers, and there is "
            f"dropout: {', '.join(found)}. Leave out the one or the other. {ALONE}"
        )


def drops(run: Run, apart: tuple[str, ...] = ()) -> Iterator[str]:
    """What of a run's layers is dropped by chance: by its methods, and by the model itself, `apart` from settings that
    begin so."""
    chosen = [run.method, *run.overrides.values()]
    yield from dict.fromkeys(repr(choice) for choice in chosen if choice is not None and _dropping(choice))
    try:
        config = config_of(run.model)
    except (LookupError, ValueError, OSError):  # which is told where the model is opened
        return
    for name, value in sorted(config.to_dict().items()):
        if "drop" in name and not name.startswith(apart) and isinstance(value, float) and value > 0:
            yield f"{name}={value:g} in {run.model}"


def _dropping(choice: Choice) -> bool:
    own = [getattr(choice, f.name) for f in fields(choice)]  # type: ignore[arg-type]
    within = [each for value in own for each in (value if isinstance(value, tuple) else (value,))]
    return (isinstance(choice, Dropout) and choice.p > 0) or any(
        _dropping(each) for each in within if isinstance(each, Choice)
    )


AGREED: tuple[tuple[str, Callable[[Run], Any]], ...] = (
    ("model", lambda run: str(Path(run.model).resolve()) if Path(run.model).exists() else called_elsewhere(run.model)),
    ("dtype", lambda run: str(run.dtype).removeprefix("torch.")),
    ("bits", lambda run: run.bits),
    ("task", lambda run: type(run.task).__name__),
    ("gradient_checkpointing", lambda run: bool(run.gradient_checkpointing)),
)


def _shared(run: Run, first: str, other: Run) -> Iterator[str]:
    for what, told in AGREED:
        if told(run) != told(other):
            yield f"{what} is {told(run)}, and {told(other)} in {first}: jobs that train together share it"
