"""One layer of a model under PEFT, and the adapters at it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners import tuners_utils
from torch import Tensor, nn

from ...core.method import Additive, Factors, Method
from ...host.merging import check_mergeable
from ...host.rowwise import Rows, rows_of
from ...host.views import Conv1DView, LinearView, adapted, outline, view
from ...io import files
from ...methods.sum import Sum


class Hosted(nn.Module):
    """One adapter at one layer.  Frozen factors are buffers: PEFT sets `requires_grad` on all parameters at once.

    `record` is what `undula.io.native` writes about the whole adapter, one object for all of its layers; `site` is
    this one's name.  `unread`: transformers' own loader may put numbers here that nobody has looked at.
    """

    def __init__(
        self,
        method: Method,
        factors: Factors,
        rebuilt: Iterable[str],
        record: Mapping[str, Any],
        site: str,
        unread: bool,
    ):
        super().__init__()
        self.method, self.record, self.site, self.unread = method, record, site, unread
        self._non_persistent_buffers_set.update(rebuilt)  # no file holds what a seed rebuilds
        self._parameters.update({k: t for k, t in factors.items() if t.requires_grad})  # type: ignore[misc]
        self._buffers.update({k: t.detach() for k, t in factors.items() if not t.requires_grad})
        self.pending = bool(self.missing())  # may tensors still have to come?

    def factors(self) -> Factors:
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]

    def missing(self) -> list[str]:
        """The factors that hold no numbers: on the meta device, or NaN where a start needs data."""
        there = self.factors().items()
        return [k for k, t in there if t.is_meta or (t.is_floating_point() and bool(t.isnan().any()))]

    def check(self, name: str) -> None:
        """Raises RuntimeError while factors hold no numbers, ValueError for indices outside the layer.  Looks once:
        later NaN are training's own affair."""
        unread = self.unread and not torch.compiler.is_compiling()
        if not self.pending and not unread:
            return
        if missing := self.missing():
            raise RuntimeError(
                f"the adapter {name!r} ({self.method!r:.80}) has no numbers yet in {', '.join(missing)}: it was made "
                "with low_cpu_mem_usage=True, or from a configuration whose start needs data, and no tensors have been "
                f"loaded; or NaN have been, for {self.site}. Load them (PeftModel.from_pretrained, load_adapter), or "
                "begin anew with undula.peft_config(method, probe=undula.Probe(batches))"
            )
        if unread:
            try:
                _, O, I = self.record["sites"][self.site]
                self.method.check(outline(self.site, (O, I)), self.factors())
            except ValueError as error:
                raise ValueError(f"adapter {name!r}: {error}") from None
            self.unread = False
        self.pending = False

    def cast(self, change: Mapping[torch.dtype, torch.dtype], once: dict[Any, Any]) -> None:
        """Floating-point factors in other types; tensors that layers share stay shared through `once`."""
        for held in (self._parameters, self._buffers):
            for k, t in held.items():
                if t is None or t.dtype not in change:
                    continue
                key = id(t) if isinstance(t, nn.Parameter) or t.is_meta else (t.data_ptr(), t.shape)
                if key not in once:
                    new = t.detach().to(change[t.dtype])
                    once[key] = t, nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
                held[k] = once[key][1]


