"""Adapter directories that no `undula train` left: which model they are for, from what they and their base say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..core.adapter import Adapter
from ..core.ranges import Count
from ..host.matrices import resolve
from ..io import files
from .base import config_of
from .data.faults import Faults
from .tasks.causal_lm import CausalLM
from .tasks.classification import Classification, Regression
from .tasks.multi_label import MultiLabel
from .tasks.seq2seq import Seq2Seq
from .tasks.similarity import Similarity
from .tasks.task import Example, Examples, Processor, Task
from .tasks.token_classification import TokenClassification

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel

# PEFT's task types, and the classes of transformers that PEFT opens for them
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
CONFIG, BASE = "base/config.json", "undula_base"  # the configuration beside an exported LoRA; its key for our own name
TOLD = "undula_task"  # a configuration's key for the task as it was trained, and the roles that its rows had


SAID: dict[Any, type[Task]] = {"CAUSAL_LM": CausalLM, "SEQ_2_SEQ_LM": Seq2Seq}  # a type that says all of the task


@dataclass(frozen=True)
class Unmeasured(Task):
    """A task that undula has no data and no metric for: its adapters are merged, truncated, cut and exported alone.

    `peft` is PEFT's name of it, `model_class` the class of transformers that opens the model, `labels` how many
    outputs its head has (None: as the base says).
    """

    roles: ClassVar = {}
    headline = "loss"

    peft: str | None  # type: ignore[misc]
    model_class: str
    labels: Count | None = None

    def rows(self, split: Dataset) -> Dataset:
        raise self._unread()

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        raise self._unread()

    def answers(
        self, model: PreTrainedModel, rows: Iterable[Mapping[str, Any]], processor: Processor, batch: int
    ) -> Iterator[dict[str, Any]]:
        raise self._unread()

    def _unread(self) -> ValueError:
        return ValueError(
            f"undula reads no data for adapters of the task type {self.peft!r} ({self.model_class}): it merges them, "
            "and truncates and exports those that have an update dW (--how truncate). In Python the model itself is "
            "at hand: undula.load(path).model"
        )

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        import transformers

        outputs = {} if self.labels is None else {"num_labels": self.labels, "ignore_mismatched_sizes": True}
        return getattr(transformers, self.model_class).from_pretrained(path, dtype=dtype, **quantised, **outputs)

    def processor(self, path: str) -> Processor:
        """What makes the model's inputs, where the base's folder has one: nothing here needs it."""
        import transformers

        for kind in ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor"):
            try:
                return getattr(transformers, kind).from_pretrained(path)
            except Exception:  # whatever is raised where there is none: a TypeError for a tokenizer without a file
                continue
        return None

    def agree(self, processor: Processor, model: PreTrainedModel) -> None:
        pass

    def example(self, row: Mapping[str, Any], processor: Processor, /) -> Example:
        raise NotImplementedError

    def collator(self, processor: Processor, /) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        raise NotImplementedError

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        raise NotImplementedError


def own_name(path: Path) -> str | None:
    """What undula itself calls the base of a LoRA that it has exported, where that is a bundled model."""
    found = _json(path / CONFIG).get(BASE)
    return found if isinstance(found, str) and found else None


def base_of(path: Path, config: Mapping[str, Any], model: str | None) -> str:
    """The base of an adapter directory: the one that is named, else the one that it says.  Raises ValueError."""
    base = model or own_name(path) or config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} does not say which model it is for: name it (model=..., or --model)")
    return base


def task_of(path: Path, config: Mapping[str, Any], adapter: Adapter, base: str) -> Task:
    """The task of an adapter directory.  Raises what opening the base's configuration raises."""
    kind = config.get("task_type")
    told = told_task(_json(path / CONFIG), str(path / CONFIG))
    if told is not None:
        if told[0].peft != kind:
            raise ValueError(
                f"{path / CONFIG} says {type(told[0]).__name__} (task_type {told[0].peft}), {path / files.CONFIG} says "
                f"task_type {kind}: make them agree"
            )
        return told[0]
    if kind in SAID:
        return SAID[kind]()
    of_base = config_of(base)
    if kind == Classification.peft:
        return _classification(path, adapter, of_base)
    if kind is not None and kind not in CLASSES:
        raise ValueError(
            f"{path} has task_type {kind!r}, which is none of PEFT's: {', '.join(CLASSES)}. Attach it in Python: "
            "undula.attach(model, undula.Adapter.load(path))"
        )
    name = _class(config, adapter, of_base) if kind is None else CLASSES[kind]
    if kind == Similarity.peft and importlib.util.find_spec("sentence_transformers") is not None:
        return Similarity()
    if kind == TokenClassification.peft:
        return TokenClassification(names=_all_names(path, of_base, _count(name, adapter, of_base)))
    return Unmeasured(kind, name, _count(name, adapter, of_base))


def told_task(config: Mapping[str, Any], where: str) -> tuple[Task, tuple[str, ...]] | None:
    """(the task, the roles of its rows) that a configuration holds which undula wrote; None where it holds none.
    Raises ValueError or LookupError for what is malformed."""
    found = config.get(TOLD)
    if found is None:
        return None
    with files.door(where):
        if not isinstance(found, Mapping):
            raise ValueError(f"{TOLD} is an object, found {found!r:.80}")
        task, roles = Task.decode(found.get("task")), found.get("roles") or []
        if not isinstance(roles, list) or not all(role in task.roles for role in roles):
            raise ValueError(f"{TOLD}.roles lists roles of {type(task).__name__}; found {roles!r:.80}")
        return task, tuple(roles)


def telling(task: Task, roles: Sequence[str]) -> dict[str, Any]:
    """What `told_task` reads."""
    return {TOLD: {"task": task.encode(), "roles": list(roles)}}


