"""Plain PEFT LoRA directories: reading them, and writing any LowRank adapter as one, bit for bit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import LowRank, Method
from ..host.apart import THEIRS
from ..host.checks import check_shapes
from ..host.sharded import check_whole
from ..host.views import outline
from ..methods.dora import DoRA
from ..methods.lora import LoRA, RankStabilised
from . import files, lora_config, lora_parameters
from .lora_config import about

COPY = re.compile(r"\.(modules_to_save|original_module)\.")
OF_A_PARAMETER = "a weight that its module reads itself (`target_parameters`, which undula reads and does not write)"
LEAF = re.compile(
    r"(?P<site>.+)\.(?P<leaf>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?",
    re.DOTALL,
)


README = """# A LoRA adapter

A plain LoRA in PEFT's format, written by undula.  On `model`, the one that `base_model_name_or_path` in
adapter_config.json names where it says one (here: the path of this directory):

```python
import peft

model = peft.PeftModel.from_pretrained(model, here)
```

With undula:

```python
import undula

undula.attach(model, undula.Adapter.load(here))
```

`undula export` writes one that says which model that is, and how to open it.
"""


def export_lora(adapter: Adapter, path: str | Path, base: str | None = None, task: str | None = None) -> None:
    """Writes a LowRank adapter as a plain PEFT LoRA (`peft_type: LORA`): what vLLM, llama.cpp and PEFT alone read.

    lora_alpha equals r at every site, so the stored factors are `pair(f)` to the bit.  Parameters trained in full
    leave as PEFT's modules_to_save.  Base and task default to what `adapter.about` says.  Raises TypeError below the
    LowRank rung: another function is never written as a LoRA (`collapse` first); ValueError where PEFT's layer would
    compute something else (`Adapter.apart`), a parameter in full lies in an adapted layer, or a name could not be read
    back.
    """
    config, tensors = lora_state(adapter, base, task)
    named = {files.PREFIX + key: t for key, t in tensors.items()}
    files.write(Path(path), config, named, README)


@torch.no_grad()
def lora_state(adapter: Adapter, base: str | None, task: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(LoraConfig, tensors by their names below the model) of a LowRank adapter.  Raises what `export_lora` raises."""
    below = {s: m for s, m in adapter.methods.items() if not isinstance(m, LowRank)}
    if below:
        site, method = next(iter(below.items()))
        raise TypeError(
            f"{method!r} at {site} ({len(below)} such sites) stands on the rung {method.rung()}: it is no LoRA. "
            "undula.collapse makes one and reports the error"
        )
    check_whole(adapter.parameters(), "exporting")
    adapter.check_usable()
    _check_same(adapter)
    inside = [n for n in adapter.full if n.rpartition(".")[0] in adapter.factors]
    if inside:
        raise ValueError(
            f"{', '.join(inside[:3])}: trained in full in a layer that is adapted too, which no PEFT LoRA can say "
            "(its modules_to_save are whole modules). Merge the adapter, or collapse it with bias=False"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for site, f in adapter.factors.items():
        method = adapter.methods[site]
        assert isinstance(method, LowRank)
        B_OR, A_RI = method.pair(f)
        ranks[site] = A_RI.shape[0]
        kernel = adapter.kernels.get(site)
        if kernel is not None and len(kernel) == 1:  # readers know of no row that stays: the update has nothing there
            A_RI = A_RI.index_fill(1, torch.tensor(kernel, device=A_RI.device), 0.0)
        leaves = _leaves(kernel, B_OR, A_RI)
        tensors |= {f"{site}.{leaf}": t.clone() for leaf, t in leaves}  # sites may share a factor
    _check_names(tensors, adapter)
    base = adapter.about.get("base_model_name_or_path") if base is None else base
    task = adapter.about.get("task_type") if task is None else task
    kept = {k: v for k, v in adapter.about.items() if k in lora_config.ABOUT}
    return kept | described(ranks, list(adapter.full), base, task), tensors | dict(adapter.full)


def _check_same(adapter: Adapter) -> None:
    """Raises ValueError for layers at which a LoRA of PEFT's would compute something else."""
    other = {s: why for s, why in adapter.apart.items() if s in adapter.factors and why != THEIRS}
    if other:
        site, why = next(iter(other.items()))
        raise ValueError(
            f"{site} is {why}: PEFT's LoRA does not follow that and would compute something else there "
            f"({len(other)} such layers). Merge the adapter (undula.merge), keep it in undula's own form "
            "(Adapter.save), or train it without these layers"
        )


def _check_names(tensors: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Raises ValueError for names that a reader would take for others."""
    for site in adapter.factors:
        files.check_name(site, "site")  # a model that is itself the adapted layer has no name
    for key in tensors:
        match = LEAF.fullmatch(key)
        if match is None or match["site"] not in adapter.factors:
            raise ValueError(f"{key!r:.100}: in a PEFT LoRA this name would be read as another one: rename the module")
    for name in adapter.full:
        if LEAF.fullmatch(files.check_name(name, "parameter")) or ".base_layer." in name:
            raise ValueError(f"{name!r:.100}: in a PEFT LoRA this name would be read as another one: rename the module")


def _leaves(kernel: tuple[int, ...] | None, B_OR: Tensor, A_RI: Tensor) -> list[tuple[str, Tensor]]:
    """The pair under PEFT's names and in its shapes, which depend on the kind of layer (see `Adapter.kernels`)."""
    if kernel is None:
        return [("lora_A.weight", A_RI), ("lora_B.weight", B_OR)]
    if len(kernel) < 2:
        return [("lora_embedding_A", A_RI), ("lora_embedding_B", B_OR)]
    return [
        ("lora_A.weight", A_RI.reshape(-1, *kernel)),
        ("lora_B.weight", B_OR.reshape(*B_OR.shape, *(1,) * (len(kernel) - 1))),
    ]


def described(ranks: Mapping[str, int], full: list[str], base: str | None, task: str | None) -> dict[str, Any]:
    """PEFT's LoraConfig as JSON, with scaling 1 everywhere."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{re.escape(s)}$": n for s, n in ranks.items() if n != r}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "target_modules": list(ranks),
        "modules_to_save": sorted({n.rpartition(".")[0] or n for n in full}) or None,
    }


def read_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> Adapter:
    """A PEFT LoRA (rsLoRA, DoRA, rank and alpha patterns, `target_parameters` included) as an Adapter.  Raises
    ValueError for what would change the function and is not understood (see `io.lora_config`)."""
    lora_config.check(config, path)
    whole, full = _sorted({k: t for k, t in tensors.items() if not is_copy(k, tensors)}, path)
    if not whole:
        raise ValueError(f"{path} holds no LoRA factors")
    alphas = lora_config.patterns(config, "alpha_pattern", path)
    ranks = lora_config.patterns(config, "rank_pattern", path)
    alpha = lora_config.number(config.get("lora_alpha", 8), "lora_alpha", path)
    r = lora_config.number(config.get("r", 8), "r", path)
    names = lora_parameters.named(config, path)
    found, parameters = lora_parameters.split(whole, names, lambda name: ranks.of(name, r), path)
    methods: dict[str, Method] = {}
    shapes: dict[str, tuple[int, int]] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    factors: dict[str, dict[str, Tensor]] = {}
    for site, leaves in found.items():
        named = parameters.get(site, site)
        f = {{"A": "A", "B": "B", "r": "m"}[leaf[-1]]: t for leaf, t in leaves.items()}
        wanted = {"A", "B", "m"} if config.get("use_dora") else {"A", "B"}
        if len(f) < len(leaves) or set(f) != wanted or f["A"].ndim not in (2, 3, 4, 5) or f["B"].ndim != f["A"].ndim:
            seen = {k: tuple(t.shape) for k, t in leaves.items()}
            raise ValueError(f"{path}: {site} needs the factors {sorted(wanted)} of a layer; found {seen}")
        if f["A"].ndim > 2 or "lora_embedding_A" in leaves:
            kernels[site] = tuple(f["A"].shape[1:]) if f["A"].ndim > 2 else ()
        if ranks.of(named, r) != f["A"].shape[0]:
            raise ValueError(f"{path}: {site} has the rank {f['A'].shape[0]}; its config says {ranks.of(named, r):g}")
        methods[site], shapes[site], factors[site] = _method(config, path, site, f, alphas.of(named, alpha))
    said = {k: config[k] for k in lora_config.ABOUT if k in config}
    apart = {s: OF_A_PARAMETER if s in parameters else THEIRS for s in found}
    return Adapter(methods, factors, shapes, full, kernels, about(said, path), apart)


def _sorted(tensors: Mapping[str, Tensor], path: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({site: {leaf: tensor}}, parameters in full).  Raises ValueError for what is there twice or is no number."""
    found: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for key, t in tensors.items():
        site, leaf = placed(key)
        place = full if site is None else found.setdefault(site, {})
        if not t.is_floating_point():
            raise ValueError(f"{path}: {key!r:.100} holds {t.dtype}, no floating-point numbers")
        if leaf in place:
            raise ValueError(f"{path} holds {key!r:.100} twice")
        place[leaf] = t.requires_grad_() if site is None else t
    return found, full


def is_copy(key: str, keys: Container[str]) -> bool:
    """Whether a tensor is a second one of what `keys` have under its own name: with `bias` PEFT writes the biases of
    `modules_to_save` under the names of its wrapper too, those of the layer that it has replaced included."""
    name = COPY.sub(".", key)
    return name != key and name in keys


def placed(key: str) -> tuple[str | None, str]:
    """(the module, the factor) that a tensor's key means; (None, parameter) of one in full."""
    name = files.check_name(key.removeprefix(files.PREFIX), "tensor")
    match = LEAF.fullmatch(name)
    if match is None:  # PEFT stores the own weight of an embedding that it adapts: it may have grown
        return None, name.replace(".base_layer.", ".")
    return match["site"], match["leaf"]


def _method(
    config: Mapping[str, Any], path: str, site: str, f: dict[str, Tensor], alpha: float
) -> tuple[Method, tuple[int, int], dict[str, Tensor]]:
    flat = {k: (t.flatten() if k == "m" else t.flatten(1)).float().requires_grad_() for k, t in f.items()}
    r = flat["A"].shape[0]
    plain = LoRA(r=r, alpha=alpha, **({"scaling": RankStabilised()} if config.get("use_rslora") else {}))
    method = DoRA(plain) if "m" in flat else plain
    shape = (flat["B"].shape[0], flat["A"].shape[1])
    check_shapes(f"{path}: {site}", flat, method.init(outline(site, shape)))
    return method, shape, flat
