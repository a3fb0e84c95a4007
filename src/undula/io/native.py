"""undula's own directory: PEFT's layout, with `peft_type: UNDULA` and everything about the methods under `undula`.

Keys are `base_model.model.<site>.undula_factors.<factor>`, and `base_model.model.<parameter>` for what was trained in
full: what PEFT writes when it hosts a method (`undula.peft_config`), so both read each other's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from ..core import VERSION as UNDULA
from ..core.adapter import ABOVE, Adapter
from ..host.build import rebuilt
from ..host.sharded import gathered, writes
from ..kernels import frozen
from . import diffusers, files, places
from .peft import about, read_lora
from .reading import (
    ABOUT,
    TYPE,
    VERSION,
    assemble,
    check_sizes,
    in_proportion,
    key_of,
    read_sites,
    split,
)

README = """# An adapter made with undula

With undula, on `model`, the one that `base_model_name_or_path` in adapter_config.json names (here: the path of this
directory):

```python
import undula

undula.attach(model, undula.Adapter.load(here))
```

With PEFT, where undula is installed: `undula.enable_peft()`, then `peft.PeftModel.from_pretrained(model, here)`.
Without undula PEFT does not know this type and ends in a KeyError: `undula export HERE --out plain` writes a plain LoRA
that PEFT, vLLM and others open alone, `undula merge HERE --out whole` an ordinary model.
"""
# What this module writes at the top of a configuration, and what PEFT does besides; the rest is `Adapter.about`.
WRITTEN = {"peft_type", files.MARKED, "inference_mode", "target_modules", "modules_to_save", "undula"}
WRITTEN |= {"method", "overrides", "exclude_modules", "layers_to_transform", "layers_pattern"}


T = TypeVar("T")


def save(adapter: Adapter, path: str | Path, base: str | None = None, task: str | None = None) -> None:
    """Writes the adapter as a directory that PEFT and undula read.  Tensors that sites share are stored once.

    `base` names the base model, `task` is PEFT's task type (`CAUSAL_LM`, `SEQ_CLS` ...), both for the reader's use;
    where they are not given `adapter.about` says them.  Over another adapter: see `undula.io.files.write`.  Raises
    ValueError for what `load` would refuse (a name that no file can hold), OSError where nothing can be written.
    """
    files.write(Path(path), *checked(adapter, base, task, str(path)), README)


def checked(
    adapter: Adapter, base: str | None, task: str | None, path: str, checksum: Callable[[Tensor], str] = frozen.checksum
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`laid_out`, and that `load` would take it.  Raises ValueError."""
    adapter.check_usable()
    data, tensors = laid_out(adapter, base, task, checksum)
    check_sizes(data["undula"]["methods"], path)
    named: list[tuple[str, tuple[str | None, str]]] = [(key_of(s, n), (s, n)) for s, n, _ in adapter.tensors()]
    named += [(files.PREFIX + n, (None, files.check_name(n, "parameter"))) for n in adapter.full]
    for key, meant in named:
        if split(key) != meant:
            raise ValueError(
                f"{meant[0] or ''} {meant[1]!r}: in a file this name would be read as {split(key)}: rename"
            )
    return data, tensors


def bytes_of(adapter: Adapter) -> int:
    """How many bytes `save` writes of it into a new directory: numbers, names, configuration, README.  Its tensors may
    be on the meta device, but for those that a seed makes."""
    return files.size(*laid_out(adapter, None, None), README)