def roles_of(path: Path, adapter: Adapter) -> tuple[str, ...]:
    """The roles of the rows that an adapter was trained on; empty where nothing says it."""
    told = adapter.about.get("training", {}).get("roles")
    if told is None:
        found = told_task(_json(path / CONFIG), str(path / CONFIG))
        told = () if found is None else found[1]
    return tuple(map(str, told)) if isinstance(told, list | tuple) else ()


def whole_task(config: PretrainedConfig, where: str) -> Task:
    """The task of a whole model, by its configuration.  Raises ValueError for one that undula has no task for."""
    for kind in Task.registry.values():
        made = kind.of_model(config)
        if made is not None:
            return made
    kinds = ", ".join(getattr(config, "architectures", None) or ()) or "no architecture"
    raise ValueError(f"{where} is a model for which undula has no task ({kinds}): open it with transformers")


def named_as(config: PretrainedConfig, path: Path, of_base: PretrainedConfig) -> None:
    """The classes of a model that is opened for somebody else's adapter are called as the adapter's directory or the
    base calls them, and its kind of problem stays; a head of another size has transformers' own names."""
    count = int(config.num_labels or 0)
    found = _names(path, of_base, count) or {i: f"LABEL_{i}" for i in range(count)}
    config.id2label, config.label2id = found, {name: i for i, name in found.items()}
    config.problem_type = _json(path / CONFIG).get("problem_type") or of_base.problem_type


def _classification(path: Path, adapter: Adapter, of_base: PretrainedConfig) -> Task:
    found = _count(CLASSES["SEQ_CLS"], adapter, of_base)
    count = int(of_base.num_labels or 0) if found is None else found
    names = _names(path, of_base, count)
    said = _json(path / CONFIG).get("problem_type") or of_base.problem_type
    if said == "multi_label_classification":
        return MultiLabel(names=_all_names(path, of_base, count))
    if count == 1:
        return Regression()
    if names is None or all(name == f"LABEL_{i}" for i, name in names.items()):
        return Classification(names=tuple(str(i) for i in range(count)))
    return Classification(names=tuple(names[i] for i in range(count)))


def _all_names(path: Path, of_base: PretrainedConfig, count: int | None) -> tuple[str, ...]:
    """The names of so many classes (None: as many as the base has); their numbers where nothing names them."""
    count = int(of_base.num_labels or 0) if count is None else count
    names = _names(path, of_base, count)
    return tuple(names[i] if names else str(i) for i in range(count))


def _names(path: Path, of_base: PretrainedConfig, count: int) -> dict[int, str] | None:
    """The names of so many classes that stand beside the adapter, else those of the base; None where there are none."""
    own = _json(path / files.CONFIG).get("undula")
    classes = own.get("classes") if isinstance(own, Mapping) else None
    ours = dict(enumerate(classes)) if isinstance(classes, list) else None
    for found in (_json(path / CONFIG).get("id2label"), ours, of_base.id2label):
        if isinstance(found, Mapping) and sorted(map(str, found)) == sorted(map(str, range(count))):
            return {int(i): str(name) for i, name in sorted(found.items(), key=lambda pair: int(pair[0]))}
    return None


def _count(name: str, adapter: Adapter, of_base: PretrainedConfig) -> int | None:
    """How many outputs the head has that an adapter was trained with.  The output layer is the one whose shape follows
    the number of labels: other matrices beside the body (a pooler, a layer before the output) do not tell it.  None
    where the adapter holds no such layer: then it is the base's own."""
    held: dict[str, tuple[int, ...]] = {f"{s}.weight": O_I for s, O_I in adapter.shapes.items()}
    held |= {n: tuple(t.shape) for n, t in adapter.full.items()}
    few, more = (_shapes(name, of_base, n) for n in (3, 4))
    for parameter, shape in held.items():
        small, large = few.get(parameter), more.get(parameter)
        if small is None or large is None or small == large or len(shape) != len(small):
            continue
        return next(n for n, a, b in zip(shape, small, large, strict=True) if a != b)
    return None


def _shapes(name: str, of_base: PretrainedConfig, labels: int) -> dict[str, tuple[int, ...]]:
    config = type(of_base).from_dict({**of_base.to_dict(), "num_labels": labels, "id2label": None, "label2id": None})
    config.num_labels = labels
    return {n: tuple(p.shape) for n, p in outline_of(name, config).named_parameters()}


def outline_of(name: str, config: PretrainedConfig) -> PreTrainedModel:
    """A model without numbers."""
    import transformers

    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind.from_config(config) if name.startswith("Auto") else kind(config)


def _class(config: Mapping[str, Any], adapter: Adapter, of_base: PretrainedConfig) -> str:
    """For a directory without a task type: the first class that has all of the adapter's layers among the one that PEFT
    noted, those that wrote the base, and the bare body."""
    for name in _candidates(config, of_base):
        outline = outline_of(name, of_base)
        if all(resolve(outline, site) is not None for site in adapter.factors):
            return name
    raise ValueError(
        f"the adapter says no task type, and no class that its base names has its layers "
        f"({', '.join(list(adapter.factors)[:3])}). Attach it in Python: "
        "undula.attach(model, undula.Adapter.load(path))"
    )


def _candidates(config: Mapping[str, Any], of_base: PretrainedConfig) -> Iterator[str]:
    import transformers

    noted = config.get("auto_mapping")
    named = [noted.get("base_model_class")] if isinstance(noted, Mapping) else []
    for name in (*named, *(of_base.architectures or ()), "AutoModel"):
        kind = getattr(transformers, str(name), None)
        if name == "AutoModel" or (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            yield str(name)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
