"""The single files of kohya's scripts and LyCORIS, which ComfyUI and others read: `lora_unet_<layer>.lora_down.weight`.

A layer's name has underscores for dots, so that the model's names are needed to read one: those of diffusers, or of a
UNet in Stability's layout (`lora_unet_input_blocks_4_1 ...`), as kohya's scripts write SDXL.  CLIP's text encoders
stand below `text_model`, which transformers 5 has dropped from its own names.  The update of a layer is
(alpha / r) up down, `alpha` a tensor of one number (without it: alpha = r); of a convolution `down` has the kernel's
shape, or stands with `lora_mid` (r, r, kh, kw) for a kernel in CP form; `dora_scale` (O, 1 ...) is DoRA's magnitude.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from . import families, files, tensorfile
from .draft import filled
from .peft import lora_state, read_lora
from .stability import stability
from .tensorfile import Told

# What stands before a layer's name, and the part of a pipeline that it means.
PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_")
PARTS = {"unet": "lora_unet", "transformer": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
LORA = {"lora_down", "lora_up", "lora_mid", "alpha", "dora_scale"}
CLIP = re.compile(r"encoder\.layers\.\d+\..+")
HOW = (
    "its layers' names have underscores for dots, so the base tells them: undula.io.load_kohya(path, model) reads it, "
    "`undula import FILE --model BASE --component PART --out DIRECTORY` makes a directory of it"
)
Layers = nn.Module | Mapping[str, tuple[int, ...]]


def judged(tensors: Mapping[str, Told]) -> tuple[str, str]:
    """("import" or "show", why) of a file."""
    try:
        check_kinds(tensors)
    except ValueError as error:
        return "show", str(error)
    return "import", HOW


def check_kinds(names: Mapping[str, Any]) -> None:
    """Raises ValueError for tensors that are no LoRA's, by the name of what they are."""
    other: dict[str, str] = {}
    for name in names:
        site, leaf, known = families.of_name(families.paired(name, names))
        if leaf not in LORA:
            other.setdefault(site, known.kind if known is not None and known.kind else f"{name!r:.80}")
    if other:
        kinds = Counter(other.values()).most_common(3)
        raise ValueError(
            f"{', '.join(f'{kind} at {n:,} layers' for kind, n in kinds)}: no LoRA, and undula reads LoRA (LoCon and "
            "DoRA too) of these files. `undula inspect` shows it; LyCORIS merges it into a model"
        )


