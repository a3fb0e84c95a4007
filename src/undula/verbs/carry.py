"""What goes with an adapter into a directory that a verb writes: its run, or what a colleague needs to open it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..bundled import ASSETS, Asset
from ..io import files
from ..train.base import config_of, model_folder, quiet
from ..train.data import BUNDLED
from ..train.foreign import BASE, CLASSES, CONFIG, Unmeasured, named_as
from ..train.heads import HeadTask
from ..train.image_classification import ImageClassification
from ..train.restored import described
from ..train.run import RUN, Run
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
{processor}{classes}{notes}"""
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


def carry(path: Path, adapter: Adapter, out: Path) -> None:
    """The run that made the adapter in `path`, beside what has become of it: what it is for, not how to train it
    again."""
    if (path / RUN).is_file():
        method = adapter.method if adapter.methods else None
        dataclasses.replace(Run.load(path), out=out, method=method, allocator=None, overrides={}).save(None)


def companions(path: Path, adapter: Adapter, out: Path, model: str | None, called: str) -> str | None:
    """Puts beside an exported LoRA what opens it elsewhere: the model's configuration with the names of the classes
    (base/config.json: one beside the adapter would make transformers look for a whole model there), the tokenizer or
    image processor, and a card that says how to load it.  Where the base is one of the bundled models, its name becomes
    the hub's.  Returns what is missing, in words; None where it is all there.
    """
    try:
        with quiet():
            run = described(path, adapter, model)
            source = model or run.model
            config = config_of(source)
            processor = run.task.processor(model_folder(source))
    except (ImportError, OSError, ValueError, LookupError) as error:
        return str(error).strip().split("\n")[0]
    if isinstance(run.task, HeadTask):
        for name, value in run.task.outputs().items():
            setattr(config, name, value)
    if not (path / RUN).is_file():
        named_as(config, path, config_of(source))
    asset = _asset(source)
    setattr(config, BASE, source if asset else None)
    (out / CONFIG).parent.mkdir(exist_ok=True)
    config.save_pretrained((out / CONFIG).parent)
    if processor is not None:
        processor.save_pretrained(out)
    base = (asset.hub or source) if asset else _resolved(source)
    _rename(out, base)
    files.write_text(out / "README.md", _card(run.task, config, base, asset, called, type(processor).__name__))
    return None


def _asset(source: str) -> Asset | None:
    return ASSETS.get(source.removeprefix(BUNDLED)) if source.startswith(BUNDLED) else None


def _resolved(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _rename(out: Path, base: str) -> None:
    """The base's name in the configuration of the adapter in `out`."""
    told = json.loads((out / files.CONFIG).read_text(encoding="utf-8"))
    files.write_text(out / files.CONFIG, json.dumps(told | {"base_model_name_or_path": base}, indent=2) + "\n")


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
    classes = f"\nIts classes, in order: {', '.join(names)}.\n" if len(names) > 1 else ""
    of = f" for {base if asset is None or asset.hub else asset.title}"
    return CARD.format(of=of, cls=cls, here=here, base=base, processor=inputs, classes=classes, notes=notes)


def opener(task: Task) -> str:
    """The class of transformers that opens the model of a task."""
    if isinstance(task, Unmeasured):
        return task.model_class
    return "AutoModelForImageClassification" if task.peft is None else CLASSES[task.peft]