class UndulaLayer(nn.Module, tuners_utils.BaseTunerLayer):
    """A layer of the model (`base_layer`) and the adapters at it, by name."""

    adapter_layer_names = ("undula_factors",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.product = matrix("base_layer", base_layer).product  # see `LinearView.product`
        self.undula_factors: Any = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.kept: Any = ()  # the base's own weight, while merged: in a tuple, so that it is no parameter of this

    def __contains__(self, adapter_name: str) -> bool:
        return adapter_name in self.undula_factors

    def __getattr__(self, name: str) -> Any:
        """What models ask their layers (`in_features`, `nf` ...).  Private names are marks that others leave here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
        base = self.base_layer
        if name in ("in_features", "out_features") and not hasattr(base, name):  # PEFT's layers all have them
            return tuners_utils._get_in_out_features(base)[name == "out_features"]
        return getattr(base, name)

    @property
    def layer(self) -> Any:
        """The base layer as a matrix.  Never kept: offloading replaces its `forward` while the adapter lives."""
        base, layer = self.base_layer, matrix("base_layer", self.base_layer)
        layer.product = self.product
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            layer.override = base.__call__
        return layer

    def law(self, names: Sequence[str]) -> tuple[Any, Factors]:
        """The method and factors of the adapters `names`; several at once add up (on the Additive rung).  Raises
        RuntimeError for factors that hold no numbers yet."""
        hosted = [self.undula_factors[n] for n in names]
        for n, h in zip(names, hosted, strict=True):
            h.check(n)
        if len(hosted) == 1:
            return hosted[0].method, hosted[0].factors()
        self.check_together(names)
        methods = tuple(h.method for h in hosted)
        every = {f"{i}_{k}": t for i, h in enumerate(hosted) for k, t in h.factors().items()}
        return Sum(methods, (1.0,) * len(methods)), every

    def check_together(self, names: Sequence[str], where: str = "this layer") -> None:
        """Raises ValueError where several adapters cannot add up at one layer."""
        here = [n for n in names if n in self]
        alone = [n for n in here if not isinstance(self.undula_factors[n].method, Additive)]
        if len(here) > 1 and alone:
            method = self.undula_factors[alone[0]].method
            raise ValueError(
                f"{', '.join(here)} cannot be active together: {alone[0]!r} is {method!r:.80} at {where}, which stands "
                f"on the rung {method.rung()} and has no update that could be added. Activate one, or make the others "
                "of methods on the rung Additive (LoRA, LoRAN, AuroRAStatic ...)"
            )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.check_together([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().set_adapter(adapter_names, inference_mode)

    def forward(self, *args: Any, rows: Rows | None = None, **named: Any) -> Tensor:
        if rows is not None:
            return adapted(rows, self.layer, {}, args, named)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [n for n in self.active_adapters if n in self]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **named)
        method, factors = self.law(active)
        return adapted(method, self.layer, factors, args, named)

    def rows(self, names: Sequence[str]) -> Rows:
        """The law of a mixed batch: row i through the adapter names[i]."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged are: {', '.join(self.merged_adapters)}"
            )
        laws = {n: self.law([n]) for n in dict.fromkeys(names) if n in self}
        return Rows(laws, rows_of(names, None), len(names), self.weight.device)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [n for n in tuners_utils.check_adapters_to_merge(self, adapter_names) if n in self]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        check_mergeable({n: self.undula_factors[n].method for n in names})
        method, factors = self.law(names)
        if self.merged:
            self.unmerge()
        W_OI = self.layer.stays(self.layer.weight, method.weight(self.layer.weight, factors))
        if safe_merge and not torch.isfinite(W_OI).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: merging it "
                "gives NaN or infinity"
            )
        self.kept, self.merged_adapters = (self.base_layer.weight,), names
        self.base_layer._parameters["weight"] = self.layer.put(W_OI)

    def unmerge(self) -> None:
        """The base's own weight is back, bit for bit."""
        if not self.merged:
            return warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.base_layer._parameters["weight"] = self.kept[0]
        self.kept, self.merged_adapters = (), []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can read an update off this layer: linear, and on the Additive rung."""
        here = adapter_name in self
        return isinstance(self, UndulaLinear) and (
            not here or isinstance(self.undula_factors[adapter_name].method, Additive)
        )

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """dW as the base layer stores its weight (GPT-2's Conv1D: transposed).  Zero where the adapter is not."""
        if adapter_name not in self:
            return torch.zeros_like(self.weight)
        method, factors = self.law([adapter_name])
        dW_OI = method.delta(factors)
        return dW_OI.T.contiguous() if isinstance(self.layer, Conv1DView) else dW_OI

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None):
        """PEFT's also casts to the base layer's type, which would round float32 factors over a bf16 base."""
        if adapter_name not in self:
            return
        hosted = self.undula_factors[adapter_name]
        if not any(t.is_meta for t in hosted.factors().values()):
            hosted.to(self.weight.device if device is None else device)


class UndulaLinear(UndulaLayer):
    """PEFT's "all-linear" recognises the layers that it has adapted before by `Linear` in the name of their class."""


def hosts(model: nn.Module) -> dict[str, UndulaLayer]:
    """The adapted layers of a model (a PeftModel or what it wraps) by site."""
    return {n.removeprefix(files.PREFIX): m for n, m in model.named_modules() if isinstance(m, UndulaLayer)}


def matrix(name: str, module: nn.Module) -> LinearView:
    """A module as a matrix.  Raises TypeError for one that is none."""
    layer = module.layer if isinstance(module, UndulaLayer) else view(module)
    if layer is not None:
        return layer
    if isinstance(module, tuners_utils.BaseTunerLayer):
        raise TypeError(
            f"target_modules chooses {name}, which another method of PEFT's adapts already "
            f"({type(module).__module__}.{type(module).__name__}): unload that first. Adapters of two types do not go "
            "into one PeftModel"
        )
    raise TypeError(
        f"target_modules chooses {name}, a {type(module).__name__}: undula adapts Linear, Conv1D, "
        "convolutional and Embedding layers. Narrow target_modules, or name it in exclude_modules"
    )
