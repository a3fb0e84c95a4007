"""undula's own directory: PEFT's layout, with `peft_type: UNDULA` and everything about the methods under `undula`.

Keys are `base_model.model.<site>.undula_factors.<factor>`, and `base_model.model.<parameter>` for what was trained in
full: what PEFT writes when it hosts a method (`undula.peft_config`), so both read each other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import VERSION as UNDULA
from ..core.adapter import ABOVE, Adapter
from ..host.build import rebuilt
from ..host.sharded import gathered, writes
from ..kernels import frozen
from . import diffusers, files
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

Load it with `undula.Adapter.load(path)`, or, after `import undula` and `undula.enable_peft()`, with
`peft.PeftModel.from_pretrained(model, path)`.  Without undula, PEFT does not know this type and ends in a KeyError.
"""
# What this module writes at the top of a configuration, and what PEFT does besides; the rest is `Adapter.about`.
WRITTEN = {"peft_type", files.MARKED, "inference_mode", "target_modules", "modules_to_save", "undula"}
WRITTEN |= {"method", "overrides", "exclude_modules", "layers_to_transform", "layers_pattern"}


def save(adapter: Adapter, path: str | Path, base: str | None = None, task: str | None = None) -> None:
    """Writes the adapter as a directory that PEFT and undula read.  Tensors that sites share are stored once.

    `base` names the base model, `task` is PEFT's task type (`CAUSAL_LM`, `SEQ_CLS` ...), both for the reader's use;
    where they are not given `adapter.about` says them.  Over another adapter: see `undula.io.files.write`.  Raises
    ValueError for what `load` would refuse (a name that no file can hold), OSError where nothing can be written.
    """
    adapter.check_usable()
    data, tensors = laid_out(adapter, base, task)
    check_sizes(data["undula"]["methods"], str(path))
    named: list[tuple[str, tuple[str | None, str]]] = [(key_of(s, n), (s, n)) for s, n, _ in adapter.tensors()]
    named += [(files.PREFIX + n, (None, files.check_name(n, "parameter"))) for n in adapter.full]
    for key, meant in named:
        if split(key) != meant:
            raise ValueError(
                f"{meant[0] or ''} {meant[1]!r}: in a file this name would be read as {split(key)}: rename"
            )
    files.write(Path(path), data, tensors, README)


def laid_out(adapter: Adapter, base: str | None, task: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an adapter as they are on disk.  Methods are listed once, sites point to them by number."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    checksums = _rebuildable(adapter)
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


def _rebuildable(adapter: Adapter) -> dict[str, str]:
    """{key: checksum} of the factors that need not be stored: made anew from their seeds, they are what they are."""
    stored = {id(t): t.numel() for _, _, t in adapter.tensors() if t.requires_grad}
    if not in_proportion(adapter.methods, adapter.shapes, sum(stored.values())):
        return {}
    once: dict[int, tuple[Tensor, str]] = {}  # holds the tensors too, so that no id is used twice

    def checksum(t: Tensor) -> str:
        return once.setdefault(id(t), (t, frozen.checksum(t)))[1]

    again = {(site, name): checksum(t) for site, name, t in rebuilt(adapter.methods, adapter.shapes)}
    return {
        key_of(site, name): again[site, name]
        for site, name, t in adapter.tensors()
        if (site, name) in again and again[site, name] == checksum(t)
    }


def load(path: str | Path) -> Adapter:
    """The adapter in a directory: undula's own, or a plain PEFT LoRA.

    Strict: an unknown method or field, a missing, surplus or misshapen tensor, one of another type, NaN, sizes that the
    file does not hold, names that are not module names: each is an error of its own, and nothing is returned.  Time and
    memory follow the size of the files, whatever they claim.  Raises FileNotFoundError, ValueError or LookupError for
    what is wrong with the directory; what the system says (no permission, no memory) comes as it is.
    """
    path = Path(path)
    with files.door(str(path)):
        if not (path / files.CONFIG).is_file() and (path / diffusers.WEIGHTS).is_file():
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
