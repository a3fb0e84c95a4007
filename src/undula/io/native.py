"""undula's own directory: PEFT's layout, with `peft_type: UNDULA` and everything about the methods under `undula`.

Keys are `base_model.model.<site>.undula_factors.<factor>`, and `base_model.model.<parameter>` for what was trained in
full: what PEFT writes when it hosts a method (`undula.peft_config`), so both read each other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..host import check_shapes
from ..method import Method
from ..sites import outline
from . import files
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
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for site, name, t in adapter.tensors():
        key = f"{files.PREFIX}{site}{MARK}{name}"
        if id(t) in first:
            tied[key] = first[id(t)]
        else:
            first[id(t)], tensors[key] = key, t
    for name, t in adapter.full.items():
        tensors[files.PREFIX + name] = t
    frozen = sorted(k for s, n, t in adapter.tensors() if not t.requires_grad and (k := f"{s}.{n}"))
    data = config(adapter.methods, adapter.shapes, base, task, tied, frozen, list(adapter.full))
    files.write(Path(path), data, tensors, {"README.md": README})


def config(
    methods: Mapping[str, Method],
    shapes: Mapping[str, tuple[int, int]],
    base: str | None,
    task: str | None,
    tied: Mapping[str, str],
    frozen: list[str],
    full: list[str],
) -> dict[str, Any]:
    """The JSON of an adapter.  Methods are listed once, sites point to them by number."""
    kinds = list(dict.fromkeys(methods.values()))
    return {
        "peft_type": TYPE,
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(methods),
        "modules_to_save": sorted({n.rpartition(".")[0] or n for n in full}) or None,
        "undula": {
            "version": VERSION,
            "methods": [m.encode() for m in kinds],
            "sites": {s: [kinds.index(m), *shapes[s]] for s, m in methods.items()},
            "tied": dict(tied),
            "frozen": frozen,
        },
    }


def load(path: str | Path) -> Adapter:
    """The adapter in a directory: undula's own, or a plain PEFT LoRA.

    Strict: an unknown method or field, a missing, surplus or misshapen tensor, NaN, sizes that the file does not hold,
    names that are not module names: each is an error of its own, and nothing is returned.
    """
    path = Path(path)
    data, tensors = files.read(path)
    kind = data.get("peft_type")
    if kind == "LORA":
        return read_lora(data, tensors, str(path))
    if kind != TYPE or not isinstance(data.get("undula"), dict):
        raise ValueError(f"{path} holds peft_type {kind!r}; undula reads {TYPE} and LORA")
    own = data["undula"]
    if own.get("version") != VERSION:
        raise ValueError(f"{path} has format version {own.get('version')!r}; this undula reads version {VERSION}")
    return _assemble(*_sites(own, path), own, tensors, str(path))


def _sites(own: Mapping[str, Any], path: Path) -> tuple[dict[str, Method], dict[str, tuple[int, int]]]:
    """Method and shape of every site."""
    listed, sites = own.get("methods"), own.get("sites")
    if not isinstance(listed, list) or not isinstance(sites, dict) or not sites:
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
    return methods, shapes


def _assemble(
    methods: dict[str, Method],
    shapes: dict[str, tuple[int, int]],
    own: Mapping[str, Any],
    tensors: dict[str, Tensor],
    path: str,
) -> Adapter:
    tied, frozen = own.get("tied", {}), set(own.get("frozen", []))
    factors: dict[str, dict[str, Tensor]] = {s: {} for s in methods}
    full: dict[str, Tensor] = {}
    aliases = {k: _target(tensors, k, v, path) for k, v in tied.items()}
    for key, t in {**tensors, **aliases}.items():
        name = key.removeprefix(files.PREFIX)
        site, mark, factor = name.rpartition(MARK)
        if not mark and name.startswith(MARK[1:]):  # the model itself is the one adapted layer
            site, mark, factor = "", MARK, name.removeprefix(MARK[1:])
        if not mark:
            full[files.check_name(name, "parameter")] = t.requires_grad_()
        elif site not in factors:
            raise ValueError(f"{path} holds a tensor for {site!r:.100}, which its config does not name")
        else:
            factors[site][factor] = t.requires_grad_(t.is_floating_point() and f"{site}.{factor}" not in frozen)
    for site, f in factors.items():
        check_shapes(f"{path}: {site}", f, methods[site].init(outline(site, shapes[site])))
    return Adapter(methods, factors, shapes, full)


def _target(tensors: Mapping[str, Tensor], key: str, target: Any, path: str) -> Tensor:
    if target not in tensors or key in tensors:
        raise ValueError(f"{path}: {key!r:.100} is tied to {target!r:.100}, which is not in the file")
    return tensors[target]
