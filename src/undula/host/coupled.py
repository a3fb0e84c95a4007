"""Rows and columns of a transformer's matrices that can only go together: attention heads, channels of its FFN.

A structure is a block of rows in some matrices (with their biases) and the block of columns that reads what they give
in one other.  Under grouped-query attention it is a whole group: a head of keys and values with all query heads that
read it.  Sizes come from the model's configuration; what plain transformers would make of another one is asked of it
(`resized`), so that no table of architectures can be out of date.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import quantised

HEADS, CHANNELS = KINDS = ("heads", "channels")


@dataclass(frozen=True)
class Layout:
    """How an architecture calls the matrices, below a layer."""

    kind: str
    rows: tuple[str, ...]
    columns: str


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYOUTS = (
    *(Layout(HEADS, _QKV, f"self_attn.{out}") for out in ("o_proj", "dense", "out_proj")),  # Llama, Phi, OPT
    Layout(HEADS, ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense"),
    Layout(CHANNELS, ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),  # Llama, Mistral, Qwen, Gemma
    Layout(CHANNELS, ("mlp.c_fc",), "mlp.c_proj"),  # GPT-2
    Layout(CHANNELS, ("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, ViT
    Layout(CHANNELS, ("ffn.lin1",), "ffn.lin2"),  # DistilBERT
    Layout(CHANNELS, ("fc1",), "fc2"),  # OPT
    Layout(CHANNELS, ("mlp.fc1",), "mlp.fc2"),  # Phi, CLIP
    Layout(CHANNELS, ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),  # GPT-NeoX
)
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")  # what configurations call the channels


@dataclass(frozen=True)
class Coupled:
    """Structures of one kind in one layer: structure j is rows j n .. (j + 1) n of each matrix in `rows` ({name: n})
    and columns j width .. (j + 1) width of the matrix `columns`."""

    kind: str
    layer: str
    rows: Mapping[str, int]
    columns: str
    width: int
    count: int

    def weights(self, model: nn.Module) -> int:
        """The entries of the matrices that one structure takes with it."""
        below = sum(n * shape_of(model, name)[1] for name, n in self.rows.items())
        return below + self.width * shape_of(model, self.columns)[0]

    def left(self, kept: int) -> dict[str, tuple[int | None, int | None]]:
        """{matrix: (rows, columns) that `kept` structures leave; None: all}."""
        return {**{name: (kept * n, None) for name, n in self.rows.items()}, self.columns: (None, kept * self.width)}


def config_of(model: nn.Module) -> Any:
    """The part of a model's configuration that says its sizes.  Raises TypeError for a model without one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"{type(model).__name__} is no model of transformers: heads and channels are read from its configuration"
        )
    return config.get_text_config()


def shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    """(O, I) of a linear layer, or of GPT-2's Conv1D, which is stored the other way round."""
    module = model.get_submodule(name)
    rows, columns = quantised.outline(module).shape
    return (columns, rows) if transposed(module) else (rows, columns)


def transposed(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear)


def coupled(model: nn.Module, kinds: tuple[str, ...] = KINDS) -> list[Coupled]:
    """The structures of these kinds in all layers, in the model's order.

    Raises TypeError for a model that has none of a kind, ValueError for layers whose sizes are not the configuration's.
    """
    names = dict(model.named_modules())
    config, found = config_of(model), []
    for name in names:
        for layout in LAYOUTS:
            layer = name.removesuffix(layout.columns)
            rows = [layer + each for each in layout.rows]
            whole = name.endswith(f".{layout.columns}") and all(each in names for each in rows)
            if whole and layout.kind in kinds and all(_is_matrix(names[each]) for each in (name, *rows)):
                found.append(_heads(model, config, layer, rows, name) if layout.kind == HEADS else
                             _channels(model, layer, rows, name))  # fmt: skip
    for kind in kinds:
        if not any(part.kind == kind for part in found):
            raise TypeError(_none(model, kind, names, kinds))
        _check_alike([part for part in found if part.kind == kind])
    return found


def _is_matrix(module: nn.Module) -> bool:
    conv1d = type(module).__name__.endswith("Conv1D") and hasattr(module, "nf")
    return isinstance(module, nn.Linear) or conv1d


def _none(model: nn.Module, kind: str, names: Mapping[str, nn.Module], kinds: tuple[str, ...]) -> str:
    """What to say of a model without such structures."""
    fused = _fused(names) if kind == HEADS else ""
    known = "; ".join(" ".join((*each.rows, each.columns)) for each in LAYOUTS if each.kind == kind)
    other = f". Take the other kind alone: structures={[k for k in KINDS if k != kind]}" if len(kinds) > 1 else ""
    found = f" ({fused})" if fused else ""
    return f"{type(model).__name__} has no {kind} that undula knows how to take out{found}; known are: {known}{other}"


