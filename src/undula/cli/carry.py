"""What goes with an adapter into a directory that a verb writes: its run, or what a colleague needs to open it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.adapter import Adapter
from ..train.base import asset_of, called_elsewhere, config_of, model_folder, quiet
from ..train.card import Card, put
from ..train.foreign import (
    BASE,
    CONFIG,
    Unmeasured,
    named_as,
    roles_of,
    telling,
)
from ..train.restored import described
from ..train.run import RUN
from ..train.tasks.described import DescribedClassification
from ..train.tasks.heads import HeadTask
from ..train.tasks.limits import settle_pad
from ..train.tasks.task import Task

UNOPENED = (
    "no class of transformers has classes that are told by descriptions. Its layers are called as in a model with a "
    "head (bert.encoder ...), and only `undula predict` has the descriptions: keep the adapter for that"
)


def carry(path: Path, adapter: Adapter, out: Path, model: str | None = None) -> None:
    """The run that made the adapter in `path`, beside what has become of it: what it is for (`model`: another base),
    not how to train it again."""
    if (path / RUN).is_file():
        method, run = adapter.method if adapter.methods else None, described(path, adapter, model)
        dataclasses.replace(run, out=out, method=method, allocator=None, overrides={}).save(None)


@dataclasses.dataclass(frozen=True)
class Companions:
    """What opens an exported LoRA elsewhere: the name of its base, the model's configuration with the names of the
    classes, the tokenizer or image processor, a card that says how to load it."""

    task: Task
    base: str
    config: Any
    processor: Any

    source: str
    adapter: Adapter

    def write(self, out: Path, called: str, note: str = "") -> None:
        """Into the directory `out`, which will be called `called`.  The configuration goes into base/config.json:
        one beside the adapter would make transformers look for a whole model there."""
        (out / CONFIG).parent.mkdir(exist_ok=True)
        self.config.save_pretrained((out / CONFIG).parent)
        if self.processor is not None:
            self.processor.save_pretrained(out)
        put(self.card(called, note), out)

    def card(self, called: str, note: str = "") -> Card:
        """The README of a directory of that name."""
        task, labels = self.task, self.config.id2label or {}
        named = isinstance(task, HeadTask) or bool(getattr(task, "names", ()))
        names = [str(labels[i]) for i in sorted(labels)] if named else []
        notes = (note, "") if note else ()
        return Card("peft", called, task, self.base, self.source, self.adapter, names, maker(self.processor), notes)


def companions(path: Path, adapter: Adapter, model: str | None) -> Companions | str:
    """The companions of the adapter in `path`; what is missing, in words, where its base cannot be opened here.  Where
    the base is one of the bundled models, its name is the hub's."""
    try:
        with quiet():
            run = described(path, adapter, model)
            source = model or run.model
            if isinstance(run.task, DescribedClassification):
                return UNOPENED
            config = config_of(source)
            own = not (path / RUN).is_file() and (path / "tokenizer_config.json").is_file()
            processor = run.task.processor(str(path) if own else model_folder(source))
            if not isinstance(run.task, Unmeasured) and hasattr(processor, "pad_token"):
                settle_pad(processor, config, config.get_text_config())  # as in training: a head reads before the pads
    except (ImportError, OSError, ValueError, LookupError) as error:
        return str(error).strip().split("\n")[0]
    if isinstance(run.task, HeadTask):
        for name, value in run.task.outputs().items():
            setattr(config, name, value)
    if not (path / RUN).is_file():
        named_as(config, path, config_of(source))
    asset = asset_of(source)
    setattr(config, BASE, source if asset else None)
    tell(config, run.task, roles_of(path, adapter))
    base = called_elsewhere(source) if asset else _resolved(source)
    return Companions(run.task, base, config, processor, source, adapter)


def maker(processor: Any) -> str | None:
    """The class of transformers that opens what makes a model's inputs."""
    if processor is None:
        return None
    for kind in ("ImageProcessor", "FeatureExtractor", "Processor"):
        if any(c.__name__.endswith((kind, kind + "Mixin")) for c in type(processor).__mro__):
            return f"Auto{kind}"
    return "AutoTokenizer"


def tell(config: Any, task: Task, roles: Sequence[str]) -> None:
    """Has a configuration say the task as it was trained, for `undula.load`; other readers pass it by."""
    if not isinstance(task, Unmeasured):
        for name, value in telling(task, roles).items():
            setattr(config, name, value)


def _resolved(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source
