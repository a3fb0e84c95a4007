"""One body of an encoder, and what each adapter has of its own: its layers in the body, its head, its task.

A head is the model of its task (`BertForSequenceClassification` ...) without its body: in the body's place stands what
the shared one gave for these rows.  So whatever a model does behind its body is done by its own code, with classes,
sizes and problems of its own for each adapter.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..host.host import attach
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

OUTPUTS = ("output_hidden_states", "output_attentions")


class Given(nn.Module):
    """In the place of a body: the output that another one computed of the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    def forward(self, *args: Any, **named: Any) -> Any:
        asked = [name for name in OUTPUTS if named.get(name)]
        if asked:
            raise TypeError(f"the head asks its body for {', '.join(asked)}, which a shared body does not give")
        return self.output


@dataclass(frozen=True)
class Worn:
    """What a directory of an adapter is over a shared body.

    adapter: its layers in the body, called as there, nothing in full; inner[path]: modules of the body that it trained
    in full (a pooler that the base's files lack); head: see above, None where its task has none.  alone: a layer of it
    sees other things than the rows of a batch, so that a batch is this adapter's alone.
    """

    run: Run
    processor: Processor
    adapter: Adapter
    roles: tuple[str, ...] = ()
    inner: Mapping[str, nn.Module] = field(default_factory=dict)
    head: PreTrainedModel | None = None
    alone: bool = False

    @property
    def task(self) -> Task:
        return self.run.task

    @property
    def bytes(self) -> int:
        """Of what is its own beside the adapter."""
        modules = [*self.inner.values(), *([] if self.head is None else [self.head])]
        return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())


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
        self.odd = _odd(self.model)
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
            return Worn(run, None, Adapter({}, {}, {}))
        return Worn(run, self.processor(task, None), Adapter({}, {}, {}), head=self._head(run, {}))

    def wear(self, path: Path, adapter: Adapter) -> Worn:
        """What the adapter in `path` is over this body.  Raises ValueError for one that is for no encoder, or whose
        parameters in full fit nowhere."""
        run = described(path, adapter, self.source)
        task = run.task
        if not isinstance(task, HeadTask | Similarity | Unmeasured):
            raise ValueError(
                f"{path.name} is for {type(task).__name__}, which writes: an encoder answers with classes, numbers and "
                "vectors. Serve it on its base as a language model"
            )
        adapter.check_usable()
        sites = {site: self._name(site, task) for site in adapter.factors}
        full = {name: self._name(name, task) for name in adapter.full}
        head = None
        if isinstance(task, HeadTask):
            outside = {n: t for n, t in adapter.full.items() if full[n] is None}
            beside = _part(adapter, {site: site for site, name in sites.items() if name is None})
            head = self._head(run, outside, beside, set(full.values()) - {None})
        elif isinstance(task, Similarity) and None in {*sites.values(), *full.values()}:
            names = [n for n, name in {**sites, **full}.items() if name is None]
            raise ValueError(f"{path.name} has {', '.join(names[:3])} beside the body, and its task has no head")
        inside = {site: name for site, name in sites.items() if name is not None}
        return Worn(
            run,
            self.processor(task, path if not (path / RUN).is_file() else None),
            _part(adapter, inside),
            roles_of(path, adapter),
            self._inner({name: adapter.full[n] for n, name in full.items() if name is not None}, inside.values()),
            head,
            any(name in self.odd for name in inside.values()),
        )

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

    def _head(
        self, run: Run, full: Mapping[str, Tensor], beside: Adapter | None = None, inside: Any = frozenset()
    ) -> PreTrainedModel:
        """The head of a run, with these parameters; those that are missing are the base's own.  `inside`: the body's
        parameters that the adapter holds itself."""
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
        head: PreTrainedModel = copy.deepcopy(outline)
        state = {n: t.detach().to(self.dtype, copy=True) for n, t in full.items()}
        head.load_state_dict(state, strict=False, assign=True)
        _pad_as(self.model, head)
        head.eval().requires_grad_(False).to(self.model.device)
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
                made = getattr(transformers, name).from_config(config)
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
        mine = {n: p.shape for n, p in self.model.named_parameters()}
        if body is None or not all(mine.get(n) == p.shape for n, p in body.named_parameters()):
            raise ValueError(
                f"{type(made).__name__} has no {type(self.model).__name__} as its body ({prefix!r}) that its head could "
                "share with others"
            )
        names = {n for n, _ in body.named_parameters()}
        setattr(made, prefix, Given())
        return names

    def _inner(self, full: Mapping[str, Tensor], sites: Any) -> dict[str, nn.Module]:
        """Modules of the body with parameters of an adapter's own."""
        made: dict[str, nn.Module] = {}
        for name in full:
            path, _, leaf = name.rpartition(".")
            mine = self.model.get_parameter(name) if self._has(name) else None
            if mine is None or mine.shape != full[name].shape:
                found = "no such parameter" if mine is None else tuple(mine.shape)
                raise ValueError(f"the adapter holds {name} {tuple(full[name].shape)} in full; in this body: {found}")
            if path in self.odd or path in set(sites):
                why = "has factors of the adapter too" if path in set(sites) else "does not see the rows of a batch"
                raise ValueError(
                    f"the adapter holds {name} in full, and that is no head: {path} {why}, so that a shared body "
                    "cannot have it for some rows alone. Merge the adapter and serve it by itself"
                )
            if path not in made:
                made[path] = copy.deepcopy(self.outline.get_submodule(path))
                theirs = {n: p.detach() for n, p in self.model.get_submodule(path).named_parameters(recurse=False)}
                made[path].load_state_dict(theirs, strict=False, assign=True)
            made[path].load_state_dict(
                {leaf: full[name].detach().to(mine.device, self.dtype, copy=True)}, strict=False, assign=True
            )
        return {path: module.eval().requires_grad_(False) for path, module in made.items()}

    def _has(self, name: str) -> bool:
        try:
            self.model.get_parameter(name)
        except AttributeError:
            return False
        return True