def load_kohya(path: str | Path, model: Layers, prefix: str | None = None) -> Adapter:
    """The LoRA (LoCon, DoRA) of a file for `model`: a UNet, a transformer or a text encoder, whose layers it names; or
    {layer: shape of its weight} of one (`undula.io.layers_of`).  `prefix` (`lora_unet`, `lora_te1` ...) is needed where
    the file is for several parts of a pipeline.

    What is stored in CP form (`lora_mid`) becomes the pair of the same update, rounded once.  Raises FileNotFoundError,
    LookupError for a prefix that is not there and for layers that the model has not, ValueError for what is malformed
    and for other kinds (LoHa, LoKr ...), by name.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with files.door(str(file)):
        with open(file, "rb") as opened:
            entries, _ = tensorfile.entries(opened, str(file))
            own = _chosen(entries, prefix, str(file))
            tensors = tensorfile.read(opened, {key: entries[key] for key in own}, str(file))
        files.check_finite(tensors, str(file))
        found: dict[str, dict[str, Tensor]] = {}
        for key, name in own.items():
            site, leaf, _ = families.of_name(name)
            found.setdefault(site, {})[leaf] = tensors[key]
        return _adapter(found, _shapes(model), str(file))


def _chosen(names: Mapping[str, Any], prefix: str | None, path: str) -> dict[str, str]:
    """{key in the file: without its prefix} of the layers of one part."""
    parts: dict[str, dict[str, str]] = {}
    for key in names:
        part = next((p for p in PREFIXES if key.startswith(p)), None)
        if part is None:
            raise ValueError(f"{path}: {key!r:.100} begins with none of {', '.join(PREFIXES)}: no file of kohya's form")
        parts.setdefault(part.rstrip("_"), {})[key] = key.removeprefix(part)
    if prefix is None and len(parts) != 1:
        told = ", ".join(sorted(parts)) or "nothing"
        raise LookupError(f"{path} is for {told}: name the one to read (io.load_kohya(path, model, prefix))")
    chosen = (prefix or next(iter(parts))).rstrip("_")
    if chosen not in parts:
        raise LookupError(f"{path} has nothing for {chosen!r}; it has: {', '.join(sorted(parts))}")
    check_kinds(parts[chosen])
    return parts[chosen]


def _adapter(found: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], path: str) -> Adapter:
    layers = _layers(shapes)
    lost = [site for site in found if site not in layers]
    if lost:
        raise LookupError(
            f"{path}: the model has no {', '.join(lost[:3])} ({len(lost)} of {len(found)} layers of the file): it is "
            "for another model, or for another part of the pipeline"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    dora = {"dora_scale" in leaves for leaves in found.values()}
    if len(dora) > 1:
        raise ValueError(f"{path}: some of its layers are DoRA and some are not, which no one LoRA is")
    for site, leaves in found.items():
        several = layers[site]
        if len(several) > 1:
            raise ValueError(f"{path}: {site} may mean {' or '.join(several)}: both have that name without their dots")
        name = several[0]
        A, B, m = _pair(site, leaves, shapes[name], path)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        if m is not None:
            tensors[f"{name}.lora_magnitude_vector"] = m
        exactly = f"^{re.escape(name)}$"
        ranks[exactly] = len(A)
        alphas[exactly] = float(leaves["alpha"]) if "alpha" in leaves else len(A)
    config = {"peft_type": "LORA", "rank_pattern": ranks, "alpha_pattern": alphas, "use_dora": dora == {True}}
    return read_lora(config, tensors, path)


def _shapes(model: Layers) -> Mapping[str, tuple[int, ...]]:
    """{layer: shape of its weight}."""
    if not isinstance(model, nn.Module):
        return model
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name: tuple(w.shape) for name, w in weights.items() if isinstance(w, Tensor) and w.ndim > 1}


def _layers(names: Iterable[str]) -> dict[str, list[str]]:
    """{name without dots: the names of layers that it may mean}."""
    names = list(names)
    called = [(name, name) for name in names] + [(other, name) for name, other in stability(names).items()]
    called += [(f"text_model.{name}", name) for name in names if CLIP.fullmatch(name)]
    made: dict[str, list[str]] = {}
    for other, name in called:
        made.setdefault(other.replace(".", "_"), []).append(name)
    return made


def _pair(
    site: str, leaves: Mapping[str, Tensor], shape: tuple[int, ...], path: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(A, B, magnitude or None) in PEFT's shapes for a weight of this shape.  Raises ValueError."""
    seen = {k: tuple(t.shape) for k, t in leaves.items()}
    up, down, mid, m = (leaves.get(k) for k in ("lora_up", "lora_down", "lora_mid", "dora_scale"))
    if up is None or down is None or up.ndim < 2 or down.ndim < 2 or any(n != 1 for n in up.shape[2:]):
        raise ValueError(f"{path}: {site} needs lora_up (O, r) and lora_down (r, I); found {seen}")
    if leaves.get("alpha", up.new_ones(())).numel() != 1:
        raise ValueError(f"{path}: the alpha of {site} is one number; found {seen}")
    if mid is not None:
        if mid.ndim < 3 or mid.shape[1] != down.shape[0] or any(n != 1 for n in down.shape[2:]):
            raise ValueError(
                f"{path}: {site} needs lora_mid (r, r, kh, kw) beside lora_down (r, I, 1, 1); found {seen}"
            )
        down = torch.einsum("rs...,si->ri...", mid.double(), down.flatten(1).double()).to(torch.float32)
    r = len(down)
    if up.shape[1] != r or (up.shape[0], down.numel() // max(r, 1)) != (shape[0], _columns(shape)):
        raise ValueError(f"{path}: {site} is {shape} in this model; the file has {seen}")
    if m is not None and (m.shape[0] != shape[0] or m.numel() != shape[0]):
        raise ValueError(
            f"{path}: {site} has DoRA's magnitudes {tuple(m.shape)}, one for each input: undula's, and PEFT's, has one "
            f"for each of the {shape[0]} outputs (wd_on_output)"
        )
    B = up.reshape(shape[0], r, *(1,) * (len(shape) - 2))
    return down.reshape(r, *shape[1:]), B, None if m is None else m.flatten()


def _columns(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape[1:]).numel())