def _fused(names: Mapping[str, nn.Module]) -> str:
    for name in names:
        if name.endswith((".c_attn", ".qkv_proj", ".query_key_value", ".Wqkv")):
            return f"queries, keys and values are one matrix, {name}"
    return ""


def _heads(model: nn.Module, config: Any, layer: str, rows: list[str], columns: str) -> Coupled:
    heads = int(config.num_attention_heads)
    pairs = int(getattr(config, "num_key_value_heads", None) or heads)
    wide = shape_of(model, rows[0])[0]
    size, group = wide // heads, heads // pairs
    sizes = [shape_of(model, name)[0] for name in rows], shape_of(model, columns)[1]
    if sizes != ([heads * size, pairs * size, pairs * size], heads * size) or heads % pairs:
        raise ValueError(
            f"{layer}: the configuration says {heads} heads and {pairs} of keys and values, and the matrices have "
            f"{sizes[0]} rows and {sizes[1]} columns: no structures can be told in them"
        )
    return Coupled(HEADS, layer, dict(zip(rows, (group * size, size, size), strict=True)), columns, group * size, pairs)


def _channels(model: nn.Module, layer: str, rows: list[str], columns: str) -> Coupled:
    count = shape_of(model, columns)[1]
    if any(shape_of(model, name)[0] != count for name in rows):
        raise ValueError(f"{layer}: {', '.join(rows)} have other numbers of rows than {columns} has columns ({count})")
    return Coupled(CHANNELS, layer, dict.fromkeys(rows, 1), columns, 1, count)


def _check_alike(parts: list[Coupled]) -> None:
    if odd := [p for p in parts if (p.count, p.width) != (parts[0].count, parts[0].width)]:
        raise ValueError(
            f"{odd[0].layer} has {odd[0].count} {odd[0].kind}, {parts[0].layer} {parts[0].count}: layers of different "
            "sizes have no place in a configuration of plain transformers"
        )


def resized(model: nn.Module, parts: list[Coupled], kept: Mapping[str, int]) -> Any:
    """A copy of the model's configuration with `kept` structures of each kind.

    Raises TypeError, naming the architecture and the parameter, where plain transformers would not make of it a model
    with the shapes that are left.
    """
    config: Any = copy.deepcopy(model.config)
    text, first = config.get_text_config(), {part.kind: part for part in reversed(parts)}
    for kind, number in kept.items():
        _say(model, text, first[kind], number)
    wanted = dict(_shapes(model, parts, kept))
    try:
        with torch.device("meta"):
            other = type(model)(config)
    except Exception as error:  # whatever an architecture makes of a size that it does not take
        raise TypeError(_inexpressible(model, kept, f"its own class refuses that: {error}")) from error
    for name, p in other.named_parameters():
        if name in wanted and tuple(p.shape) != wanted[name]:
            told = f"{name} would be {tuple(p.shape)}, where {wanted[name]} is left"
            raise TypeError(_inexpressible(model, kept, told))
    return config


def _inexpressible(model: nn.Module, kept: Mapping[str, int], why: str) -> str:
    told = ", ".join(f"{number} {kind}" for kind, number in kept.items())
    other = f" Take channels alone: structures=['{CHANNELS}']" if HEADS in kept and CHANNELS in kept else ""
    return f"plain transformers has no {type(model).__name__} with {told} in each layer: {why}.{other}"


def _say(model: nn.Module, text: Any, part: Coupled, number: int) -> None:
    if part.kind == HEADS:
        q, k, _ = part.rows.values()
        text.num_attention_heads, text.head_dim = number * (q // k), k
        if getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = number
        return
    names = [n for n in WIDTHS if getattr(text, n, None) == part.count]
    names += ["n_inner"] if hasattr(text, "n_inner") and text.n_inner is None else []
    if not names:
        raise TypeError(
            f"the configuration of {type(model).__name__} says {part.count} channels in none of {', '.join(WIDTHS)}: "
            "there is no number to change"
        )
    setattr(text, names[0], number)


def _shapes(model: nn.Module, parts: list[Coupled], kept: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(parameter, its shape) of the smaller model."""
    left = {name: size for part in parts if part.kind in kept for name, size in part.left(kept[part.kind]).items()}
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in left or leaf not in ("weight", "bias"):
            yield name, tuple(p.shape)
            continue
        (O, I), (rows, columns) = shape_of(model, owner), left[owner]
        O, I = O if rows is None else rows, I if columns is None else columns
        if leaf == "bias":
            yield name, (O,)
        else:
            yield name, (I, O) if transposed(model.get_submodule(owner)) else (O, I)


def indices(kept: Tensor, size: int) -> Tensor:
    """The rows or columns of the structures `kept` (their numbers), blocks of `size`."""
    return (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
