"""The norms that decide how fast attention with an adapter could be computed, layer by layer and head by head.

After Hu, Su, Kuo, Song, Liu (2024), "Computational limits of low-rank adaptation for transformer models",
arXiv:2406.03136: with inputs X of L tokens, frozen W and updates dW, gradients of an adapted attention have almost
linear algorithms while the largest entries of X(W + dW) stay below about sqrt(ln L), and (under SETH) none below
quadratic time far above.

    q = max |X (W_Q + dW_Q)| / sqrt(ln L)     q_base: without dW_Q     q_change: max |X dW_Q| / sqrt(ln L);  k, v alike

X are the inputs of the projections in the adapted model; biases count, rotations of positions (RoPE) and norms of q and
k come later and do not.  Read it as a trend.  The theorem is of hidden sizes of order ln L and names no constant, and
nothing here computes attention in almost linear time: "the adapter raised q k by 40 %" is what the figures can say,
"this layer is in the quadratic regime" is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Layer
from ..host.host import layer_at
from ..host.where import inner
from .listen import Batch, ChangeRecorder, evaluating, live, run
from .padding import kept, watching

QUERY = ("q_proj", "query", "q_lin", "q")
KEY = ("k_proj", "key", "k_lin", "k")
VALUE = ("v_proj", "value", "v_lin", "v")
PACKED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "in_proj", "c_qkv")
SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_head", "head_size")
PARTS = ("q", "k", "v")


@dataclass
class Attention:
    """One attention: the layer that makes each of its parts, and which of its outputs; `most` of what was seen."""

    name: str
    layers: tuple[str, str, str]
    size: int  # of a head of queries and keys
    packed: bool = False  # q, k and v, of equal sizes, stand in the outputs of one layer
    most: dict[str, Tensor] = field(default_factory=dict)  # {q, q_base, q_change, k ...: (heads,)}
    length: int = 0  # tokens of the longest row

    def hear(self, part: str, found: dict[str, Tensor]) -> None:
        """found: {"", "_base", "_change": values (T, channels)} of a part."""
        for end, values in found.items():
            each = values.unflatten(-1, (self.heads(part, values.shape[-1]), -1)).abs().amax((0, 2))
            before = self.most.get(part + end)
            self.most[part + end] = each if before is None else torch.maximum(before, each)

    def heads(self, part: str, width: int) -> int:
        """How many heads a part of so many channels has.  Raises ValueError."""
        count = len(self.most["k"]) if part == "v" and "k" in self.most else width // self.size
        if not count or width % count or (part != "v" and width % self.size):
            raise ValueError(f"{self.name}: {width} {part}-channels are no heads of {self.size}")
        return count


@torch.no_grad()
def norms(model: nn.Module, data: Iterable[Batch]) -> list[dict[str, Any]]:
    """One row per attention and query head, in the model's order, and one of the largest of all (layer "all").

    Keys: layer, head, q, k, v, q_base ... v_change (see this module), `raised`: q k / (q_base k_base) - 1, `tokens`: L.
    A head of keys that several heads of queries share stands in the row of each.  The adapter is the selected one; the
    model runs once on each batch, and nothing is changed.  Padding does not count.

    Raises ValueError for a model without attention that can be read, naming layers whose q, k and v are packed in
    another way than GPT-2's; LookupError without an adapter.
    """
    model = inner(model)
    adapter, found = live(model, "measuring"), attentions(model)
    with evaluating(model), watching(model) as watch:
        handles = [handle for a in found for handle in _listening(model, adapter, a, watch)]
        try:
            for batch in data:
                watch.begin(batch)
                run(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    rows = [row for a in found for row in _rows(a)]
    if not rows:
        raise ValueError("no attention saw two tokens or more: give batches of rows as the model is trained on")
    return [*rows, _largest(rows)]


def attentions(model: nn.Module) -> list[Attention]:
    """Those of a model.  Raises ValueError where there is none, or one that cannot be read."""
    found, odd = [], []
    for name, module in model.named_modules():
        if ".undula" in f".{name}":
            continue
        there = dict(module.named_children())
        q, k, v = (next((n for n in names if n in there), None) for names in (QUERY, KEY, VALUE))
        below = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            odd.append(name)
        elif q and k and v:
            found.append(Attention(name, (below + q, below + k, below + v), _size(model, name, module)))
        elif packed := next((n for n in PACKED if n in there), None):
            if packed == "c_attn" and hasattr(module, "split_size") and not getattr(module, "is_cross_attention", 0):
                site = below + packed
                found.append(Attention(name, (site, site, site), _size(model, name, module), packed=True))
            else:
                odd.append(below + packed)
    if odd:
        raise ValueError(
            f"{', '.join(odd[:3])}: q, k and v are packed there in an order that is not known here; norms are read of "
            "models with a layer for each, and of GPT-2's c_attn"
        )
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers called {', '.join(QUERY)} beside such of k and v")
    return found


def _size(model: nn.Module, name: str, module: nn.Module) -> int:
    """Of a head, by the attention itself or the model's configuration."""
    config = getattr(module, "config", None) or getattr(model, "config", None)
    for owner in (module, config):
        size = next((s for n in SIZES if isinstance(s := getattr(owner, n, None), int)), None)
        if size:
            return size
    hidden, heads = (getattr(config, n, None) for n in ("hidden_size", "num_attention_heads"))
    if not isinstance(hidden, int) or not isinstance(heads, int):
        raise ValueError(f"{name}: neither it nor the model's configuration says how large a head is")
    return hidden // heads