def _pad_as(body: PreTrainedModel, head: PreTrainedModel) -> None:
    """The head's configuration pads as the body's does, which agrees with the tokenizer."""
    for config in (head.config, head.config.get_text_config()):
        config.pad_token_id = getattr(body.config, "pad_token_id", None)


def _part(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The part of an adapter at these sites, called as they say, with nothing in full."""
    parts = ("methods", "factors", "shapes", "kernels", "apart")
    taken = {p: {new: v for old, new in names.items() if (v := getattr(adapter, p).get(old)) is not None} for p in parts}
    return replace(adapter, **taken, full={})


def _odd(model: PreTrainedModel) -> set[str]:
    """The modules that see something else than the rows of a batch first (positions, distances): where two rows, or
    two adapters, have one input.  Told by a batch of three texts; those that it does not reach are among them."""
    seen: dict[str, bool] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            first = args[0] if args else next(iter(named.values()), None)
            rows = all(isinstance(t, Tensor) and t.shape[:1] == (3,) for t in (first, out))
            seen[name] = seen.get(name, True) and rows

        return hook

    weighted = {n: m for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    handles = [m.register_forward_hook(look(n), with_kwargs=True) for n, m in weighted.items()]
    try:
        with torch.no_grad():
            model(**_three(model))
    finally:
        for handle in handles:
            handle.remove()
    return {n for n in weighted if not seen.get(n, False)}


def _three(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of three rows of any content."""
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.ones(3, 5, dtype=torch.long, device=model.device)}
    size, channels = getattr(model.config, "image_size", 32), getattr(model.config, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    return {model.main_input_name: torch.zeros(3, channels, height, width, device=model.device, dtype=model.dtype)}


Split = list[tuple[slice, nn.Module]]


@contextlib.contextmanager
def own_modules(body: nn.Module, inner: Mapping[str, Split]) -> Iterator[None]:
    """Within, rows of a batch go through modules of their own in the place of the body's; slices in their order."""
    before = {path: body.get_submodule(path).__dict__.get("forward") for path in inner}
    try:
        for path, own in inner.items():
            module = body.get_submodule(path)
            module.__dict__["forward"] = _splitting(module, before[path], own)
        yield
    finally:
        for path, forward in before.items():
            module = body.get_submodule(path)
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _splitting(module: nn.Module, before: Any, own: Split) -> Any:
    def forward(x: Tensor) -> Tensor:
        y = type(module).forward(module, x) if before is None else before(x)
        parts, at = [], 0
        for rows, mine in own:
            parts += [y[at : rows.start], mine(x[rows])]
            at = rows.stop
        return torch.cat([*parts, y[at:]])

    return forward
