"""PEFT as a host: any method of undula in `peft.get_peft_model`.  The one file that knows PEFT's internals.

    model = peft.get_peft_model(model, undula.peft_config(undula.AuroRA(r=2), target_modules="all-linear"))

PEFT chooses the layers, switches, trains and saves; what an adapter is, computes and looks like on disk is undula's.
A directory that PEFT saves is undula's own (`undula.io.native`), and the other way round; before PEFT loads one,
`undula.enable_peft()` must have told it what `peft_type: UNDULA` means.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import peft
    from peft import PeftConfig
    from peft.tuners import tuners_utils
    from peft.utils.other import AuxiliaryTrainingWrapper
except ImportError as error:
    raise ImportError("undula.peft_config and undula.enable_peft need PEFT: pip install 'peft>=0.21,<0.23'") from error

from .. import bases
from ..io import files, native
from ..making import assigned, check_shapes, made, unstarted
from ..merging import check_mergeable
from ..method import Factors, Method
from ..methods.sum import Sum
from ..routing import Rows
from ..sites import EmbeddingView, LinearView, view


class _PeftType(str):
    """What PEFT takes for a member of its enum PeftType, which nobody can extend: equal to its string, with a value."""

    value = name = property(lambda self: self[:])

    def __str__(self) -> str:
        return f"PeftType.{self[:]}"

    def __deepcopy__(self, memo: Any) -> _PeftType:
        return self


UNDULA: Any = _PeftType(native.TYPE)


def enable_peft() -> None:
    """Makes undula's directories loadable by PEFT in this process.  Fills PEFT's three registries, nothing else."""
    release = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if not (0, 21) <= release < (0, 23):
        raise ImportError(f"undula works inside peft>=0.21,<0.23; this is peft {peft.__version__}")
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[UNDULA] = UndulaConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[UNDULA] = UndulaModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[UNDULA] = UndulaModel.prefix


def peft_config(
    method: Method,
    target_modules: str | re.Pattern[str] | Sequence[str] = "all-linear",
    *,
    overrides: Mapping[str, Method] | None = None,
    modules_to_save: Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    task_type: str | None = None,
) -> PeftConfig:
    """A configuration of `method` for `peft.get_peft_model`, TRL and whatever else takes a PeftConfig.

    Everything but `method` and `overrides` (methods of the layers that match a pattern, the first match counts) means
    what it means in PEFT's own configurations: `target_modules` is "all-linear", a regular expression or a list of
    names and suffixes; `modules_to_save` are trained and saved in full.
    """
    enable_peft()
    rules: dict[str, Any] = {
        "target_modules": target_modules.pattern if isinstance(target_modules, re.Pattern) else target_modules,
        "modules_to_save": modules_to_save,
        "exclude_modules": exclude_modules,
        "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern,
    }
    rules = {k: v if v is None or isinstance(v, str | int) else list(v) for k, v in rules.items()}
    return UndulaConfig(method=method, overrides=dict(overrides or {}), task_type=task_type, **rules)


@dataclass
class UndulaConfig(PeftConfig):
    """`method` where PEFT's rules choose; or, once on a model or read from a directory, `undula`: every site with its
    method, as `undula.io.native` writes it."""

    method: Method | None = None
    overrides: dict[str, Method] = field(default_factory=dict)
    target_modules: Any = None
    modules_to_save: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    undula: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = UNDULA
        if self.undula is None and self.method is None:
            raise ValueError(f"no `undula` object in {files.CONFIG}; a new configuration is undula.peft_config(method)")
        self.sites = {} if self.undula is None else native.read_sites(self.undula, files.CONFIG)[0]

    def to_dict(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        if self.undula is None:
            raise ValueError("this configuration names no layers yet: put it on a model, then save the model")
        # what the rules chose stands in `undula`
        rules = ("method", "overrides", "exclude_modules", "layers_to_transform", "layers_pattern")
        kept = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in rules}
        return {**kept, "target_modules": list(self.sites)}

    def save_pretrained(self, save_directory, **kwargs):
        """PEFT's, and the directory's README says how to load it: without undula PEFT ends in a bare KeyError."""
        super().save_pretrained(save_directory, **kwargs)
        readme, note = Path(save_directory, "README.md"), native.README.strip()
        text = readme.read_text(encoding="utf-8") if readme.exists() else ""
        if note not in text:
            readme.write_text(f"{text}\n{note}\n".lstrip(), encoding="utf-8")


class Hosted(nn.Module):
    """One adapter at one layer.  Frozen factors are buffers: PEFT sets `requires_grad` on all parameters at once."""

    def __init__(self, method: Method, factors: Factors, rebuilt: Iterable[str]):
        super().__init__()
        self.method = method
        self._non_persistent_buffers_set.update(rebuilt)  # no file holds what a seed rebuilds
        self._parameters.update({k: t for k, t in factors.items() if t.requires_grad})  # type: ignore[misc]
        self._buffers.update({k: t.detach() for k, t in factors.items() if not t.requires_grad})

    def factors(self) -> Factors:
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]


class UndulaLayer(nn.Module, tuners_utils.BaseTunerLayer):
    """A layer of the model (`base_layer`) and the adapters at it, by name."""

    adapter_layer_names = ("undula_factors",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
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
            return getattr(self.base_layer, name)

    @property
    def layer(self) -> Any:
        """The base layer as a matrix.  Never kept: offloading replaces its `forward` while the adapter lives."""
        base, layer = self.base_layer, _matrix("base_layer", self.base_layer)
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            layer.override = base.__call__
        return layer

    def law(self, names: Sequence[str]) -> tuple[Any, Factors]:
        """The method and factors of the adapters `names`; several at once add up (on the Additive rung)."""
        hosted = [self.undula_factors[n] for n in names]
        if len(hosted) == 1:
            return hosted[0].method, hosted[0].factors()
        methods = tuple(h.method for h in hosted)
        every = {f"{i}_{k}": t for i, h in enumerate(hosted) for k, t in h.factors().items()}
        return Sum(methods, (1.0,) * len(methods)), every  # type: ignore[abstract]

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        if rows is not None:
            return rows.forward(x, self.layer, {})
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [n for n in self.active_adapters if n in self]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x)
        method, factors = self.law(active)
        return method.forward(x, self.layer, factors)

    def rows(self, names: Sequence[str]) -> Rows:
        """The law of a mixed batch: row i through the adapter names[i]."""
        if self.merged:
            raise ValueError(f"adapter_names with {self.merged_adapters} merged: call unmerge_adapter first")
        laws = {n: self.law([n]) for n in dict.fromkeys(names) if n in self}
        return Rows(laws, names, self.weight.device)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [n for n in tuners_utils.check_adapters_to_merge(self, adapter_names) if n in self]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        method, factors = self.law(names)
        check_mergeable({"this layer": method})
        if self.merged:
            self.unmerge()
        W_OI = method.weight(self.layer.weight, factors)
        if safe_merge and not torch.isfinite(W_OI).all():
            raise ValueError(f"merging {', '.join(names)} gives NaN or infinity: the adapter is broken")
        self.kept, self.merged_adapters = (self.base_layer.weight,), names
        self.base_layer._parameters["weight"] = self.layer.put(W_OI)

    def unmerge(self) -> None:
        """The base's own weight is back, bit for bit."""
        if not self.merged:
            return warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.base_layer._parameters["weight"] = self.kept[0]
        self.kept, self.merged_adapters = (), []

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None):
        """PEFT's also casts to the base layer's type, which would round float32 factors over a bf16 base."""
        if adapter_name in self:
            self.undula_factors[adapter_name].to(self.weight.device if device is None else device)


