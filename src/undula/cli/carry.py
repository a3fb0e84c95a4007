"""What goes with an adapter into a directory that a verb writes: its run, or what a colleague needs to open it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundled import Asset
from ..core.adapter import Adapter
from ..io import files
from ..train.base import asset_of, called_elsewhere, config_of, model_folder, quiet
from ..train.data import BUNDLED
from ..train.foreign import BASE, CLASSES, CONFIG, Unmeasured, named_as, roles_of, telling
from ..train.heads import HeadTask
from ..train.image_classification import ImageClassification
from ..train.limits import settle_pad
from ..train.restored import described
from ..train.run import RUN
from ..train.task import Task

CARD = """# A LoRA adapter{of}

A plain LoRA in PEFT's format, written by undula.

```python
from peft import PeftModel
from transformers import AutoConfig, {cls}

config = AutoConfig.from_pretrained("{here}", subfolder="base")
base = {cls}.from_pretrained("{base}", config=config)
model = PeftModel.from_pretrained(base, "{here}")
```
{one}{processor}{classes}{notes}"""
ONE = """
In one line, without the names of its classes:
`AutoPeftModelForSequenceClassification.from_pretrained("{here}", num_labels={count})`. Without `num_labels` PEFT opens
the base with the head that its own files have.
"""
LOCAL = """
**The base is a folder of the machine on which this was made**: `{base}`. Elsewhere, put the place of the same model
there, in the lines above and as `base_model_name_or_path` in `adapter_config.json`.
"""
OURS = """
The adapter was trained on `{source}` of undula, which is {title}.{hub} Exactly that base, with undula:
`base = {cls}.from_pretrained(undula.bundled.model_path("{name}"), config=config)`.
"""
ON_HUB = (
    " On the hub the same model is `{hub}`; where undula's has been converted from fewer bits, outputs over the hub's "
    "weights differ a little."
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
    asset: Asset | None
    config: Any
    processor: Any

    def write(self, out: Path, called: str) -> None:
        """Into the directory `out`, which will be called `called`.  The configuration goes into base/config.json:
        one beside the adapter would make transformers look for a whole model there."""
        (out / CONFIG).parent.mkdir(exist_ok=True)
        self.config.save_pretrained((out / CONFIG).parent)
        if self.processor is not None:
            self.processor.save_pretrained(out)
        kind = type(self.processor).__name__
        files.write_text(out / "README.md", _card(self.task, self.config, self.base, self.asset, called, kind))


def companions(path: Path, adapter: Adapter, model: str | None) -> Companions | str:
    """The companions of the adapter in `path`; what is missing, in words, where its base cannot be opened here.  Where
    the base is one of the bundled models, its name is the hub's."""
    try:
        with quiet():
            run = described(path, adapter, model)
            source = model or run.model
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
    return Companions(run.task, base, asset, config, processor)


def tell(config: Any, task: Task, roles: Sequence[str]) -> None:
    """Has a configuration say the task as it was trained, for `undula.load`; other readers pass it by."""
    if not isinstance(task, Unmeasured):
        for name, value in telling(task, roles).items():
            setattr(config, name, value)


def _resolved(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _card(task: Task, config: Any, base: str, asset: Asset | None, here: str, processor: str) -> str:
    cls = opener(task)
    notes = ""
    if Path(base).is_absolute():
        notes = LOCAL.format(base=base)
    if asset is not None:
        hub = ON_HUB.format(hub=asset.hub) if asset.hub else ""
        notes = OURS.format(source=BUNDLED + asset.name, title=asset.title, hub=hub, cls=cls, name=asset.name)
    kind = "AutoImageProcessor" if isinstance(task, ImageClassification) else "AutoTokenizer"
    inputs = "" if processor == "NoneType" else f'\nIts inputs are made by `{kind}.from_pretrained("{here}")`.\n'
    names = [str(config.id2label[i]) for i in sorted(config.id2label)] if isinstance(task, HeadTask) else []
    one = ONE.format(here=here, count=len(config.id2label)) if cls == CLASSES["SEQ_CLS"] else ""
    classes = f"\nIts classes, in order: {', '.join(names)}.\n" if len(names) > 1 else ""
    of = f" for {base if asset is None or asset.hub else asset.title}"
    return CARD.format(of=of, cls=cls, here=here, base=base, one=one, processor=inputs, classes=classes, notes=notes)


def opener(task: Task) -> str:
    """The class of transformers that opens the model of a task."""
    if isinstance(task, Unmeasured):
        return task.model_class
    return "AutoModelForImageClassification" if task.peft is None else CLASSES[task.peft]
