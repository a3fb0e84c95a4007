# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula library` and `undula from-description`: a library of experts, and adapters that are made of it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.extras import needs
from ..core.options import split_pair
from ..train import Interrupted
from ..train.rows import spaced
from . import shell
from .training import stages

if TYPE_CHECKING:
    from torch import Tensor

    from ..generate import Library
    from ..train.tasks.task import Task

GENERATORS = "generators"
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".xlsx")
MOST = 10_000  # rows of a file that are held at once, and twice as many
OF_CLASSES = ("names", "descriptions", "class_weights")  # what of a task is of its classes alone
RESUMES = "stopped, with all experts saved; go on with: undula library {path} --out {out} --resume"


class How(StrEnum):
    """What makes an adapter of a description."""

    MIXTURE = "mixture"
    NEAREST = "nearest"
    SG_LORA = "sg-lora"
    ICM_LORA = "icm-lora"


@needs("train")
def library(
    path: Annotated[
        Path, typer.Argument(metavar="TASKS.toml", help="As of train-many, a `description` in each table.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="The directory to write: OUT/experts/NAME for each, OUT/library.json.")],
    checkpoints: Annotated[int, typer.Option(help="How many are kept of each expert's last steps.", min=1)] = 8,
    share: Annotated[float, typer.Option(help="The share of the steps that counts as last.")] = 0.3,
    resume: Annotated[bool, typer.Option("--resume", help="Go on, or add experts to the library in OUT.")] = False,
    to: shell.Json = None,
) -> None:
    """Train a library of experts from one start, for `undula from-description`.

    The tasks are jobs as `undula train-many` takes them, of one model, method and seed, without heads that train
    (--task described-classification, causal-lm ...)."""
    from ..generate import build
    from ..train.base import quiet
    from .many import Watching

    try:
        with quiet(), Watching() as view:
            made = build(path, out, checkpoints=checkpoints, share=share, resume=resume, view=view)
    except Interrupted:
        raise Interrupted(RESUMES.format(path=path, out=out)) from None
    shell.show([{"expert": e.name, "description": e.description, **_figures(e.figures)} for e in made.experts], to)
    if str(to) != "-":
        shell.note(f"{len(made.experts)} experts of {made.layout.size:,} numbers each. Saved in {out}")


def _figures(figures: Any) -> dict[str, Any]:
    return {k: figures.get(k) for k in ("metric", "before", "after")}


@needs("train")
def from_description(
    description: Annotated[str, typer.Argument(help="What the task is, in words as the library's experts have them.")],
    *,
    library: Annotated[Path, typer.Option(help="The library, of `undula library`.")],
    out: shell.Out,
    how: Annotated[How, typer.Option(help="mixture: of the nearest experts; else a generator, trained once.")] = (
        How.MIXTURE
    ),
    classes: Annotated[
        list[str], typer.Option("--class", help="NAME=DESCRIPTION of a class, as spam='an advert'. Repeatable.")
    ] = [],
    k: Annotated[int | None, typer.Option("--k", help="How many experts are mixed. (default: 4)", min=1)] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Rows of the task for icm-lora, no labels needed: a text file, a row a line.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draw, by this seed; else the middle of what could be drawn.")] = (
        None
    ),
    to: shell.Json = None,
) -> None:
    """Make an adapter for a task that nobody trained: of a description, by a library of experts.

    A generator (sg-lora, icm-lora) is trained on the library the first time, and kept in LIBRARY/generators."""
    from ..generate import Library, write

    shell.fresh(out)
    check(how, k, rows, seed)
    lib = Library.load(library)
    task = _task(lib, classes)
    with stages():
        vector, told = _made(lib, description, how, k, rows, seed)
    write(lib.layout.unpack(vector), out, lib.model, task, _note(description, how, told))
    shell.show(told, to)
    if str(to) != "-":
        shell.note(f"{vector.numel():,} numbers by {how}. Saved in {out}; nothing was trained on the task: measure it")


def check(how: How, k: int | None, rows: Path | None, seed: int | None) -> None:
    """Refuses options that would do nothing.  Raises ValueError."""
    if how is not How.MIXTURE and k is not None:
        raise ValueError(f"--k is of --how mixture; found --how {how}")
    if (how is How.ICM_LORA) != (rows is not None):
        raise ValueError("--how icm-lora reads rows of the task (--rows FILE), and the others read none")
    if seed is not None and how not in (How.SG_LORA, How.ICM_LORA):
        raise ValueError(f"--seed draws, and {how} draws nothing: leave it out")


def _task(lib: Library, classes: list[str]) -> Task:
    """What the experts do, with these classes.  Raises ValueError."""
    from ..train.tasks.described import DescribedClassification

    like = _like(lib)
    pairs = [split_pair(text, "a class") for text in classes]
    told = dict(pairs)
    if len(told) < len(pairs):
        twice = next(name for name in told if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"the class {twice} is given twice (--class): each has one description")
    if not isinstance(like, DescribedClassification):
        if told:
            raise ValueError(f"--class is for experts of DescribedClassification; these are of {type(like).__name__}")
        return like
    if len(told) < 2:
        raise ValueError(
            f"name two classes or more: --class spam='an advert' --class ham='a letter'; found {len(told)}"
        )
    return DescribedClassification(names=tuple(told), descriptions=told, max_length=like.max_length, scale=like.scale)


def _like(lib: Library) -> Task:
    """The task of the experts, as the first has it: classes and columns aside they have one, or it is said in what
    they differ.  Raises ValueError where they are of several kinds."""
    from ..generate.library import EXPERTS
    from ..train.run import Run

    tasks = {name: Run.load(lib.path / EXPERTS / name).task for name in lib.names}
    (first, like), *others = tasks.items()
    said = like.encode()
    odd: dict[str, str] = {}  # an option, and the first expert that has it otherwise
    for name, task in others:
        if type(task) is not type(like):
            raise ValueError(
                f"the experts of {lib.path} are of several tasks: {first} of {type(like).__name__}, {name} of "
                f"{type(task).__name__}. Say in Python which the adapter is for: undula.generate.write(..., task)"
            )
        own = task.encode()
        for key in (said.keys() | own.keys()) - {*OF_CLASSES, *like.roles}:
            if own.get(key) != said.get(key):
                odd.setdefault(key, f"{key} ({said.get(key)!r:.60}; {own.get(key)!r:.60} of {name})")
    if odd:
        shell.remark(
            f"The experts' tasks differ, and that of {first} is taken: {', '.join(odd[k] for k in sorted(odd))}"
        )
    return like


def _made(
    lib: Library, description: str, how: How, k: int | None, rows: Path | None, seed: int | None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """(the numbers, whose they are)."""
    from ..generate import ICMLoRA, SGLoRA, mixture
    from ..generate.mixture import K

    mixed = mixture(lib, description, 1 if how is How.NEAREST else k or K)
    of = {e.name: e.description for e in lib.experts}
    told = [{"expert": name, "weight": weight, "description": of[name]}
            for name, weight in zip(mixed.names, mixed.weights.tolist(), strict=True)]  # fmt: skip
    if how in (How.MIXTURE, How.NEAREST):
        return mixed.mean, told
    folder = lib.path / GENERATORS / how
    kind: Any = SGLoRA if how is How.SG_LORA else ICMLoRA
    texts = [] if rows is None else _texts(rows)  # refused before anything is trained
    if (folder / "generator.json").is_file():
        made = kind.load(folder, lib)
    else:
        made = kind.fit(lib)
        made.save(folder)
    if rows is None:
        return made.vector(description, seed), told
    return made.vector(texts, seed), [{"rows": len(texts[: made.options.rows]), "file": str(rows)}]


def _texts(rows: Path) -> list[str]:
    """Rows of a text file: all, or of many MOST that are spaced evenly.  Raises OSError; ValueError for a file with
    columns, without rows, or in another encoding."""
    if rows.suffix.lower() in TABLES:
        raise ValueError(f"--rows takes a text file, a row a line; {rows} has columns: write its texts into one")
    try:
        with rows.open(encoding="utf-8") as lines:
            texts = evenly((line.strip() for line in lines if line.strip()), MOST)
    except UnicodeDecodeError as error:
        raise ValueError(f"{rows} is no text in UTF-8 ({error.reason}): save it as such") from None
    if not texts:
        raise ValueError(f"{rows} has no rows: a task vector is made of some, one a line")
    return texts


def evenly(lines: Iterable[str], most: int) -> list[str]:
    """At most so many of the lines, evenly spaced, in one pass that holds twice as many."""
    held: list[str] = []
    step = 1
    for i, line in enumerate(lines):
        if i % step:
            continue
        held.append(line)
        if len(held) == 2 * most:
            held, step = held[::2], 2 * step
    return [held[i] for i in spaced(len(held), most)]


def _note(description: str, how: How, told: list[dict[str, Any]]) -> str:
    """A sentence for the card."""
    from ..retrieve.describing import readable

    parts = ", ".join(f"{row['expert']} ({row['weight']:.2f})" for row in told if "expert" in row)
    of = f" of {parts}" if parts and how in (How.MIXTURE, How.NEAREST) else ""
    words = " ".join(readable(description).split()).replace("`", "'")
    return f"Made by `{how}`{of} for: {words} It was not trained on its task, and not measured."
