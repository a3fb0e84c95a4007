"""undula's own directory: PEFT's layout, with `peft_type: UNDULA` and everything about the methods under `undula`.

Keys are `base_model.model.<site>.undula_factors.<factor>`, and `base_model.model.<parameter>` for what was trained in
full: what PEFT writes when it hosts a method (`undula.peft_config`), so both read each other's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..kernels import frozen
from ..making import check_shapes, rebuilt
from ..method import Method
from ..sites import outline
from . import diffusers, files
from .peft import read_lora

VERSION = 1
TYPE, MARK = "UNDULA", ".undula_factors."
README = """# An adapter made with undula

Load it with `undula.Adapter.load(path)`, or, after `import undula` and `undula.enable_peft()`, with
`peft.PeftModel.from_pretrained(model, path)`.  Without undula, PEFT does not know this type and ends in a KeyError.
"""


def save(adapter: Adapter, path: str | Path, base: str | None = None, task: str | None = None) -> None:
    """Writes the adapter as a directory that PEFT and undula read.  Tensors that sites share are stored once.

    `base` names the base model, `task` is PEFT's task type (`CAUSAL_LM`, `SEQ_CLS` ...), both for the reader's use.
    """
    data, tensors = laid_out(adapter, base, task)
    files.write(Path(path), data, tensors, {"README.md": README})


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
    kinds = list(dict.fromkeys(adapter.methods.values()))
    config = {
        "peft_type": TYPE,
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(adapter.methods),
        "modules_to_save": sorted({n.rpartition(".")[0] or n for n in adapter.full}) or None,
        "undula": {
            "version": VERSION,
            "methods": [m.encode() for m in kinds],
            "sites": {s: [kinds.index(m), *adapter.shapes[s]] for s, m in adapter.methods.items()},
            "order": list(adapter.methods),  # `sites` may come back sorted: PEFT writes its JSON so
            "kernels": {s: list(kernel) for s, kernel in adapter.kernels.items()},
            "tied": tied,
            "rebuilt": checksums,
            "frozen": sorted(f"{s}.{n}" for s, n, t in adapter.tensors() if not t.requires_grad),
        },
    }
    return config, tensors | {files.PREFIX + name: t for name, t in adapter.full.items()}


def key_of(site: str, factor: str) -> str:
    """The key on disk of a factor."""
    return f"{files.PREFIX}{site}{MARK}{factor}"


def _rebuildable(adapter: Adapter) -> dict[str, str]:
    """{key: checksum} of the factors that need not be stored: made anew from their seeds, they are what they are."""
    once: dict[int, tuple[Tensor, str]] = {}  # holds the tensors too, so that no id is used twice

    def checksum(t: Tensor) -> str:
        return once.setdefault(id(t), (t, frozen.checksum(t)))[1]

    again = {(site, name): checksum(t) for site, name, t in rebuilt(adapter.methods, adapter.shapes)}
    return {
        key_of(site, name): again[site, name]
        for site, name, t in adapter.tensors()
        if (site, name) in again and again[site, name] == checksum(t)
    }


def _rebuild(
    methods: Mapping[str, Method], shapes: Mapping[str, tuple[int, int]], checksums: Mapping[str, Any], path: str
) -> Iterator[tuple[str, str, Tensor]]:
    """(site, factor, tensor) of what the file leaves to be made anew.  Raises ValueError where a checksum differs."""
    if not checksums:
        return
    left = dict(checksums)
    for site, name, t in rebuilt(methods, shapes):
        wanted = left.pop(key_of(site, name), None)
        if wanted is not None and wanted != frozen.checksum(t):
            raise ValueError(
                f"{path}: {site}.{name} is rebuilt from its seed with the checksum {frozen.checksum(t)}; the file says "
                f"{str(wanted)!r:.40}: it was changed by hand, or a later version of undula draws other numbers"
            )
        if wanted is not None:
            yield site, name, t
    if left:
        raise ValueError(f"{path}: {next(iter(left))!r:.100} cannot be rebuilt from a seed, and is not in the file")


def load(path: str | Path) -> Adapter:
    """The adapter in a directory: undula's own, or a plain PEFT LoRA.

    Strict: an unknown method or field, a missing, surplus or misshapen tensor, NaN, sizes that the file does not hold,
    names that are not module names: each is an error of its own, and nothing is returned.
    """
    path = Path(path)
    if not (path / files.CONFIG).is_file() and (path / diffusers.WEIGHTS).is_file():
        return diffusers.load_diffusers(path)
    data, tensors = files.read(path)
    kind = data.get("peft_type")
    if kind == "LORA":
        return read_lora(data, tensors, str(path))
    if kind != TYPE or not isinstance(data.get("undula"), dict):
        raise ValueError(f"{path} holds peft_type {kind!r}; undula reads {TYPE} and LORA")
    own = data["undula"]
    return _assemble(*read_sites(own, str(path)), own, tensors, str(path))


def read_sites(own: Mapping[str, Any], path: str) -> tuple[dict[str, Method], dict[str, tuple[int, int]]]:
    """Method and shape of every site, from the config's `undula` object.  Raises ValueError or LookupError."""
    if own.get("version") != VERSION:
        raise ValueError(f"{path} has format version {own.get('version')!r}; this undula reads version {VERSION}")
    listed, sites = own.get("methods"), own.get("sites")
    if not isinstance(listed, list) or not isinstance(sites, dict):
        raise ValueError(f"{path}: the config lists no methods or no sites")
    kinds = [Method.decode(m) for m in listed]
    methods, shapes = {}, {}
    for site, entry in sites.items():
        if site:
            files.check_name(site, "site")
        match entry:
            case [int(number), int(O), int(I)] if 0 <= number < len(kinds) and O > 0 and I > 0:
                methods[site], shapes[site] = kinds[number], (O, I)
            case _:
                raise ValueError(f"{path}: site {site} is [method of {len(kinds)}, O, I]; found {entry!r:.80}")
    order = own.get("order", list(sites))
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(sites):
        raise ValueError(f"{path}: `order` has other sites than `sites`")
    return {site: methods[site] for site in order}, {site: shapes[site] for site in order}


