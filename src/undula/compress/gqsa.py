"""GQSA (arXiv:2412.17560): a base of which a part of the groups of each row is kept, in 4 bits; after that paper.

    rows cut into runs of G columns; of each row the (1 - p) I / G groups with the largest sum_i h_i w_i^2 are kept
    lo = min(0, min w), hi = max(0, max w) of a group;  s = (hi - lo) / 15,  z = round(-lo / s)
    q = clip(round(w / s) + z, 0, 15),   w^ = (q - z) s

h_i = 1, or with calibration the mean square of input i (the diagonal of the layer's Hessian).  Calibrated block by
block (BQPO: `undula.compress.bqpo`) and tuned in scales and zeros alone (E2E-OQP: any training with
`full=("*.scale", "*.zero")`).  Scales are rounded up to 16 bits, in which they are stored, so that |w - w^| <= s / 2
holds for what is kept.

Interpretation: the sources name the scheme; the measure by which groups are chosen, G = 16, the storage (K groups in
every row, so that a row needs no pointer) and all rates are settled here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import gqsa as kernel
from ..kernels.autocast import exact_backward
from .dense_layers import layers_of

METHOD = "undula-gqsa"  # what a configuration calls it
TOP = 15  # the largest q


@dataclass(frozen=True)
class Form:
    """How a layer is stored: groups of `group` columns, of which the share `sparsity` is gone in each row."""

    sparsity: float = 0.5
    group: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is a share of the groups, at least 0 and below 1; found {self.sparsity:g}")
        if self.group < 2 or self.group % 2:
            raise ValueError(f"a group is an even number of columns, two to a byte; found {self.group}")

    def kept(self, columns: int) -> int:
        """How many groups of a row stay: one at least."""
        return max(1, round((1 - self.sparsity) * (columns // self.group)))

    def bits(self, columns: int) -> float:
        """Bits for each weight of the dense matrix: codes, a scale and a zero of 16 bits, the place of the group."""
        groups = columns // self.group
        return self.kept(columns) * (4 * self.group + 32 + (8 if groups <= 256 else 16)) / columns


@dataclass(frozen=True)
class Packed:
    """A matrix: q (O, K, G/2) packed, places of the groups (O, K), scales and zeros (O, K)."""

    codes: Tensor
    index: Tensor
    scale: Tensor
    zero: Tensor


def chosen(W_OI: Tensor, form: Form, h_I: Tensor | None = None) -> Tensor:
    """The groups (O, K) of each row that are kept, in their order."""
    weighed = W_OI.square() if h_I is None else W_OI.square() * h_I
    size_OC = weighed.view(len(W_OI), -1, form.group).sum(-1)
    return size_OC.topk(form.kept(W_OI.shape[1]), dim=1).indices.sort(1).values


def ranges(w_OKG: Tensor) -> tuple[Tensor, Tensor]:
    """(s, z) of groups, s rounded up to 16 bits."""
    low, high = w_OKG.amin(-1).clamp(max=0), w_OKG.amax(-1).clamp(min=0)
    s = rounded_up((high - low) / TOP)
    return s, (-low / s).round()


def rounded_up(s: Tensor) -> Tensor:
    """The next number that float16 has; 1 for 0, which has nothing to scale."""
    half = s.half()
    short = half.to(s.dtype) < s
    up = (half.view(torch.int16) + short.to(torch.int16)).view(torch.float16).to(s.dtype)
    return torch.where(s > 0, up, 1.0)


def coded(w_OKG: Tensor, s_OK: Tensor, z_OK: Tensor) -> Tensor:
    """q (O, K, G) of 0 .. 15."""
    return ((w_OKG / s_OK[..., None]).round() + z_OK[..., None]).clamp(0, TOP)


def packed(w_OKG: Tensor, index_OK: Tensor, s_OK: Tensor, z_OK: Tensor, columns: int) -> Packed:
    """What is stored of kept groups."""
    small = columns // w_OKG.shape[-1] <= 256
    q = coded(w_OKG, s_OK, z_OK)
    codes = kernel.pack(q)
    return Packed(codes, index_OK.to(torch.uint8 if small else torch.int16), s_OK.float(), z_OK.float())


def quantised(W_OI: Tensor, form: Form, h_I: Tensor | None = None) -> Packed:
    """A dense matrix in this form.  Raises ValueError where its columns are no multiple of the group, or not finite."""
    _check(W_OI, form)
    W_OI = W_OI.detach().to(torch.promote_types(W_OI.dtype, torch.float32))
    index = chosen(W_OI, form, h_I)
    w_OKG = kernel.gathered(W_OI, index, form.group)
    return packed(w_OKG, index, *ranges(w_OKG), W_OI.shape[1])


def _check(W_OI: Tensor, form: Form) -> None:
    columns = W_OI.shape[1]
    if columns % form.group:
        fit = [g for g in range(2, 129, 2) if columns % g == 0]
        raise ValueError(
            f"its {columns} columns are no multiple of group={form.group}: "
            + (f"groups of {', '.join(map(str, fit))} would come out even; take one, or leave" if fit else "leave")
            + " the layer out (exclude)"
        )
    if not W_OI.isfinite().all():
        raise ValueError("its weight has numbers that are not finite")


class GQSALinear(nn.Linear):
    """A linear layer whose weight is stored so: `weight` holds the codes, as int8 (which models that look at the type
    of a weight know to be quantised), `index` the places of the groups.  `scale` and `zero` (float32) can train."""

    index: Tensor

    def __init__(self, O: int, I: int, form: Form, bias: Tensor | None = None, dtype: torch.dtype = torch.float32):
        nn.Module.__init__(self)
        self.out_features, self.in_features = O, I
        K, kind = form.kept(I), torch.uint8 if I // form.group <= 256 else torch.int16
        self.weight = nn.Parameter(torch.zeros(O, K * form.group // 2, dtype=torch.int8), requires_grad=False)
        self.register_buffer("index", torch.zeros(O, K, dtype=kind))
        self.scale = nn.Parameter(torch.ones(O, K, dtype=torch.float32), requires_grad=False)
        self.zero = nn.Parameter(torch.zeros(O, K, dtype=torch.float32), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        self.format = _Format(dtype)

    @staticmethod
    def of(layer: nn.Linear, form: Form, made: Packed) -> GQSALinear:
        """In the place of `layer`."""
        new = GQSALinear(layer.out_features, layer.in_features, form, layer.bias, layer.weight.dtype)
        device = layer.weight.device
        for name, t in (("weight", made.codes.flatten(1).view(torch.int8)), ("scale", made.scale), ("zero", made.zero)):
            setattr(new, name, nn.Parameter(t.to(device), requires_grad=False))
        new.index = made.index.to(device)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"a layer in 4-bit groups was given {x.dtype}: the model casts to the type of its weight, which holds "
                "codes. Leave the layer out when compressing (exclude)"
            )
        if kernel.applies(x, self.scale):
            y = kernel.product(x, self.codes, self.index, self.scale, self.zero)
            return y if self.bias is None else y.add_(self.bias)
        y = _Product.apply(x, self.codes, self.index, self.scale, self.zero)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def codes(self) -> Tensor:
        """q (O, K, G/2), two to a byte; `weight` has them with K G/2 columns."""
        return self.weight.view(torch.uint8).view(*self.index.shape, -1)

    def extra_repr(self) -> str:
        _, K, half = self.codes.shape
        return f"{super().extra_repr()}, {K} groups of {2 * half} in a row"


class _Product(torch.autograd.Function):
    """x W^', with gradients of x, scales and zeros; the dense weight is made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, index: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        W_OI = kernel.dense(codes, index, scale, zero, x.shape[-1]).to(x.dtype)
        tuned = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(x if tuned else None, codes, index, scale, zero)
        ctx.columns = x.shape[-1]
        return F.linear(x, W_OI)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, g: Tensor) -> Any:
        x, codes, index, scale, zero = ctx.saved_tensors
        W_OI = kernel.dense(codes, index, scale, zero, ctx.columns).to(g.dtype)
        gx = g @ W_OI if ctx.needs_input_grad[0] else None
        if x is None:
            return gx, None, None, None, None
        gW_OI = g.flatten(0, -2).T @ x.to(g.dtype).flatten(0, -2)
        gw_OKG = kernel.gathered(gW_OI.contiguous(), index, 2 * codes.shape[-1]).to(scale.dtype)
        q = kernel.unpack(codes).to(scale.dtype)
        gs = (gw_OKG * (q - zero[..., None])).sum(-1)
        return gx, None, None, gs, -gw_OKG.sum(-1) * scale


