"""Building a library: many trainings from one start, whose last checkpoints are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..io import files, toml
from ..jobs.file import read
from ..jobs.job import DONE, STOPPED, Job
from ..jobs.many import many
from ..jobs.view import Silent, View
from ..train.base import called_elsewhere
from ..train.recipe import Recipe
from ..train.run import Run
from .library import EXPERT, EXPERTS, LIBRARY, START, Expert, Library, embedded
from .pack import Layout, digest, moments

SNAPSHOTS, DESCRIPTION = "snapshots", "description"
SAME = ("model", "method", "where", "exclude", "overrides", "full", "seed", "dtype", "bits", "begin_from")
OF_BASE = ("model", "dtype", "bits")  # of one that goes on from an adapter the rest is checked when it begins


def build(
    jobs: str | Path | Mapping[str, Recipe],
    out: str | Path,
    descriptions: Mapping[str, str] | None = None,
    *,
    checkpoints: int = 8,
    share: float = 0.3,
    resume: bool = False,
    view: View | None = None,
) -> Library:
    """Trains experts (see `undula.train_many`) and makes a library of them in OUT.

        undula.generate.build("tasks.toml", out="library")

    jobs: as `train_many` takes them; in a file each has a `description` beside, of recipes `descriptions` has them by
    name.  checkpoints: how many are kept of the last `share` of each one's steps, evenly; of these are mean and
    variance.  With `resume` what has begun goes on, and a library gets more experts.

    Raises ValueError before anything trains where recipes differ from each other, or from those of the experts that are
    there, in what experts must share (base, method, layers, seed), train something in full, or lack a description; and
    where experts have failed, when the others are trained.
    """
    out = Path(out)
    recipes, told = _asked(jobs, out, descriptions, resume)
    before, like = _before(out)
    check(recipes, told, checkpoints, share, like)
    recorder = Recorder(out, checkpoints, share, view or Silent())
    done = many(recipes, out / EXPERTS, resume=resume, view=recorder)
    if lost := [f"{name}: {job.error or job.state}" for name, job in done.items() if job.state not in (DONE, STOPPED)]:
        raise ValueError(f"these experts have failed, and no library is made: {'; '.join(lost)}")
    return recorder.library(done, told, before)


def _before(out: Path) -> tuple[list[str], Recipe | None]:
    """The experts that a library in OUT has, and the run of one of them."""
    if not (out / LIBRARY).is_file():
        return [], None
    names = Library.load(out).names
    return names, Run.load(out / EXPERTS / names[0])


def _asked(
    jobs: str | Path | Mapping[str, Recipe], out: Path, descriptions: Mapping[str, str] | None, resume: bool
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """(recipes by name, their descriptions)."""
    if isinstance(jobs, Mapping):
        return dict(jobs), dict(descriptions or {})
    runs = read(jobs, out / EXPERTS, resume=resume, aside=(DESCRIPTION,))
    recipes = {name: Recipe(**{f.name: getattr(run, f.name) for f in fields(Recipe)}) for name, run in runs.items()}
    tables = toml.parsed(toml.text_of(Path(jobs)), str(jobs))["jobs"]
    told = {table["name"]: table[DESCRIPTION] for table in tables if DESCRIPTION in table}
    return recipes, {**told, **(descriptions or {})}


def check(
    recipes: Mapping[str, Recipe], told: Mapping[str, str], checkpoints: int, share: float, like: Recipe | None = None
) -> None:
    """Raises ValueError with all that keeps these from being experts of one library, that of `like` where there is
    one."""
    if not recipes:
        raise ValueError("a library is made of experts, and no job is given")
    wrong = []
    if checkpoints < 1 or not 0 < share <= 1:
        wrong.append(f"checkpoints is 1 or more and share above 0, at most 1; found {checkpoints} and {share:g}")
    first, where = (next(iter(recipes.values())), "in the first") if like is None else (like, "in the library")
    shared = told_of(first)
    for name, recipe in recipes.items():
        text = told.get(name)
        if not isinstance(text, str) or not text.strip():
            wrong.append(f"{name} has no description, a text that says what its task is")
        if recipe.task.has_head or recipe.full:
            what = f"the head of {type(recipe.task).__name__}" if recipe.task.has_head else ", ".join(recipe.full)
            wrong.append(
                f"{name} trains {what} in full, which fits one task alone: take a task without a head of its own "
                "(DescribedClassification), and no full"
            )
        if recipe.method is None and recipe.begin_from is None:
            wrong.append(f"{name} has no method: an expert is an adapter")
        for what in SAME if like is None or recipe.begin_from is None else OF_BASE:
            if told_of(recipe)[what] != shared[what]:
                own, other = getattr(recipe, what), getattr(first, what)
                wrong.append(f"{name}: {what} is {own!r:.80}, and {other!r:.80} {where}: experts share it")
    if odd := sorted(set(told) - set(recipes)):
        wrong.append(f"there are descriptions of {', '.join(odd[:5])}, which are no jobs")
    if wrong:
        raise ValueError("\n".join(wrong))


def told_of(recipe: Recipe) -> dict[str, Any]:
    """What experts share, as a file says it: folders by their whole paths."""
    said = recipe.encode()
    return {what: said.get(what) for what in SAME}


class Recorder:
    """Watches jobs: keeps the start, and the last checkpoints of each."""

    def __init__(self, out: Path, checkpoints: int, share: float, view: View):
        self.out, self.checkpoints, self.share, self.view = out, checkpoints, share, view
        self.layout: Layout | None = None
        self.start: Tensor | None = None

    def begun(self, job: Job) -> None:
        adapter = job.course.adapter
        if self.layout is None:
            self._open(adapter, job)
        assert self.layout is not None
        assert self.start is not None
        vector = self.layout.pack(adapter, job.name)
        if job.step == 0 and not torch.equal(vector, self.start):
            raise ValueError(f"{job.name} begins at other numbers than the first expert: give all one seed")
        self.view.begun(job)

    def _open(self, adapter: Adapter, job: Job) -> None:
        """Takes the start that lies there, or this one."""
        there = self.out / START
        if (there / files.CONFIG).is_file():
            kept = Adapter.load(there)
            self.layout = Layout.of(kept, str(there))
            self.start = self.layout.pack(kept)
            return
        if job.step:
            raise ValueError(f"{job.name} goes on at step {job.step}, and its start is gone ({there}): build anew")
        self.layout = Layout.of(adapter, job.name)
        self.start = self.layout.pack(adapter)
        adapter.copy().save(there, base=called_elsewhere(job.run.model))

    def stepped(self, job: Job) -> None:
        if job.step in kept_steps(job.steps, self.checkpoints, self.share):
            assert self.layout is not None
            folder = job.run.out / SNAPSHOTS
            folder.mkdir(exist_ok=True)
            files.write_state(folder, f"{job.step:06d}", {}, {"numbers": self.layout.pack(job.course.adapter)})
        self.view.stepped(job)

    def ended(self, job: Job) -> None:
        self.view.ended(job)

    def said(self, text: str) -> None:
        self.view.said(text)

    def library(self, done: Mapping[str, Job], told: Mapping[str, str], before: Sequence[str]) -> Library:
        """What these jobs came to, with the experts that were there before; it is written."""
        new = [name for name, job in done.items() if not (job.run.out / f"{EXPERT}.json").is_file()]
        if self.layout is None or self.start is None:  # all were finished: nothing has begun
            kept = Adapter.load(self.out / START)
            self.layout = Layout.of(kept)
            self.start = self.layout.pack(kept)
        model = str(told_of(next(iter(done.values())).run)["model"])  # of a folder the whole path
        vectors: Iterable[Tensor] = embedded(model, [told[name] for name in new]) if new else ()
        for name, embedding in zip(new, vectors, strict=True):
            self._expert(done[name], told[name], embedding).save(done[name].run.out, digest(self.start))
            shutil.rmtree(done[name].run.out / SNAPSHOTS)
        names = dict.fromkeys([*before, *done])
        experts = tuple(self._told(name, model, told) for name in names)
        made = Library(self.out, model, self.layout, self.start, experts)
        made.save()
        return Library.load(self.out)

    def _told(self, name: str, model: str, told: Mapping[str, str]) -> Expert:
        """One that is there, with the description that it has now."""
        folder = self.out / EXPERTS / name
        expert, start = Expert.load(folder)
        if told.get(name, expert.description) != expert.description:
            expert = replace(expert, description=told[name], embedding=embedded(model, [told[name]])[0])
            expert.save(folder, start)
        return expert

    def _expert(self, job: Job, description: str, embedding: Tensor) -> Expert:
        """Of a job that has just ended.  Raises ValueError where it ended before anything of it was kept."""
        paths = sorted((job.run.out / SNAPSHOTS).glob("*.safetensors"))
        if not paths:
            first = kept_steps(job.steps, self.checkpoints, self.share)[0]
            raise ValueError(f"{job.name} ended at step {job.step}, before the first kept checkpoint at {first}")
        rows = torch.stack([files.read_state(path.parent, path.stem)[1]["numbers"] for path in paths])
        report = job.report or {}
        metric = str(report.get("metric"))
        before, after = ((report.get(k) or {}).get(metric) for k in ("before", "after"))
        figures = {"metric": metric, "before": before, "after": after, "steps": [int(p.stem) for p in paths]}
        return Expert(job.name, description, embedding, *moments(rows), rows, figures)


def kept_steps(steps: int, checkpoints: int, share: float) -> list[int]:
    """The steps after which a checkpoint is kept: evenly over the last `share`, the last step among them."""
    last = max(1, round(share * steps))
    number = min(checkpoints, last)
    return [steps - last * i // number for i in reversed(range(number))]