class UndulaLinear(UndulaLayer):
    """PEFT's "all-linear" recognises the layers that it has adapted before by `Linear` in the name of their class."""


def hosts(model: nn.Module) -> dict[str, UndulaLayer]:
    """The adapted layers of a model (a PeftModel or what it wraps) by site."""
    return {n.removeprefix(files.PREFIX): m for n, m in model.named_modules() if isinstance(m, UndulaLayer)}


class UndulaModel(tuners_utils.BaseTuner):
    """PEFT's driver: where adapters go, how they are merged, saved and loaded."""

    prefix = "undula_"
    tuner_layer_cls = UndulaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(self, model, peft_config, adapter_name, **options):
        self.alone = isinstance(peft_config, PeftConfig)  # put into a model directly, with no PeftModel around it
        super().__init__(model, peft_config, adapter_name, **options)

    def inject_adapter(self, model, adapter_name, *arguments, **options):
        """Every check and every factor comes before the first change of the model."""
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])  # the caller keeps its own
        layers = self._chosen(model, config)
        if layers:  # without any, PEFT says what does not match
            recorded = config.undula
            if recorded is None:
                self.new: Any = made(layers, assigned(layers, config.method, config.overrides))
            else:
                seeded = recorded.get("rebuilt", {})
                self.new = unstarted(layers, config.sites, lambda site, factor: native.key_of(site, factor) in seeded)
                native.as_recorded(self.new, recorded, files.CONFIG)
            config.undula, config.sites = native.laid_out(self.new, None, None)[0]["undula"], self.new.methods
            self._check_new(model, adapter_name, config.undula["tied"])
        super().inject_adapter(model, adapter_name, *arguments, **options)
        bases.keep_gradients(model)
        self.new = None
        # PEFT would store an embedding's own weight because its name is among the targets; `undula` names the sites
        config.target_modules = None

    def _chosen(self, model: nn.Module, config: Any) -> dict[str, LinearView]:
        """The layers that PEFT's rules choose, or those of a directory, as matrices."""
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        config = tuners_utils._maybe_include_all_linear_layers(config, model)
        named = dict(model.named_modules())
        inner = tuple(f"{n}." for n, m in named.items() if isinstance(m, UndulaLayer | AuxiliaryTrainingWrapper))
        verdicts = {n: self._check_target_module_exists(config, n) for n in named if n and not n.startswith(inner)}
        if any(isinstance(v, tuners_utils._ExcludedModule) for v in verdicts.values()):
            config.exclude_modules = None  # it has had its effect; PEFT warns of one that never has
        missing = [n for n in config.sites if not verdicts.get(n)]
        if missing:
            raise ValueError(f"the adapter has sites that this model has not: {', '.join(missing[:5])}")
        return {n: _matrix(n, named[n]) for n, chosen in verdicts.items() if chosen}

    def _check_new(self, model: nn.Module, adapter_name: str, tied: Mapping[str, str]) -> None:
        parts = {part for n, _ in model.named_parameters() for part in n.split(".")}
        if adapter_name in parts | {"undula_factors", *(factor for _, factor, _ in self.new.tensors())}:
            raise ValueError(
                f"an adapter on this model cannot be called {adapter_name!r}: PEFT tells adapters apart by their names "
                "within the names of parameters, and this is a part of one already"
            )
        if tied and self.alone:
            raise ValueError(
                f"{self.new.method!r} shares tensors between layers. transformers' own add_adapter and load_adapter "
                "(and PEFT's inject_adapter_in_model) fill a model layer by layer: all layers but one would keep "
                "untrained tensors. Use peft.get_peft_model and PeftModel.from_pretrained, or undula.attach"
            )

    @staticmethod
    def _check_target_module_exists(peft_config, key):
        if peft_config.sites:
            return key in peft_config.sites
        return tuners_utils.check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.sites:
            peft_config.target_modules = list(peft_config.sites)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key):
        if not isinstance(target, UndulaLayer):
            base, layer = target, view(target)
            linear = layer.channel == -1 and not isinstance(layer, EmbeddingView)
            target = UndulaLinear(base) if linear else UndulaLayer(base)
            self._replace_module(parent, target_name, target, base)
        new, rebuilt = self.new, peft_config.undula["rebuilt"]
        seeded = [k for k in new.factors[current_key] if native.key_of(current_key, k) in rebuilt]
        target.undula_factors[adapter_name] = Hosted(new.methods[current_key], new.factors[current_key], seeded)

    def _check_mergeable(self, names: Sequence[str] | None) -> None:
        """Refuses before the first layer changes."""
        asked = self.active_adapters if names is None else names
        laws = {s: m.law(own) for s, m in hosts(self.model).items() if (own := [n for n in asked if n in m])}
        check_mergeable({s: method for s, (method, _) in laws.items()})

    def merge_adapter(self, adapter_names=None, safe_merge=False):
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self._check_mergeable(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Around a forward or generate call: mixed batches, by hooks that pass `adapter_names` to the layers."""
        names = kwargs.get("adapter_names")
        if names is not None and self.training:
            raise ValueError("adapter_names is for inference, as everywhere in PEFT; undula.rows trains mixed batches")
        unknown = sorted(set(names or ()) - {*self.peft_config, "__base__"})
        if unknown:
            there = ", ".join(self.peft_config)
            raise ValueError(f"adapter_names asks for {', '.join(unknown)}; there are: {there}, __base__ (no adapter)")
        route = functools.partial(_route, known={}, names=list(names or ()), beams=kwargs.get("num_beams") or 1)
        routed = [m for m in self.modules() if names and isinstance(m, UndulaLayer | AuxiliaryTrainingWrapper)]
        handles = [m.register_forward_pre_hook(route, with_kwargs=True) for m in routed]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """Tensors that sites share are stored once."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        on_disk = {k: cls._remove_adapter_name_from_key(k, adapter_name).removeprefix(files.PREFIX) for k in found}
        return {k: t for k, t in found.items() if files.PREFIX + on_disk[k] not in config.undula["tied"]}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Strict, where PEFT only warns: missing, surplus or misshapen tensors and NaN are errors."""
        name = f"adapter {adapter_name!r}"
        state_dict = native.untied(state_dict, config.undula["tied"], name)
        files.check_finite(state_dict, name)
        wanted = {s: m.undula_factors[adapter_name].factors() for s, m in hosts(model).items() if adapter_name in m}
        found: dict = {s: {} for s in wanted}
        for key, t in state_dict.items():
            site, factor = native.split(key)
            if site is not None:  # else it is of modules_to_save: PEFT looks after those
                found.setdefault(site, {})[factor] = t
        for site, factors in wanted.items():
            rebuilt = {k: t for k, t in factors.items() if native.key_of(site, k) in config.undula["rebuilt"]}
            found[site] = {**rebuilt, **found[site]}
        for site, tensors in found.items():
            check_shapes(f"{name}: {site}", tensors, wanted.get(site, {}))
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        surplus = [k for k in renamed if k not in own and k.removeprefix(files.PREFIX) not in own]
        if surplus:
            raise ValueError(f"{name} holds tensors that have no place in this model: {', '.join(surplus[:5])}")
        return _as_parameters(model, renamed)


def _matrix(name: str, module: nn.Module) -> LinearView:
    layer = module.layer if isinstance(module, UndulaLayer) else view(module)
    if layer is None:
        raise TypeError(
            f"target_modules chooses {name}, a {type(module).__name__}: undula adapts Linear, Conv1D, Conv2d and "
            "Embedding layers. Narrow target_modules, or name it in exclude_modules"
        )
    return layer


def _as_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the parameters that they become, one for those that are tied: low_cpu_mem_usage puts them in place of
    the model's own.  Copies: parts of a mapped file are not aligned, and BLAS rounds those differently."""
    ours = {k: p for k, p in model.named_parameters(remove_duplicate=False) if native.MARK in k}
    once: dict[int, Tensor] = {}

    def live(t: Tensor, p: nn.Parameter) -> Tensor:
        return once.setdefault(id(t), nn.Parameter(t.to(p.dtype, copy=True), p.requires_grad))

    return {k: live(t, ours[k]) if k in ours else t for k, t in tensors.items()}


def _route(module, args, kwargs, *, known: dict, names: list[str], beams: int):
    """A forward pre-hook that tells a layer whose row is whose; beam search repeats every row."""
    if len(names) != len(args[0]) == len(names) * beams:
        names = [n for n in names for _ in range(beams)]
    if not isinstance(module, UndulaLayer):
        return args, {**kwargs, "adapter_names": names}
    key = (module, len(names))
    if key not in known:  # one call to generate passes each layer many times
        known[key] = module.rows(names)
    return args, {**kwargs, "rows": known[key]}
