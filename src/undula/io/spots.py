"""The layers that an adapter of any kind changes, by the names and shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.adapter import Adapter
from ..core.method import Method
from . import diffusers, families, files, kohya, lora_config, lora_parameters
from .packing import SCALE
from .reading import TYPE, key_of, split
from .stored import Stored
from .tensorfile import NAMES, Told

SCALED = ("LoRA", "DoRA", "LoRA with a bias", "LoHa", "LoKr")  # whose update is multiplied by alpha / r
IN_FULL = "in full"


@dataclass(frozen=True)
class Spot:
    """One layer that an adapter changes, or one parameter that it replaces."""

    site: str
    kind: str
    rank: int | None
    alpha: float | None
    scale: float | None
    shape: tuple[int, int] | None  # (O, I) of the layer, where the tensors tell
    dtype: str
    parameters: int
    tensors: Mapping[str, tuple[int, ...]]


UNDULA, PEFT, DIFFUSERS, COMFY, KOHYA = "undula", "PEFT", "diffusers", "ComfyUI", "kohya"
OLD, MLX, HUB, GGUF, MODEL, BARE = "diffusers, older", "MLX", "AdapterHub", "GGUF", "whole model", "tensors"
NAMED: tuple[tuple[str, Callable[[str], bool]], ...] = (  # forms that the name of a tensor tells, the first that fits
    (KOHYA, lambda name: name.startswith(kohya.PREFIXES)),
    (OLD, lambda name: families.OLD.fullmatch(name) is not None or "lora_linear_layer" in name or ".lora." in name),
    (COMFY, lambda name: name.startswith("diffusion_model.")),
)


def form_of(found: Stored) -> str:
    """How it is stored."""
    config = found.config
    if found.gguf:
        return GGUF
    if "peft_type" in config:
        return UNDULA if config["peft_type"] == TYPE else PEFT
    if "fine_tune_type" in config or "lora_parameters" in config:
        return MLX
    if "config" in config and "model_name" in config:
        return HUB
    return _by_names(found)


def _by_names(found: Stored) -> str:
    names = found.tensors
    known = [name for name in names if families.of_name(name)[2] is not None]
    if not known:
        return MODEL if names else BARE
    for form, fits in NAMED:
        if any(map(fits, known)):
            return form
    pairs = diffusers.METADATA in found.metadata or all(diffusers.LEAF.fullmatch(name) for name in names)
    return DIFFUSERS if pairs and not all(name.startswith(files.PREFIX) for name in names) else BARE


def numbers(found: Stored, adapter: Adapter | None) -> int:
    """How many numbers the tensors hold; of integers with scales (`io.packing`) those that they stand for."""
    shapes = {key_of(site, name): t.shape for site, name, t in adapter.tensors()} if adapter is not None else {}
    packed = {name.removesuffix(SCALE) for name in found.tensors if name.endswith(SCALE)} & set(shapes)
    told = {name: shapes[name] if name in packed else one.shape for name, one in found.tensors.items()}
    return sum(math.prod(shape) for name, shape in told.items() if name.removesuffix(SCALE) not in packed - {name})


def spots(found: Stored, form: str, adapter: Adapter | None) -> Iterator[Spot]:
    """What it changes, layer by layer in the order of the files; then what it replaces."""
    sites: dict[str, dict[str, Told]] = {}
    full: list[tuple[str, Told]] = []
    for name, one in found.tensors.items():
        site, leaf = _placed(families.paired(name, found.tensors), form)
        if leaf:
            sites.setdefault(site, {})[leaf] = one
        else:
            full.append((site, one))
    shown: set[str] = set()
    if adapter is not None and form != DIFFUSERS:
        for site in adapter.methods:
            yield _own(adapter, site, sites.get(site, {}))
            shown.add(site)
    alphas = _alphas(found.config)
    taken = _above(adapter.methods) if adapter is not None else set()
    for site, leaves in sites.items():
        if site not in shown and lora_parameters.module_of(site) not in taken:
            yield _foreign(found, form, site, leaves, alphas)
    for name, one in full:
        shape = one.shape if len(one.shape) == 2 else None
        numbers = math.prod(one.shape)
        yield Spot(name, IN_FULL, None, None, None, shape, one.kind, numbers, {"": one.shape})  # type: ignore[arg-type]


def _above(sites: Iterable[str]) -> set[str]:
    """What these sites lie in: PEFT's name of a stack's factors (`target_parameters`) is one of these, where the
    adapter has taken them apart."""
    found: set[str] = set()
    for site in sites:
        while site := site.rpartition(".")[0]:
            if site in found:
                break
            found.add(site)
    return found


def _alphas(config: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    """(site, default) -> its alpha in PEFT's configuration; None where that is malformed."""
    try:
        return lora_config.patterns(config, "alpha_pattern", "").of
    except ValueError:
        return lambda site, default: None


