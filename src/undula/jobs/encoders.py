"""Classifications: the body of a model runs once for the rows of all jobs, each job's head on its own rows.

A head is the model of the job's task without its body: in the body's place stands what the shared one gave for these
rows.  So whatever a model does behind its body is done by its own code, with classes of its own for each job.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Live
from ..host.host import attach, detach
from ..host.mixing import rows as rows_of
from ..host.modules import Given, Split, exchanged, odd, own_modules
from ..host.state import exchange, stand_in
from ..kernels import draws
from ..observe.listen import moved
from ..train.base import open_model
from ..train.prepared import Prepared, prepare
from ..train.rows import LOG
from ..train.run import Run
from ..train.tasks.limits import vocabulary
from ..train.tasks.packing import Flat
from ..train.tasks.segments import LENGTHS, segments
from ..train.tasks.task import Processor
from ..train.tasks.weighing import weighed
from .base import READ, Base, Part, Read
from .course import Course, Row
from .planner import flat as in_one_row
from .streams import Draws, Streams, Stretch, generator_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 64  # tokens of a row that stands for others
POOLER = "pooler"  # of a body: sees the first token of each row alone, see `train.tasks.firsts`


@dataclass(frozen=True)
class Worn:
    """What a job has of its own: the model of its task, whose body is the shared one, and modules of the body with
    parameters that train in full, by their paths there.  sites: whether it adapts any layer."""

    whole: nn.Module
    sites: bool
    inside: Mapping[str, nn.Parameter] = field(default_factory=dict)  # by their names in the whole model
    inner: Mapping[str, nn.Module] = field(default_factory=dict)


class Encoders(Base):
    """A body, and a head for each job."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Module()
        self.prefix = ""
        self.worn: dict[str, Worn] = {}
        self.processor: Processor | None = None
        self.first: Any = None  # the whole model of the job that opened the body

    @property
    def whole(self) -> Any:
        return self.first

    @property
    def body(self) -> nn.Module:
        return self.held.get_submodule(self.prefix)

    def prepared(self, run: Run, name: str, read: Read = READ) -> tuple[Prepared, Live]:
        self.close()
        ready = prepare(replace(run, gradient_checkpointing=bool(run.gradient_checkpointing)), self._opened, read=read)
        whole, prefix = ready.model, ready.model.base_model_prefix
        if not isinstance(whole._modules.get(prefix), nn.Module):
            raise ValueError(f"{type(whole).__name__} has no body ({prefix!r}) that jobs could share")
        made = detach(whole).copy()
        whole.requires_grad_(False)
        outside = [site for site in made.factors if not site.startswith(f"{prefix}.")]
        if outside:
            raise ValueError(
                f"{', '.join(outside[:3])}: layers beside the body that jobs share, where a head of its own trains in "
                f"full; leave them out: exclude={tuple(outside)!r}"
            )
        if not self.prefix:
            self.prefix = prefix
            self.held.add_module(prefix, whole.get_submodule(prefix))
            self._open(whole, run)
            self.first, self.step = whole, run.task.step(ready.train, whole)
            if self.step.gather is not None:
                self.size = in_one_row
            elif self.step.note is not None:
                LOG.warning(self.step.note)
        whole._modules[prefix] = self.body
        full = {n: nn.Parameter(t.detach().clone()) for n, t in made.full.items()}
        inside = {n: p for n, p in full.items() if n.startswith(f"{prefix}.")}
        for n, p in full.items():
            if n not in inside:
                stand_in(whole, n, p)
        live = Live.of(Adapter({}, {}, {}))
        if made.factors:
            given = attach(self.held, replace(made, full={}), name=name)
            assert isinstance(given, Live)
            live = given
        self.worn[name] = Worn(whole, bool(made.factors), inside, self._inner(inside, live))
        whole_adapter = Adapter(
            live.methods, live.factors, live.shapes, full, made.kernels, made.about, made.apart, made.weight
        )
        return ready, Live.of(whole_adapter)

    def _opened(self, run: Run) -> tuple[PreTrainedModel, Processor]:
        """The whole model of a job, with the processor that the first one has: a tokenizer takes 12 MB."""
        model, own = open_model(run.model, run.task, run.dtype, run.seed, run.bits)
        self.processor = own if self.processor is None else self.processor
        return model, self.processor

    def _inner(self, inside: Mapping[str, nn.Parameter], adapter: Adapter) -> dict[str, nn.Module]:
        """Modules of the body with parameters of a job's own.  Raises ValueError for what not each row of a batch can
        have for itself."""
        made: dict[str, nn.Module] = {}
        strange = odd(self.body) if inside else set()  # type: ignore[arg-type]
        for name, p in inside.items():
            path, _, leaf = name.removeprefix(f"{self.prefix}.").rpartition(".")
            if path in strange or f"{self.prefix}.{path}" in adapter.factors:
                why = "does not see the rows of a batch" if path in strange else "has factors too"
                raise ValueError(
                    f"{name} would train in full, and {path} {why}: jobs that share the body cannot have it for some "
                    "rows alone. Train this job by itself: undula train"
                )
            if path not in made:
                made[path] = copy.deepcopy(self.body.get_submodule(path)).requires_grad_(False)
            if made[path]._parameters[leaf].dtype != p.dtype:  # type: ignore[union-attr]
                raise ValueError(
                    f"{name} trains in full, in {p.dtype}: give the jobs that dtype, or train it by itself"
                )
            exchange(made[path], leaf, p)
        return made

    @contextlib.contextmanager
    def placed(self, name: str) -> Iterator[None]:
        worn = self.worn[name]
        before = {n: exchange(worn.whole, n, p) for n, p in worn.inside.items()}
        try:
            yield
        finally:
            for n, p in before.items():
                exchange(worn.whole, n, p)

    def by_itself(self, ready: Prepared) -> Prepared:
        """On a model of its own: the one of its task has the shared body, on which the adapters of all jobs stand."""
        model, _ = self._opened(ready.run)
        return replace(ready, model=model, adapter=attach(model, ready.adapter.copy()))

    def selects(self, name: str) -> str | None:
        return name if self.worn[name].sites else None

    def forget(self, name: str) -> None:
        super().forget(name)
        self.worn.pop(name, None)

    def sample(self, course: Course, tokens: int) -> list[Row]:
        like, made = course.ready.train[0], []
        size = vocabulary(self.body) or 2
        for n, at in enumerate(range(0, tokens, LENGTH)):
            length = min(LENGTH, tokens - at)
            ids = torch.randint(size, (length,), generator=generator_of(n, 0, torch.device("cpu"))).tolist()
            of_tokens = {k: [1] * length for k, v in like.items() if isinstance(v, list) and len(v) > 1}
            example = {**like, **of_tokens, "input_ids": ids, "labels": like["labels"]}
            if "token_type_ids" in example:
                example["token_type_ids"] = [0] * length
            made.append(Row(example, -1 - n, length, 1))
        return made

    def names(self, parts: Sequence[Part]) -> list[str | None]:
        return [self.selects(course.job.name) for course, _, _ in parts]

    def flat(self, parts: Sequence[Part]) -> bool:
        """Modules that rows have for themselves are told which rows those are, or which vectors made of rows."""
        if self.step.gather is None or self._own is not None:
            return self.step.gather is not None
        return all(self._of_rows(path) for course, _, _ in parts for path in self.worn[course.job.name].inner)

    def _of_rows(self, path: str) -> bool:
        """Whether a module of the body sees one vector of each row."""
        return path == POOLER or path.startswith(f"{POOLER}.")

    def stretches(self, parts: Sequence[Part]) -> Streams:
        device, flat = _device(self.body), self.flat(parts)
        width = max(row.tokens for _, mine, _ in parts for row in mine)
        left = parts[0][0].ready.train.processor.padding_side == "left"
        found, at = [], 0
        for course, mine, _ in parts:
            for row in mine:
                drawn = Draws(course.ready.run.seed, row.number, device)
                begin = at if flat else width - row.tokens if left else 0
                found.append(Stretch(course.job.name, begin, row.tokens, drawn))
                at += row.tokens
        return Streams(found, None if flat else width)

    def losses(self, parts: Sequence[Part]) -> list[Tensor]:
        batch = self._batch(parts)
        if self._own is not None:
            ((course, mine, items),) = parts
            return [_loss(course, self.worn[course.job.name].whole, batch, mine, items)]
        ends, inner = [0], dict[str, Split]()
        for course, mine, _ in parts:
            ends.append(ends[-1] + len(mine))
            for path, module in self.worn[course.job.name].inner.items():
                inner.setdefault(path, []).append((slice(*ends[-2:]), module.train()))
        with own_modules(self.body, inner), self._vectors(parts):
            out = self.body(**batch)
        rows = [slice(*pair) for pair in itertools.pairwise(ends)]
        return [self._headed(part, own, batch, out) for part, own in zip(parts, rows, strict=True)]

    def _batch(self, parts: Sequence[Part]) -> Mapping[str, Tensor]:
        """Of the rows of all parts, without their labels."""
        texts = [{k: v for k, v in row.example.items() if k != "labels"} for _, mine, _ in parts for row in mine]
        if not self.flat(parts):
            pad = parts[0][0].ready.train.processor.pad
            return moved(dict(pad(texts, return_tensors="pt")), _device(self.body))
        gather = self.step.gather
        assert isinstance(gather, Flat)
        made = replace(gather, labels=lambda _: {}).row(texts)
        return moved({k: v for k, v in made.items() if k != "segments"}, _device(self.body))

    @contextlib.contextmanager
    def _vectors(self, parts: Sequence[Part]) -> Iterator[None]:
        """Within, what sees one vector of each row instead of its tokens is told whose those are."""
        module: Any = getattr(self.body, POOLER, None)
        sites = {site for course, _, _ in parts for site in course.adapter.factors}
        if not self.flat(parts) or not any(self._of_rows(site.removeprefix(f"{self.prefix}.")) for site in sites):
            yield
            return
        names = [name for name, (_, mine, _) in zip(self.names(parts), parts, strict=True) for _ in mine]
        usual = module.forward

        def forward(*args: Any, **named: Any) -> Any:
            with rows_of(self.held, names, [1] * len(names)):
                return usual(*args, **named)

        with exchanged(module, forward):
            yield

    def _headed(self, part: Part, rows: slice, batch: Mapping[str, Tensor], out: Any) -> Tensor:
        """The loss of one job, whose rows these are, of what the body gave for all."""
        course, mine, items = part
        whole, lengths = self.worn[course.job.name].whole, LENGTHS.get()
        given = Given()
        if lengths is None:
            given.output, own = _cut(out, rows, len(batch["input_ids"])), {k: v[rows] for k, v in batch.items()}
        else:
            tokens = slice(sum(lengths[: rows.start]), sum(lengths[: rows.stop]))
            given.output = _cut(out, rows, len(lengths), tokens, sum(lengths))
            own = {k: v[:, tokens] for k, v in batch.items()}
        whole._modules[self.prefix] = given
        try:
            with draws.among(course.job.name), segments(None if lengths is None else lengths[rows]):
                return _loss(course, whole, own, mine, items)
        finally:
            whole._modules[self.prefix] = self.body


def _loss(course: Course, whole: nn.Module, batch: Mapping[str, Tensor], mine: Sequence[Row], items: int) -> Tensor:
    """Of these rows of a job, by its own model."""
    labels = torch.tensor([row.example["labels"] for row in mine], device=batch["input_ids"].device)
    found = whole(**batch, labels=labels)
    loss: Tensor = found.loss if course.weights is None else weighed(found.logits, labels, course.weights)
    return loss * (len(mine) / items)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _cut(out: Any, rows: slice, count: int, tokens: slice | None = None, of: int = 0) -> Any:
    """The part of a body's output that is of some of `count` rows, or of `tokens`, some of those `of` one row."""

    def part(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if tokens is not None and t.shape[:2] == (1, of):
            return t[:, tokens]
        return t[rows] if t.shape[:1] == (count,) else t

    if isinstance(out, Mapping):
        return type(out)(**{k: part(v) for k, v in out.items()})
    return tuple(part(t) for t in out) if isinstance(out, tuple) else part(out)
