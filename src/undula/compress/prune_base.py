"""The rows and columns that structured pruning has closed, taken away: a smaller dense model.

`undula.ranks.loraprune.LoRAPrune` closes attention heads and channels while an adapter trains, by masks on the inputs
of the matrices that read them (`undula.Masked`).  Here they go from weights, biases, the adapter's factors and the
configuration.  The function stays: what is taken away was multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Factors, LowRank, Method
from ..host.coupled import (
    HEADS,
    KINDS,
    Coupled,
    coupled,
    indices,
    resized,
    transposed,
)
from ..host.host import adapters, attach, detach, selected
from ..host.where import inner

COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "n_heads", "n_head")  # that attentions hold


@dataclass(frozen=True)
class Pruned:
    """What was taken away: {kind: (structures of a layer before, after)}, and the model's parameters before and after
    (without the adapter's)."""

    structures: Mapping[str, tuple[int, int]]
    before: int
    after: int


@torch.no_grad()
def prune_base(model: nn.Module) -> Pruned:
    """Takes from the model, in place, what the masks of its selected adapter have closed; the adapter goes on, smaller,
    without masks.  `undula.merge(model, keep=False)` and `save_pretrained` make of it a folder that plain transformers
    opens.

    Raises ValueError for an adapter without masks, for masks that leave other numbers in other layers or parts of a
    structure, and where other adapters stand on the model, which would not fit any more; TypeError, naming the
    architecture, where plain transformers cannot say the sizes (nothing is changed then).
    """
    model = inner(model)
    adapter = selected(model)
    kept = _kept(model, adapter)
    config = resized(model, [part for part, _ in kept], {part.kind: len(k) for part, k in kept})
    if len(adapters(model)) > 1:
        raise ValueError(
            f"other adapters stand on this model ({', '.join(adapters(model))}), and would not fit a smaller one: "
            "detach all but the selected one first"
        )
    name = next(iter(adapters(model)))
    rows, columns = _places(kept)
    smaller = _smaller(model, adapter.copy(), rows, columns)
    detach(model, name)
    before = sum(p.numel() for p in model.parameters())
    for site in {**rows, **columns}:
        _cut(model.get_submodule(site), rows.get(site), columns.get(site))
    for part, left in kept:
        if part.kind == HEADS:
            _recount(model.get_submodule(part.columns.rpartition(".")[0]), part, len(left))
    _reconfigure(model, config)
    after = sum(p.numel() for p in model.parameters())
    attach(model, smaller, name=name)
    return Pruned({part.kind: (part.count, len(left)) for part, left in reversed(kept)}, before, after)


def _kept(model: nn.Module, adapter: Adapter) -> list[tuple[Coupled, Tensor]]:
    """The structures of the model's layers, with the numbers of those that the masks leave open."""
    told = {s: m.reads(adapter.factors[s]) for s, m in adapter.methods.items()}
    masks = {s: mask for s, mask in told.items() if mask is not None}
    if not masks:
        raise ValueError(
            "no site of this adapter has a mask: train with LoRAPrune first (`undula prune-base`). "
            "`undula.prune` is for adapters with gates: it takes ranks from an adapter, and nothing from the base"
        )
    found: list[tuple[Coupled, Tensor]] = []
    for kind in KINDS:
        try:
            parts = coupled(model, (kind,))
        except TypeError:  # without such structures; masks on others are found out below
            continue
        found += [(part, _open(part, masks.pop(part.columns))) for part in parts if part.columns in masks]
    if masks:
        raise ValueError(f"the mask at {next(iter(masks))} is on no attention heads or channels that are known")
    for kind in KINDS:
        if len(numbers := {len(k) for part, k in found if part.kind == kind}) > 1:
            raise ValueError(
                f"the masks leave {min(numbers)} to {max(numbers)} {kind} in a layer, and a configuration of plain "
                "transformers says one number for all"
            )
    return found


def _open(part: Coupled, mask: Tensor) -> Tensor:
    whole = mask.view(part.count, part.width)
    if not (whole == whole[:, :1]).all():
        raise ValueError(f"the mask at {part.columns} closes parts of {part.kind}: whole ones alone can go")
    return whole[:, 0].nonzero()[:, 0]


def _places(kept: list[tuple[Coupled, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({matrix: rows that stay}, {matrix: columns that stay})."""
    rows = {name: indices(left, n) for part, left in kept for name, n in part.rows.items()}
    return rows, {part.columns: indices(left, part.width) for part, left in kept}


def _cut(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Leaves these rows and columns of a linear layer."""
    for leaf in ("weight", "bias"):
        if (p := getattr(module, leaf, None)) is not None:
            setattr(module, leaf, nn.Parameter(_left(p.detach(), module, leaf, rows, columns), p.requires_grad))
    W: Tensor = module.weight  # type: ignore[assignment]
    O, I = W.T.shape if transposed(module) else W.shape
    for name, size in (("out_features", O), ("in_features", I), ("nf", O), ("nx", I)):
        if hasattr(module, name):
            setattr(module, name, size)


def _left(t: Tensor, module: nn.Module, leaf: str, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """What is left of a linear layer's weight or bias."""
    if leaf == "bias":
        return t if rows is None else t[rows].contiguous()
    W_OI = t.T if transposed(module) else t
    W_OI = W_OI if rows is None else W_OI[rows]
    W_OI = W_OI if columns is None else W_OI[:, columns]
    return (W_OI.T if transposed(module) else W_OI).contiguous()


def _recount(attention: nn.Module, part: Coupled, number: int) -> None:
    """The numbers of heads that an attention holds beside the configuration."""
    q, k, _ = part.rows.values()
    group = q // k
    for name in COUNTS:
        held = getattr(attention, name, None)
        if held in (part.count * group, part.count):
            setattr(attention, name, number * group if held == part.count * group else number)


def _reconfigure(model: nn.Module, config: object) -> None:
    """Changes the configuration that the model and its parts hold, as the object that it is."""
    text, new = model.config.get_text_config(), config.get_text_config()  # type: ignore
    for name, value in vars(new).items():
        if not name.startswith("_") and getattr(text, name, None) != value:
            setattr(text, name, value)


def _smaller(model: nn.Module, adapter: Adapter, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Adapter:
    """The adapter on what is left, without masks; what it trains in full of the matrices that are cut is cut too."""
    methods: dict[str, Method] = dict(adapter.methods)
    factors: dict[str, Factors] = {}
    shapes = dict(adapter.shapes)
    for site, f in adapter.factors.items():
        methods[site], left = methods[site].unmasked(f)
        factors[site] = _factors(site, methods[site], left, rows.get(site), columns.get(site))
        O, I = shapes[site]
        shapes[site] = (len(rows[site]) if site in rows else O, len(columns[site]) if site in columns else I)
    full = dict(adapter.full)
    for name, t in full.items():
        owner, _, leaf = name.rpartition(".")
        if owner in rows or owner in columns:
            cut = _left(t.detach(), model.get_submodule(owner), leaf, rows.get(owner), columns.get(owner))
            full[name] = cut.requires_grad_(t.requires_grad)
    return replace(adapter, methods=methods, factors=factors, shapes=shapes, full=full)


def _factors(site: str, method: Method, f: Factors, rows: Tensor | None, columns: Tensor | None) -> Factors:
    if rows is None and columns is None:
        return f
    plain = method.plain() if isinstance(method, LowRank) else None
    if plain is None:
        raise TypeError(f"{method!r} at {site} has not the two factors of a LoRA, of which rows and columns could go")
    _, B, A = plain
    cut = {**f}
    if rows is not None:
        cut[B] = f[B].detach()[rows].contiguous().requires_grad_(f[B].requires_grad)
    if columns is not None:
        cut[A] = f[A].detach()[:, columns].contiguous().requires_grad_(f[A].requires_grad)
    return cut