def _placed(name: str, form: str) -> tuple[str, str]:
    """(site, leaf) of a tensor; (name, "") of a parameter in full."""
    if form == UNDULA:
        site, factor = split(name)
        return (site, factor) if site is not None else (factor, "")
    bare = name.removeprefix(files.PREFIX).replace(".base_layer.", ".") if form == PEFT else name
    site, leaf, _ = families.of_name(bare)
    return (site.removesuffix(".weight") if form == GGUF else site, leaf) if leaf else (bare, "")


def _own(adapter: Adapter, site: str, leaves: Mapping[str, Told]) -> Spot:
    """A site of an adapter that undula reads."""
    method: Method = adapter.methods[site]
    names, inner = [type(method).__name__], method
    while isinstance(inside := getattr(inner, "inner", None), Method):
        inner = inside
        names.append(type(inner).__name__)
    kind = "DoRA" if names == ["DoRA", "LoRA"] else "(".join(names) + ")" * (len(names) - 1)
    rank, alpha, scaling = (getattr(inner, name, None) for name in ("r", "alpha", "scaling"))
    scale = None
    if rank is not None and alpha is not None and scaling is not None:
        scale = float(scaling(rank, alpha))
    held = adapter.factors[site]
    kinds = sorted({one.kind for one in leaves.values()}) or sorted({NAMES[t.dtype] for t in held.values()})
    return Spot(
        site, kind, rank, alpha, scale, adapter.shapes[site], ", ".join(kinds), sum(t.numel() for t in held.values()),
        {k: tuple(t.shape) for k, t in held.items()},
    )  # fmt: skip


def _foreign(
    found: Stored, form: str, site: str, leaves: Mapping[str, Told], alphas: Callable[[str, Any], Any]
) -> Spot:
    """A site of one that undula does not read, by the names and shapes of its tensors."""
    known = {leaf: families.LEAVES.get(leaf) for leaf in leaves}
    kinds = dict.fromkeys(leaf.kind for leaf in known.values() if leaf is not None)
    kind = next((more for more in families.MORE if more in kinds), None) or next(iter(kinds), "unknown")
    ranks: set[int] = set()
    O = I = None
    for name, leaf in known.items():
        shape = leaves[name].shape
        if leaf is None or leaf.rank is None or len(shape) <= leaf.rank:
            continue
        turned = shape[::-1] if form == MLX else shape
        ranks.add(turned[leaf.rank])
        O = turned[0] if leaf.side == "B" else O
        I = math.prod(turned[1:]) if leaf.side == "A" else I
    if I is not None and "lora_mid" in leaves:
        I *= math.prod(leaves["lora_mid"].shape[2:])
    said = found.config.get("r") if form == PEFT else None
    rank = max(ranks, default=said if type(said) is int and said > 0 and kind != "trainable tokens" else None)
    alpha, scale = _scale(found, form, site, kind, rank, alphas)
    return Spot(
        site, kind, rank, alpha, scale, None if O is None or I is None else (O, I),
        ", ".join(sorted({one.kind for one in leaves.values()})), sum(math.prod(t.shape) for t in leaves.values()),
        {k: t.shape for k, t in leaves.items()},
    )  # fmt: skip


def _scale(
    found: Stored, form: str, site: str, kind: str, rank: int | None, alphas: Callable[[str, Any], Any]
) -> tuple[float | None, float | None]:
    """(alpha, what the update is multiplied by), where it is told."""
    config = found.config
    if form == MLX:
        told = config.get("lora_parameters")
        scale = told.get("scale") if isinstance(told, dict) else None
        return None, float(scale) if isinstance(scale, int | float) else None
    alpha: Any = found.numbers.get(f"{site}.alpha")
    if form == GGUF:
        alpha = found.metadata.get("adapter.lora.alpha")
    elif alpha is None:
        alpha = alphas(site, config.get("lora_alpha", config.get("alpha")))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        alpha = None
    if kind not in SCALED or not rank:
        return alpha, None
    if alpha is None:  # kohya's and diffusers' rule where nothing is said
        return None, 1.0 if form in (KOHYA, DIFFUSERS, COMFY, OLD) else None
    return alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
