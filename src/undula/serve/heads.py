"""One body of an encoder, and what each adapter has of its own: its layers in the body, its head, its task.

A head is the model of its task (`BertForSequenceClassification` ...) without its body: in the body's place stands what
the shared one gave for these rows.  So whatever a model does behind its body is done by its own code, with classes,
sizes and problems of its own for each adapter.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..host.host import attach
from ..host.modules import Given, odd
from ..train.base import config_of, lacking, model_folder, open_model, opening, quiet
from ..train.foreign import CLASSES, Unmeasured, roles_of, whole_task
from ..train.restored import described
from ..train.run import RUN, Run
from ..train.tasks.heads import HeadTask
from ..train.tasks.limits import positions, table_of, vocabulary
from ..train.tasks.sentences import BEHIND, place_behind
from ..train.tasks.similarity import LIMIT, Similarity
from ..train.tasks.task import Processor, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Worn:
    """What an adapter has of its own beside its layers in the body.

    inner[path]: modules of the body that it trained in full (a pooler that the base's files lack); head: see above,
    None where its task has none.  alone: a layer of it sees other things than the rows of a batch, so that a batch is
    this adapter's alone.
    """

    run: Run
    processor: Processor
    roles: tuple[str, ...] = ()
    inner: Mapping[str, nn.Module] = field(default_factory=dict)
    head: PreTrainedModel | None = None
    alone: bool = False

    @property
    def task(self) -> Task:
        return self.run.task


@dataclass(frozen=True)
class Parts:
    """An adapter over a body: where its layers and its parameters in full are.  Of names beside the body the second
    are None."""

    run: Run
    whole: Adapter
    sites: Mapping[str, str | None]  # {its name: that in the body}
    full: Mapping[str, str | None]

    @property
    def body(self) -> Adapter:
        """Its layers in the body, called as there."""
        return _part(self.whole, {site: name for site, name in self.sites.items() if name is not None})

    @property
    def head(self) -> Adapter:
        """Its layers beside the body."""
        return _part(self.whole, {site: site for site, name in self.sites.items() if name is None})

    @property
    def inside(self) -> dict[str, Tensor]:
        """What it holds in full of the body, called as there."""
        return {name: self.whole.full[n] for n, name in self.full.items() if name is not None}

    @property
    def outside(self) -> dict[str, Tensor]:
        """What it holds in full beside the body."""
        return {n: self.whole.full[n] for n, name in self.full.items() if name is None}


class Body:
    """A pretrained encoder without a head.  Raises FileNotFoundError where `source` cannot be opened."""

    def __init__(self, source: str, dtype: torch.dtype = torch.float32):
        from transformers import AutoModel

        self.source, self.folder, self.dtype = source, model_folder(source), dtype
        with quiet(), opening(source):
            self.model, told = AutoModel.from_pretrained(self.folder, dtype=dtype, output_loading_info=True)
            with torch.device("meta"):
                self.outline = type(self.model)(self.model.config)  # its modules as no adapter has changed them
        self.model.eval().requires_grad_(False)
        if hasattr(self.model.config, "use_cache"):
            self.model.config.use_cache = False
        self.prefix = self.model.base_model_prefix + "."
        self.lacks = {str(n) for n in told["missing_keys"]} | {str(m[0]) for m in told.get("mismatched_keys", ())}
        self.odd = odd(self.model)
        self._shapes = {n: p.shape for n, p in self.model.named_parameters(remove_duplicate=False)}
        self.table, self.size = table_of(self.model), vocabulary(self.model)
        self._lock = threading.RLock()
        self._processors: dict[Any, Processor] = {}
        self._heads: dict[Any, Any] = {}

    def shared(self) -> Worn:
        """The base itself: its own head, where it has one that a task of undula's is for."""
        config = config_of(self.source)
        try:
            task: Task = whole_task(config, self.source)
        except ValueError:
            task = Unmeasured(None, "AutoModel")
        if not isinstance(task, HeadTask):
            task = Unmeasured(None, "AutoModel")
        run = Run(model=self.source, data="", task=task, method=None, out=Path(self.folder))
        if not isinstance(task, HeadTask):
            return Worn(run, None)
        return Worn(run, self.processor(task, None), head=self._head(run, {}))

    def part(self, path: Path, adapter: Adapter) -> Adapter:
        """The layers of the adapter in `path` (or of its outline) that are in this body, called as here.  Raises
        ValueError for an adapter that is for no encoder, and where what it holds in full fits nowhere."""
        parts = self._parts(path, adapter)
        if isinstance(parts.run.task, HeadTask):
            self._fitting(parts.run, parts.outside, set(parts.inside))
        self._check_inner(parts.inside, parts.body)
        return parts.body

    def wear(self, path: Path, adapter: Adapter) -> tuple[Adapter, Worn]:
        """(its layers in this body, what it has beside).  Raises as `part`."""
        parts = self._parts(path, adapter)
        run, body = parts.run, parts.body
        self._check_inner(parts.inside, body)
        worn = Worn(
            run,
            self.processor(run.task, path if not (path / RUN).is_file() else None),
            roles_of(path, adapter),
            self._inner(parts.inside),
            self._head(run, parts.outside, parts.head, set(parts.inside)) if isinstance(run.task, HeadTask) else None,
            any(site in self.odd for site in body.factors),
        )
        return body, worn

    def _parts(self, path: Path, adapter: Adapter) -> Parts:
        run = described(path, adapter, self.source)
        task = run.task
        if not isinstance(task, HeadTask | Similarity | Unmeasured):
            raise ValueError(
                f"{path.name} is for {type(task).__name__}, which writes: an encoder answers with classes, numbers and "
                "vectors. Serve it on its base as a language model"
            )
        adapter.check_usable()
        names = {n: self._name(n, task) for n in (*adapter.factors, *adapter.full)}
        beside = [n for n, name in names.items() if name is None]
        if isinstance(task, Similarity) and beside:
            raise ValueError(f"{path.name} has {', '.join(beside[:3])} beside the body, and its task has no head")
        return Parts(run, adapter, {s: names[s] for s in adapter.factors}, {n: names[n] for n in adapter.full})

    def _name(self, name: str, task: Task) -> str | None:
        """What a layer or a parameter is called in the body; None for one beside it."""
        if name.startswith(self.prefix):
            return name[len(self.prefix) :]
        return name if isinstance(task, Similarity) or name.partition(".")[0] in self.model._modules else None

    def processor(self, task: Task, path: Path | None) -> Processor:
        """What makes inputs of a task's rows: the base's, or that of a directory which brings its own."""
        own = path is not None and (path / "tokenizer_config.json").is_file()
        place = str(path) if own else self.folder
        key = type(task), place, getattr(task, "size", None)
        with self._lock:
            if own or key not in self._processors:
                with quiet(), opening(self.source):
                    made = task.processor(place)
                if isinstance(task, Similarity):
                    self.behind()
                task.agree(made, self.model)
                if own:
                    return made
                self._processors[key] = made
            return self._processors[key]

    def behind(self) -> tuple[Any, ...]:
        """What makes a text's vector of its tokens: what the base's folder says, else their mean.  Raises ValueError
        for a base that is no encoder."""
        with self._lock:
            if BEHIND not in self.model.__dict__:
                config = config_of(self.source)
                writes = [k for k in config.architectures or () if str(k).endswith(("CausalLM", "Generation"))]
                if writes and not (Path(self.folder) / "modules.json").is_file():
                    raise ValueError(
                        f"{writes[0]} is a language model, and its folder says of no pooling (modules.json of "
                        "sentence-transformers): the mean of its tokens is no embedding that anybody trained"
                    )
                self.model.__dict__[LIMIT] = place_behind(self.model, self.folder)
            found: tuple[Any, ...] = self.model.__dict__[BEHIND]
            return found

    def limit(self) -> int | None:
        """How many tokens a text may have."""
        limits = [positions(self.model), self.model.__dict__.get(LIMIT)]
        return min((n for n in limits if n is not None), default=None)

    def _fitting(self, run: Run, full: Mapping[str, Tensor], inside: Collection[str]) -> PreTrainedModel:
        """The head of a run's task, to be copied: without numbers where `full` has all of them, else the base's own.
        `inside`: the body's parameters that the adapter holds itself.  Raises ValueError for other shapes, and where
        random numbers would stay."""
        task = run.task
        assert isinstance(task, HeadTask)
        key = type(task), json.dumps(task.outputs(), default=str, sort_keys=True)
        with self._lock:
            if key not in self._heads:
                self._heads[key] = self._outline(task)
            outline, needs = self._heads[key]
            shapes = {n: p.shape for n, p in outline.named_parameters()}
            odd = [n for n, t in full.items() if shapes.get(n) != t.shape]
            if odd:
                found = tuple(shapes[odd[0]]) if odd[0] in shapes else "no such parameter"
                raise ValueError(
                    f"the adapter holds {odd[0]} {tuple(full[odd[0]].shape)} in full; {type(outline).__name__} of this "
                    f"base: {found}"
                )
            missing = [n for n in shapes if n not in full]
            random = [self.prefix + n for n in needs & self.lacks if n not in inside]
            if missing or any(b.is_meta for b in outline.buffers()):
                outline, new = self._opened(run, key)
                random += [n for n in missing if n in new]
        if random:
            raise ValueError(
                f"the base's files lack {', '.join(random[:5])}, and the adapter does not hold them: random numbers "
                "would answer. Train it again, or serve a base that has them"
            )
        found_head: PreTrainedModel = outline
        return found_head

    def _head(
        self, run: Run, full: Mapping[str, Tensor], beside: Adapter | None = None, inside: Collection[str] = ()
    ) -> PreTrainedModel:
        """The head of a run with these parameters, and with the layers of an adapter in it."""
        head = copy.deepcopy(self._fitting(run, full, inside))
        state = {n: t.detach().to(self.dtype, copy=True) for n, t in full.items()}
        head.load_state_dict(state, strict=False, assign=True)
        _pad_as(self.model, head)
        head.eval().requires_grad_(False).to(self.model.device)  # type: ignore[arg-type]
        if beside is not None and beside.factors:
            attach(head, beside)
        return head

    def _outline(self, task: HeadTask) -> tuple[PreTrainedModel, set[str]]:
        """(a head without numbers, the parameters that its model has in the body)."""
        import transformers

        name = task.auto or CLASSES[str(task.peft)]
        with quiet(), opening(self.source):
            config = transformers.AutoConfig.from_pretrained(self.folder, **task.outputs())
            with torch.device("meta"):
                made = task.outline(config) or getattr(transformers, name).from_config(config)
        return made, self._beheaded(made)

    def _opened(self, run: Run, key: Any) -> tuple[PreTrainedModel, set[str]]:
        """(the base's own head, the parameters of it that its files lack); opened once."""
        key = (*key, "opened")
        if key not in self._heads:
            made, _ = open_model(self.source, run.task, self.dtype, run.seed)
            new = set(lacking(made))
            self._beheaded(made)
            self._heads[key] = made, new
        found: tuple[PreTrainedModel, set[str]] = self._heads[key]
        return found

    def _beheaded(self, made: PreTrainedModel) -> set[str]:
        """Takes its body from a model.  Returns the body's parameters; raises ValueError where they are not this
        one's."""
        prefix = self.prefix.removesuffix(".")
        body = made._modules.get(prefix)
        if body is None or not all(self._shapes.get(n) == p.shape for n, p in body.named_parameters()):
            raise ValueError(
                f"{type(made).__name__} has no {type(self.model).__name__} as its body ({prefix!r}): there is nothing "
                "that its head could share with others"
            )
        names = {n for n, _ in body.named_parameters()}
        setattr(made, prefix, Given())
        return names

    def _check_inner(self, full: Mapping[str, Tensor], body: Adapter) -> None:
        """Raises ValueError for parameters of the body that not each row of a batch can have for itself."""
        for name, t in full.items():
            path, shape = name.rpartition(".")[0], self._shapes.get(name)
            if shape != t.shape:
                found = "no such parameter" if shape is None else tuple(shape)
                raise ValueError(f"the adapter holds {name} {tuple(t.shape)} in full; in this body: {found}")
            if path in self.odd or path in body.factors:
                why = "has factors of the adapter too" if path in body.factors else "does not see the rows of a batch"
                raise ValueError(
                    f"the adapter holds {name} in full, and that is no head: {path} {why}, so that a body which "
                    "others share cannot have it for some rows alone. Merge the adapter and serve it by itself"
                )

    def _inner(self, full: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """Modules of the body with parameters of an adapter's own."""
        made: dict[str, nn.Module] = {}
        for name, t in full.items():
            path, _, leaf = name.rpartition(".")
            if path not in made:
                made[path] = copy.deepcopy(self.outline.get_submodule(path))
                theirs = self.model.get_submodule(path).named_parameters(recurse=False)
                made[path].load_state_dict({n: p.detach() for n, p in theirs}, strict=False, assign=True)
            own = t.detach().to(self.model.device, self.dtype, copy=True)
            made[path].load_state_dict({leaf: own}, strict=False, assign=True)
        blank = [f"{path}.{n}" for path, module in made.items() for n, p in module.named_parameters() if p.is_meta]
        if blank:  # of a body whose layers are others by now, such as those of eight bits
            raise ValueError(
                f"the adapter lacks {', '.join(blank)} beside what it holds in full, and so does this body"
            )
        return {path: module.eval().requires_grad_(False) for path, module in made.items()}


def _pad_as(body: PreTrainedModel, head: PreTrainedModel) -> None:
    """The head's configuration pads as the body's does, which agrees with the tokenizer."""
    for config in (head.config, head.config.get_text_config()):
        config.pad_token_id = getattr(body.config, "pad_token_id", None)


def _part(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The part of an adapter at these sites, called as they say, with nothing in full."""
    parts = ("methods", "factors", "shapes", "kernels", "apart")
    taken: Any = {
        p: {new: v for old, new in names.items() if (v := getattr(adapter, p).get(old)) is not None} for p in parts
    }
    return replace(adapter, **taken, full={})