def _listening(model: nn.Module, adapter: Adapter, a: Attention, watch: Any) -> Iterator[Any]:
    for site in dict.fromkeys(a.layers):

        def after(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor, site: str = site) -> None:
            x = args[0] if args else next(iter(named.values()))
            mask = watch.of(site, x)
            found = {end: kept(t, mask) for end, t in _values(model, adapter, site, x, y).items()}
            rows = x.shape[0] if x.ndim == 3 else 1
            a.length = max(a.length, x.shape[-2] if mask is None else int(mask.reshape(rows, -1).sum(1).max()))
            for i, part in enumerate(PARTS):
                if a.packed:
                    a.hear(part, {end: t.chunk(3, -1)[i] for end, t in found.items()})
                elif a.layers[i] == site:
                    a.hear(part, found)

        yield model.get_submodule(site).register_forward_hook(after, with_kwargs=True)


def _values(model: nn.Module, adapter: Adapter, site: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What a layer makes of x with the adapter, without it, and the difference, in float32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    if site not in adapter.methods:
        return {"": y.to(wide), "_base": y.to(wide), "_change": torch.zeros_like(y, dtype=wide)}
    layer: Layer = layer_at(model, site)
    changes: list[Tensor] = []
    recorder = ChangeRecorder(adapter.methods[site], lambda _layer, _x, u: changes.append(u))
    recorder.forward(x, layer, adapter.factors[site])
    base = layer(x).to(wide)
    return {"": base + changes[0], "_base": base, "_change": changes[0]}


def _rows(a: Attention) -> Iterator[dict[str, Any]]:
    if a.length < 2:
        return
    heads, shared = len(a.most["q"]), len(a.most["k"])
    if heads % shared:
        raise ValueError(f"{a.name}: {heads} heads of queries cannot share {shared} of keys")
    unit = math.sqrt(math.log(a.length))
    for head in range(heads):
        at = {"q": head, "k": head // (heads // shared), "v": head // (heads // shared)}
        each = {
            part + end: float(a.most[part + end][at[part]]) / unit for end in ("", "_base", "_change") for part in PARTS
        }
        base = each["q_base"] * each["k_base"]
        raised = each["q"] * each["k"] / base - 1 if base else None
        yield {"layer": a.name, "head": head, **each, "raised": raised, "tokens": a.length}


def _largest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in rows[0] if name not in ("layer", "head")]
    there = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {"layer": "all", "head": None} | {name: max(v, default=None) for name, v in there.items()}