def _assemble(
    methods: dict[str, Method],
    shapes: dict[str, tuple[int, int]],
    own: Mapping[str, Any],
    tensors: dict[str, Tensor],
    path: str,
) -> Adapter:
    tied, still = own.get("tied", {}), set(own.get("frozen", []))
    factors: dict[str, dict[str, Tensor]] = {s: {} for s in methods}
    full: dict[str, Tensor] = {}
    for key, t in untied(tensors, tied, path).items():
        site, factor = split(key)
        if site is None:
            full[files.check_name(factor, "parameter")] = t.requires_grad_()
        elif site not in factors:
            raise ValueError(f"{path} holds a tensor for {site!r:.100}, which its config does not name")
        else:
            factors[site][factor] = t.requires_grad_(t.is_floating_point() and f"{site}.{factor}" not in still)
    for site, factor, t in _rebuild(methods, shapes, own.get("rebuilt", {}), path):
        if factor in factors[site]:
            raise ValueError(f"{path}: {site}.{factor} is rebuilt from a seed, and in the file as well")
        factors[site][factor] = t
    if not factors and not full:
        raise ValueError(f"{path} holds neither factors nor parameters")
    for site, f in factors.items():
        check_shapes(f"{path}: {site}", f, methods[site].init(outline(site, shapes[site])))
    return Adapter(methods, factors, shapes, full, _kernels(own.get("kernels", {}), shapes, path))


def as_recorded(adapter: Adapter, own: Mapping[str, Any], path: str) -> None:
    """Checks new factors against the shapes in a config, and gives them its ties and frozen marks."""
    for site, shape in read_sites(own, path)[1].items():
        if adapter.shapes[site] != shape:
            raise ValueError(f"{site} is {adapter.shapes[site]} (O, I) in this model, {shape} in the adapter")
    for site, factor, t in adapter.tensors():
        t.requires_grad_(t.is_floating_point() and f"{site}.{factor}" not in own.get("frozen", []))
    for _ in _rebuild(adapter.methods, adapter.shapes, own.get("rebuilt", {}), path):
        pass  # the checksums hold
    every = {key_of(s, k): t for s, k, t in adapter.tensors()}
    for key, target in own.get("tied", {}).items():
        if key not in every or target not in every or every[key].shape != every[target].shape:
            raise ValueError(f"{path}: {key!r:.100} is tied to {target!r:.100}, which does not fit")
        at, factor = split(key)
        adapter.factors[str(at)][factor] = every[target]  # type: ignore[index]


def _kernels(found: Any, shapes: Mapping[str, tuple[int, int]], path: str) -> dict[str, tuple[int, ...]]:
    kernels = {site: tuple(kernel) for site, kernel in found.items()}
    for site, kernel in kernels.items():
        if site not in shapes or (kernel and math.prod(kernel) != shapes[site][1]):
            raise ValueError(f"{path}: the kernel {kernel} of {site!r:.100} does not fit its sites")
    return kernels


def split(key: str) -> tuple[str | None, str]:
    """(site, factor) of a factor's key on disk; (None, parameter) of what was trained in full."""
    name = key.removeprefix(files.PREFIX)
    site, mark, factor = name.rpartition(MARK)
    if not mark and name.startswith(MARK[1:]):  # the model itself is the one adapted layer
        return "", name.removeprefix(MARK[1:])
    return (site, factor) if mark else (None, name)


def untied(tensors: Mapping[str, Tensor], tied: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """The tensors of a file with those that are stored once for several sites under each of their keys."""
    return {**tensors, **{k: _target(tensors, k, v, path) for k, v in tied.items()}}


def _target(tensors: Mapping[str, Tensor], key: str, target: Any, path: str) -> Tensor:
    if target not in tensors or key in tensors:
        raise ValueError(f"{path}: {key!r:.100} is tied to {target!r:.100}, which is not in the file")
    return tensors[target]