def _widened(t: Tensor, r: int, dim: int) -> Tensor:
    """A factor with zeros up to the rank r."""
    lacking = list(t.shape)
    lacking[dim] = r - t.shape[dim]
    return torch.cat([t, t.new_zeros(lacking)], dim) if lacking[dim] else t.contiguous()


def _called(sites: Iterable[str], prefix: str, unet: Layers | None) -> dict[str, str]:
    """{layer: its name in a file, with dots}.  Raises ValueError for a layer that Stability's layout has not."""
    if unet is not None:
        known = stability(_shapes(unet))
        lost = [site for site in sites if site not in known]
        if lost:
            raise ValueError(f"{', '.join(lost[:3])}: no layers of a UNet that Stability's layout has a name for")
        return {site: known[site] for site in sites}
    clip = prefix.startswith("lora_te")
    return {site: f"text_model.{site}" if clip and CLIP.fullmatch(site) else site for site in sites}


def export_kohya(adapter: Adapter, path: str | Path, component: str = "unet", unet: Layers | None = None) -> None:
    """Writes a LowRank adapter as one file in kohya's form (`NAME.safetensors`), which ComfyUI, diffusers and others
    read.  `component` is the part of the pipeline that is adapted (`unet`, `transformer`, `text_encoder`,
    `text_encoder_2`), or the prefix itself (`lora_te1`).  All layers have the largest rank, with zeros where one has
    less, and alpha is that rank: the rest is `pair(f)` to the bit.  (Where layers have several alphas diffusers 0.42
    gives those of attention the wrong one.)  With `unet`, the UNet or its layers (`undula.io.layers_of`), under
    Stability's names, as kohya's scripts write SDXL.

    Raises TypeError below the LowRank rung; ValueError for what such files cannot hold (parameters in full, embeddings,
    two names that are one without their dots) and for an unknown part.
    """
    prefix = PARTS.get(component, component)
    if f"{prefix}_" not in PREFIXES:
        parts = ", ".join([*PARTS, *(p.rstrip("_") for p in PREFIXES)])
        raise ValueError(f"kohya's files know the parts {parts}; found {component!r:.80}")
    if adapter.full:
        raise ValueError(
            f"kohya's files hold no parameters trained in full: {', '.join(sorted(adapter.full)[:3])}. Export for PEFT "
            "instead (io.export_lora, or --format peft), or merge the adapter"
        )
    _, tensors = lora_state(adapter, None, None)
    r = max((len(t) for key, t in tensors.items() if families.of_name(key)[1] == "lora_A"), default=1)
    named: dict[str, Tensor] = {}
    called = _called(adapter.methods, prefix, unet)
    for key, t in tensors.items():
        site, leaf, _ = families.of_name(key)
        if leaf not in ("lora_A", "lora_B"):
            raise ValueError(
                f"{site} is an embedding, for which kohya's files have no form: train without it, or merge"
            )
        flat = f"{prefix}_{called[site].replace('.', '_')}"
        new = f"{flat}.{'lora_down' if leaf == 'lora_A' else 'lora_up'}.weight"
        if new in named:
            raise ValueError(
                f"{site}: another layer has the same name without dots ({flat}), so no such file can hold it"
            )
        named[new] = _widened(t.detach().cpu(), r, 0 if leaf == "lora_A" else 1)
        named[f"{flat}.alpha"] = torch.tensor(float(r))
    told = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(r), "ss_network_alpha": str(r)}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    filled(file, lambda opened: tensorfile.write(opened, named, told))