class _Format:
    """How the host reads the weight of such a layer, see `host.quantised`."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def outline(self, module: nn.Module) -> Tensor:
        return torch.empty(module.out_features, module.in_features, dtype=self.dtype, device="meta")  # type: ignore

    def dense(self, module: nn.Module) -> Tensor:
        m: Any = module
        with torch.no_grad():
            return kernel.dense(m.codes, m.index, m.scale, m.zero, m.in_features).to(self.dtype)

    def stored(self, module: nn.Module, W: Tensor) -> nn.Parameter:
        raise TypeError(
            "nothing is merged into a base of 4-bit groups: its zeros would be lost, or stay. Merge into dense weights "
            "(`undula merge --dense`), or keep the adapter beside the base"
        )


def dense_of(layer: GQSALinear) -> Tensor:
    """W^ (O, I) of a layer, in the type that it had."""
    made: Tensor = layer.__dict__["format"].dense(layer)
    return made


@dataclass(frozen=True)
class Compressed:
    """What came of it: |W - W^| / |W| of each layer, and the bits that a weight of these layers takes."""

    errors: Mapping[str, float]
    bits: float


@torch.no_grad()
def compress(model: nn.Module, form: Form = Form(), exclude: Sequence[str] = ()) -> Compressed:
    """Stores the layers of a model so, in place, without data.  Raises ValueError that names the layer where one does
    not fit; nothing is changed then.  With data see `undula.compress.bqpo.calibrated`, which calls this."""
    layers = check_fits(model, form, exclude)
    errors = {}
    for name, layer in layers.items():
        made = quantised(layer.weight, form)
        errors[name] = put(model, name, layer, form, made)
    return Compressed(errors, mean_bits(layers.values(), form))


def check_fits(model: nn.Module, form: Form, exclude: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers, each of which fits."""
    layers = layers_of(model, exclude)
    for name, layer in layers.items():
        try:
            _check(layer.weight, form)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return layers


def put(model: nn.Module, name: str, layer: nn.Linear, form: Form, made: Packed) -> float:
    """Puts the stored layer into the place of `layer`; returns |W - W^| / |W|."""
    parent, _, leaf = name.rpartition(".")
    new = GQSALinear.of(layer, form, made)
    setattr(model.get_submodule(parent), leaf, new)
    W = layer.weight.detach()
    return float((dense_of(new) - W).norm() / W.norm().clamp_min(torch.finfo(W.dtype).tiny))


def mean_bits(layers: Iterable[nn.Linear], form: Form) -> float:
    """Bits for each weight of these layers."""
    sizes = [(layer.weight.numel(), form.bits(layer.in_features)) for layer in layers]
    return sum(n * bits for n, bits in sizes) / sum(n for n, _ in sizes)


def compressed_layers(model: nn.Module) -> dict[str, GQSALinear]:
    """The layers of a model that are stored so."""
    return {name: m for name, m in model.named_modules() if isinstance(m, GQSALinear)}