def laid_out(
    adapter: Adapter, base: str | None, task: str | None, checksum: Callable[[Tensor], str] = frozen.checksum
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an adapter as they are on disk.  Methods are listed once, sites point to them by number.
    `checksum` tells those of its tensors, which may be outlines of what is elsewhere."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    checksums = _rebuildable(adapter, checksum)
    for site, name, t in adapter.tensors():
        key = key_of(site, name)
        if key in checksums:
            continue
        if id(t) in first:
            tied[key] = first[id(t)]
        else:
            first[id(t)], tensors[key] = key, t
    kinds = {m: i for i, m in enumerate(dict.fromkeys(adapter.methods.values()))}
    config = {
        **{k: v for k, v in adapter.about.items() if k not in ABOUT},
        "peft_type": TYPE,
        "task_type": adapter.about.get("task_type") if task is None else task,
        "base_model_name_or_path": adapter.about.get("base_model_name_or_path") if base is None else base,
        "inference_mode": True,
        "target_modules": list(adapter.methods),
        "modules_to_save": sorted({n.rpartition(".")[0] or n for n in adapter.full}) or None,
        "undula": {
            "version": VERSION,
            "methods": [m.encode() for m in kinds],
            "sites": {s: [kinds[m], *adapter.shapes[s]] for s, m in adapter.methods.items()},
            "order": list(adapter.methods),  # `sites` may come back sorted: PEFT writes its JSON so
            "kernels": {s: list(kernel) for s, kernel in adapter.kernels.items() if s in adapter.methods},
            "tied": tied,
            "rebuilt": checksums,
            "frozen": sorted(f"{s}.{n}" for s, n, t in adapter.tensors() if not t.requires_grad),
        },
    }
    apart = {s: why for s, why in adapter.apart.items() if s in adapter.methods}
    if apart:  # versions before this field read what has none
        config["undula"]["apart"] = apart
    whole = {"created_by": f"undula {UNDULA}", **adapter.about}
    config["undula"] |= {k: whole[k] for k in ABOUT if whole.get(k)}
    return config, tensors | {files.PREFIX + name: t for name, t in adapter.full.items()}


def _rebuildable(adapter: Adapter, checksum: Callable[[Tensor], str] = frozen.checksum) -> dict[str, str]:
    """{key: checksum} of the factors that need not be stored: made anew from their seeds, they are what they are."""
    stored = {id(t): t.numel() for _, _, t in adapter.tensors() if t.requires_grad}
    if not in_proportion(adapter.methods, adapter.shapes, sum(stored.values())):
        return {}
    anew, own = Once(frozen.checksum), Once(checksum)
    again = {(site, name): anew(t) for site, name, t in rebuilt(adapter.methods, adapter.shapes)}
    return {
        key_of(site, name): again[site, name]
        for site, name, t in adapter.tensors()
        if (site, name) in again and again[site, name] == own(t)
    }


class Once(Generic[T]):
    """`make(t)`, computed at the first call with t.  It holds no tensor: of one that is gone nothing is left, and
    another with its address is another."""

    def __init__(self, make: Callable[[Tensor], T]):
        self.make = make
        self.made: dict[int, tuple[weakref.ref[Tensor], T]] = {}

    def __call__(self, t: Tensor) -> T:
        found = self.made.get(id(t))
        if found is None or found[0]() is not t:
            found = self.made[id(t)] = weakref.ref(t), self.make(t)
        return found[1]


def load(path: str | Path) -> Adapter:
    """The adapter in a directory: undula's own, a plain PEFT LoRA, or a pipeline's LoRA, which may be a file too.

    Strict: an unknown method or field, a missing, surplus or misshapen tensor, one of another type, NaN, sizes that the
    file does not hold, names that are not module names: each is an error of its own, and nothing is returned.  Time and
    memory follow the size of the files, whatever they claim.  Raises FileNotFoundError, ValueError or LookupError for
    what is wrong with the directory; what the system says (no permission, no memory) comes as it is.
    """
    with files.door(str(path)):
        path = places.place(path)
        if places.pipeline_file(path) is not None:
            return diffusers.load_diffusers(path)
        return made(*files.read(path), path)


def made(data: Mapping[str, Any], tensors: dict[str, Tensor], path: Path) -> Adapter:
    """The adapter of a configuration and its tensors."""
    kind = data.get("peft_type")
    if kind == "LORA":
        return read_lora(data, tensors, str(path))
    if kind != TYPE or not isinstance(data.get("undula"), dict):
        raise ValueError(f"{path} holds peft_type {kind!r:.80}; undula reads {TYPE} and LORA")
    own = data["undula"]
    said = {k: v for k, v in data.items() if k not in WRITTEN and v is not None}
    return assemble(*read_sites(own, str(path)), own, tensors, about(said, str(path)), str(path))


def _save_whole(adapter: Adapter, path: str | Path, base: str | None, task: str | None) -> None:
    """`Adapter.save`."""
    whole = gathered(adapter)
    if writes(adapter):
        save(whole, path, base, task)


ABOVE |= {"save": _save_whole, "load": load}
