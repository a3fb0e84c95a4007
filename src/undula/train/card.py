"""The README of a directory that others open: what it is, what it was trained on, how it is loaded; with the hub's
metadata before it."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.adapter import Adapter
from ..io.draft import write_text
from ..io.native import README as NATIVE
from ..io.peft import README as PEFT
from .base import asset_of, called_elsewhere
from .data.load import BUNDLED
from .data.media import MEDIA
from .foreign import CLASSES, Unmeasured
from .run import Run
from .tasks.causal_lm import CausalLM
from .tasks.task import Task

MARK = "<!-- written by undula -->"
MARKDOWN = re.compile(r"[\\`*\[\]]")
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LORA = """```python
from peft import PeftModel
from transformers import AutoConfig, {cls}

config = AutoConfig.from_pretrained({here}, subfolder="base")
base = {cls}.from_pretrained({base}, config=config)
model = PeftModel.from_pretrained(base, {here})
```

Or, where PEFT is installed, with transformers alone (`config` as above): `model = {cls}.from_pretrained({here},
config=config)`.
"""
ONE = """
In one line, without the names of its classes:
`AutoPeftModelForSequenceClassification.from_pretrained({here}, num_labels={count})`. Without `num_labels` PEFT opens
the base with the head that its own files have.
"""
LOCAL = """
**The base is a folder of the machine on which this was made**: `{base}`. Elsewhere, put the place of the same model
there, in the lines above and as `base_model_name_or_path` in `adapter_config.json`.
"""
OURS = """
The adapter was trained on `{source}` of undula, which is {title}.{hub} Exactly that base, with undula:
`base = {cls}.from_pretrained(undula.bundled.model_path("{name}"){config})`.
"""
ON_HUB = (
    " On the hub the same model is `{hub}`; where undula's has been converted from fewer bits, outputs over the hub's "
    "weights differ a little."
)
UNDULA = """```python
import undula

opened = undula.load({here})
print({asked})
```
"""
NOT_PLAIN = """
PEFT opens it where undula is installed, after `undula.enable_peft()`; without undula it does not know this type.
`undula export {path} --out plain` writes a plain LoRA for PEFT, transformers and others alone, and says what that
costs; `undula merge {path} --out merged` an ordinary model.
"""
WHOLE = """```python
from transformers import {cls}

model = {cls}.from_pretrained({here})
```
"""


@dataclass(frozen=True)
class Card:
    """What a README is made of.  `form`: whether the directory holds an adapter of undula's, a plain LoRA or a whole
    model; `here`: its name; `base`: its base as others call it; `source`: as undula does."""

    form: str
    here: str
    task: Task
    base: str
    source: str
    adapter: Adapter
    names: Sequence[str] = ()
    processor: str | None = None  # the class of transformers that makes the model's inputs
    notes: tuple[str, ...] = field(default=())

    def text(self) -> str:
        asset = asset_of(self.source)
        of = f" for {word(self.base if asset is None or asset.hub else asset.title)}"
        title = {"peft": "A LoRA adapter", "undula": "An adapter made with undula", "whole": "A model"}[self.form]
        said = f"# {title}{of if self.form != 'whole' else f', adapted from {word(self.base)}'}"
        parts = [front(self), MARK, "", said, "", *_table(self), *_figures(self.adapter.about), *self.notes]
        return "\n".join(parts) + "\n## Loading it\n\n" + "".join(_loading(self))


def front(card: Card) -> str:
    """The hub's metadata, as YAML between lines of three hyphens.  What is not known, a licence above all, is not
    said."""
    from huggingface_hub import ModelCardData

    here = HUB.fullmatch(card.base) and not Path(card.base).exists()
    library = {"peft": "peft", "undula": "undula", "whole": "transformers"}[card.form]
    tags = ["undula", *dict.fromkeys(type(m).public().__name__.lower() for m in card.adapter.methods.values())]
    if card.form == "peft":
        tags = list(dict.fromkeys(["lora", *tags]))
    data = ModelCardData(
        base_model=card.base if here else None,
        library_name=library,
        pipeline_tag=card.task.pipeline,
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _table(card: Card) -> Iterator[str]:
    adapter, told = card.adapter, card.adapter.about.get("training") or {}
    yield "| | |"
    yield "|---|---|"
    yield f"| base | {word(card.base)} |"
    yield f"| task | {_task(card)} |"
    for method in dict.fromkeys(adapter.methods.values()):
        yield f"| method | {cell(type(method).__name__)}: `{cell(type(method).formula)}`; {cell(type(method).source)} |"
        yield f"| its options | `{cell(repr(method))}` |"
    full = sum(t.numel() for t in adapter.full.values())
    whole = f", {full:,} of them in full (`{'`, `'.join(list(adapter.full)[:6])}`)" if full else ""
    yield f"| size | {adapter.num_parameters():,} numbers at {len(adapter.methods)} layers{whole} |"
    if told:
        rows = f"{told.get('train_rows')} rows trained on, {told.get('eval_rows')} held out"
        yield f"| data | {word(str(told.get('data')))}: {rows} |"
        yield (
            f"| training | {told.get('steps')} steps of {told.get('rows_in_a_step')} rows, learning rate "
            f"{told.get('lr')}, seed {told.get('seed')} |"
        )
    yield ""


def _task(card: Card) -> str:
    kind = card.task.model_class if isinstance(card.task, Unmeasured) else type(card.task).__name__
    classes = f". Its classes, in order: {', '.join(map(word, card.names))}" if len(card.names) > 1 else ""
    return f"{kind}{classes}"


def _figures(about: Mapping[str, Any]) -> Iterator[str]:
    told = about.get("training") or {}
    before, after = told.get("before") or {}, told.get("after") or {}
    if after:
        yield f"On the {told.get('eval_rows')} rows held out:"
        yield ""
        yield "| metric | before | after |"
        yield "|---|---|---|"
        for name, value in after.items():
            earlier = before.get(name)
            was, now = ("" if v is None else f"{v:.4g}" for v in (earlier, value))
            yield f"| {word(name)} | {was} | {now or 'not finite'} |"
        yield ""


def _loading(card: Card) -> Iterator[str]:
    cls, asset = opener(card.task), asset_of(card.source)
    if card.form == "peft":
        yield LORA.format(here=quoted(card.here), cls=cls, base=quoted(card.base))
        if cls == CLASSES["SEQ_CLS"]:
            yield ONE.format(here=quoted(card.here), count=max(len(card.names), 1))
    elif card.form == "whole":
        yield WHOLE.format(here=quoted(card.here), cls=cls)
    if card.processor is not None and card.form != "undula":
        yield f"\nIts inputs are made by `{card.processor}.from_pretrained({quoted(card.here)})`.\n"
    if card.form != "undula":
        yield "\nWith undula:\n\n"
    yield UNDULA.format(here=quoted(card.here), asked=asking(card.task, card.adapter.about))
    if card.form == "undula":
        yield NOT_PLAIN.format(path=shlex.quote(card.here))
    if card.form != "whole" and Path(card.base).is_absolute():
        yield LOCAL.format(base=card.base)
    if asset is not None and card.form != "whole":
        config = ", config=config" if card.form == "peft" else ""
        hub = ON_HUB.format(hub=asset.hub) if asset.hub else ""
        yield OURS.format(
            source=BUNDLED + asset.name, title=asset.title, hub=hub, cls=cls, name=asset.name, config=config
        )


def asking(task: Task, about: Mapping[str, Any]) -> str:
    """A line of Python that asks a model of this task something."""
    medium = next((m for role, m in MEDIA.items() if role in task.roles), None)
    if isinstance(task, Unmeasured):
        return "opened.model"
    if medium is not None:
        return f'opened.predict("{"photo.jpg" if medium.column == "image" else "sound.wav"}")'
    if isinstance(task, CausalLM):
        return 'opened.generate("a prompt")'
    pair = "pair" in ((about.get("training") or {}).get("roles") or ())
    texts = '[("a text", "another")]' if pair else '["a text", "another"]'
    return f"opened.predict({texts})"


def opener(task: Task) -> str:
    """The class of transformers that opens the model of a task."""
    if isinstance(task, Unmeasured):
        return task.model_class
    return task.auto or CLASSES.get(str(task.peft), "AutoModel")


def cell(text: str) -> str:
    """A text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def word(text: str) -> str:
    """A text of other people's, to the letter: nothing of it is Markdown or HTML."""
    whole = html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")
    return MARKDOWN.sub(r"\\\g<0>", whole)


def quoted(text: str) -> str:
    """A text in a line of Python."""
    return json.dumps(text, ensure_ascii=False)


def put(card: Card, folder: Path) -> None:
    """Writes README.md into `folder`; one that somebody else wrote stays."""
    path = folder / "README.md"
    try:
        there = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = ""
    except (OSError, ValueError):
        return
    first = there.partition("\n")[0]
    if not there or MARK in there or first in (NATIVE.partition("\n")[0], PEFT.partition("\n")[0]):
        write_text(path, card.text())


def of_run(run: Run, adapter: Adapter) -> Card:
    """That of what a training left."""
    names = tuple(getattr(run.task, "names", ()))
    base = called_elsewhere(run.model)
    return Card("undula", run.out.resolve().name, run.task, base, run.model, adapter, names)
