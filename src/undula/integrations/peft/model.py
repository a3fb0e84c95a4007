"""`UndulaModel`: PEFT's driver.  Where adapters go, how they are switched, merged, saved and loaded."""

from __future__ import annotations

import contextlib
import copy
import functools
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners import tuners_utils
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...host import quantised
from ...host.matrices import aliases
from ...host.merging import check_mergeable, untie
from ...host.views import EmbeddingView, LinearView, check_writable, view
from ...io import files, reading
from . import starting, storing
from .config import UndulaConfig
from .guards import check_called, keep_slow
from .layer import Hosted, UndulaLayer, UndulaLinear, hosts, matrix
from .undoing import undone_on_error


class UndulaModel(tuners_utils.BaseTuner):
    """PEFT's driver: where adapters go, how they are merged, saved and loaded."""

    prefix = "undula_"
    tuner_layer_cls = UndulaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012
    verdicts: Any = None  # what PEFT's rules say of every module, while an adapter is being made
    record: Any = None
    new: Any = None

    def __init__(self, model, peft_config, adapter_name, **options):
        self.alone = isinstance(peft_config, PeftConfig)  # put into a model directly, with no PeftModel around it
        with undone_on_error(model):
            super().__init__(model, peft_config, adapter_name, **options)

    def inject_adapter(
        self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
    ):
        """Every check and every factor comes before the first change of the model; what PEFT refuses later is undone.

        The layers are those of PEFT's rules; or of the keys of `state_dict`; or of a directory's record; or, for a
        configuration that is on this model already, those of its adapter.
        """
        config, like = self._own(adapter_name)
        rule = config.target_modules = config.rule if config.target_modules is None else config.target_modules
        record = None if like is None else starting.record_of(model, like)
        live = None if record is None else starting.live_factors(model, like)
        if record is None and config.method is None:
            record = config.undula
        if state_dict is not None:
            state_dict = {k.removeprefix(files.PREFIX): t for k, t in state_dict.items()}
        layers = self._chosen(model, config, record, state_dict)
        if layers or rule == DUMMY_TARGET_MODULES:  # without any, PEFT says what does not match
            check_called(model, layers)
            meta = low_cpu_mem_usage or _on_meta()
            if record is None:
                self.new, self.record = starting.by_rules(model, layers, config, meta)
            else:
                self.new, self.record = starting.by_record(layers, record, live, meta)
            self._check_new(model, adapter_name, config)
            config.undula, config.sites = self.record, starting.methods_of(self.record)
            config.origin = secrets.token_hex(8) if like is None else config.origin
        with undone_on_error(model):
            self._take_away(model, adapter_name)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        keep_slow(model, UndulaLayer)
        quantised.keep_gradients(model)
        self.new = self.record = self.verdicts = None
        config.target_modules, config.rule = rule, None  # PEFT has written names over "all-linear"

    def _own(self, adapter_name: str) -> tuple[UndulaConfig, str | None]:
        """(the configuration of this adapter, which no other on this model has too; the adapter that it came from)."""
        configs: Any = self.peft_config
        configs[adapter_name].check()
        like = starting.alike(configs, adapter_name)
        if like is not None and configs[like] is configs[adapter_name]:
            configs[adapter_name] = copy.copy(configs[adapter_name])
        return configs[adapter_name], like

    def _chosen(
        self, model: nn.Module, config: UndulaConfig, record: Mapping[str, Any] | None, state_dict: Any
    ) -> dict[str, LinearView]:
        """The layers that this adapter will have, as matrices.  `self.verdicts` keeps what PEFT's rules say of all."""
        named = {n: m for n, m in model.named_modules() if n}
        inner = tuple(f"{n}." for n, m in named.items() if isinstance(m, UndulaLayer | AuxiliaryTrainingWrapper))
        outer = [n for n in named if not n.startswith(inner)]
        if record is not None:
            sites = record["sites"]
            self.verdicts = {n: n in sites for n in outer}
            missing = [n for n in sites if n not in self.verdicts]
            if missing and state_dict is None:
                raise ValueError(f"the adapter has sites that this model has not: {', '.join(missing[:5])}")
        else:
            rules = self._prepare_adapter_config(copy.copy(config), self.get_model_config(model))
            rules = tuners_utils._maybe_include_all_linear_layers(rules, model)
            self.verdicts = {n: tuners_utils.check_target_module_exists(rules, n) for n in outer}
        if state_dict is None:
            return _known({n: matrix(n, named[n]) for n in outer if self.verdicts[n]}, model)
        mark = f".{self.prefix}"
        wanted = {k.rsplit(mark, 1)[0].removeprefix("_orig_mod.") for k in state_dict if mark in k}
        there = {n.removeprefix("_orig_mod."): n for n in outer}
        unknown = sorted(wanted - set(there)) or (sorted(wanted - set(record["sites"])) if record is not None else [])
        if unknown:
            what = "this model" if unknown[0] not in there else "the configuration's record of methods"
            raise ValueError(f"the state_dict has tensors for {', '.join(unknown[:5])}, which {what} does not know")
        return _known({n: matrix(n, named[full]) for n, full in there.items() if n in wanted}, model)

    def _check_new(self, model: nn.Module, adapter_name: str, config: UndulaConfig) -> None:
        known = {adapter_name} if any(adapter_name in layer for layer in hosts(model).values()) else set()
        parts = _parts_that_peft_would_mistake(model, config, self.alone) - known
        if adapter_name in parts or adapter_name in dir(nn.ModuleDict):
            raise ValueError(
                f"an adapter on this model cannot be called {adapter_name!r}: PEFT tells adapters apart by their names "
                "within the names of parameters, and this is a part of one already"
            )
        merged = [s for s, layer in hosts(model).items() if adapter_name in layer.merged_adapters]
        if merged:
            raise ValueError(
                f"the adapter {adapter_name!r} is there and merged: call unmerge_adapter() or unload() first"
            )
        if self.record["tied"] and self.alone:
            method = next(iter(self.new.methods.values()))
            raise ValueError(
                f"{method!r} shares tensors between layers. transformers' own add_adapter and load_adapter (and PEFT's "
                "inject_adapter_in_model) fill a model layer by layer: all layers but one would keep untrained "
                "tensors. Use peft.get_peft_model and PeftModel.from_pretrained, or undula.attach"
            )

    def _take_away(self, model: nn.Module, adapter_name: str) -> None:
        """An adapter of this name that a second get_peft_model puts in the place of the first; PEFT has warned."""
        for layer in hosts(model).values():
            if adapter_name in layer:
                del layer.undula_factors[adapter_name]

    def _check_target_module_exists(self, peft_config, key):  # static in PEFT, which always asks an instance
        if self.verdicts is not None:
            return self.verdicts.get(key, False)
        if peft_config.sites:
            return key in peft_config.sites
        return tuners_utils.check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.sites and peft_config.target_modules is None:
            peft_config.target_modules = list(peft_config.sites)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_target_module_compatiblity(self, peft_config, model, target_name):
        """`check_called` has looked at all layers before the first was replaced."""

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key):
        if not isinstance(target, UndulaLayer):
            base, layer = target, view(target)
            linear = layer.channel == -1 and not isinstance(layer, EmbeddingView)
            target = UndulaLinear(base) if linear else UndulaLayer(base)
            self._replace_module(parent, target_name, target, base)
        new, rebuilt = self.new, self.record["rebuilt"]
        seeded = [k for k in new.factors[current_key] if reading.key_of(current_key, k) in rebuilt]
        hosted = Hosted(
            new.methods[current_key], new.factors[current_key], seeded, self.record, current_key, self.alone
        )
        target.undula_factors[adapter_name] = hosted.train(target.training)

    def _replace_module(self, parent, child_name, new_module, child):
        """Under every name that the module has: a layer that stands at two places is one layer."""
        super()._replace_module(parent, child_name, new_module, child)
        for module in self.model.modules():
            if module is not new_module:
                for name, other in module._modules.items():
                    if other is child:
                        module._modules[name] = new_module

    def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
        """Factors are made in float32.  `autocast_adapter_dtype=False` asks for the type of the layer, True for
        float32 again."""
        once: dict[Any, Any] = {}
        for layer in hosts(self.model).values():
            if adapter_name in layer:
                own = layer.weight.dtype
                wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
                narrow = {torch.float32: own} if own in wide else {}
                layer.undula_factors[adapter_name].cast(wide if autocast_adapter_dtype else narrow, once)

    def set_adapter(self, adapter_name, inference_mode=False):
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for site, layer in hosts(self.model).items():
            layer.check_together(names, site)
        super().set_adapter(adapter_name, inference_mode)

    def add_weighted_adapter(self, *args, **kwargs):
        """Not under PEFT: raises NotImplementedError that says how."""
        raise NotImplementedError(
            "add_weighted_adapter is for PEFT's LoRA. Load the adapters with undula.Adapter.load, write "
            "0.5 * a + 0.5 * b (exact, methods of the Additive rung), save the sum and load_adapter it"
        )

    def _check_mergeable(self, names: Sequence[str] | None) -> None:
        """Refuses before the first layer changes."""
        asked = self.active_adapters if names is None else names
        laws = {s: m.law(own) for s, m in hosts(self.model).items() if (own := [n for n in asked if n in m])}
        check_mergeable({s: method for s, (method, _) in laws.items()})
        for site, layer in hosts(self.model).items():
            if site in laws:
                check_writable(site, layer.layer)

    def merge_adapter(self, adapter_names=None, safe_merge=False):
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self._check_mergeable(adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            untie(model)
        return model

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Around a forward or generate call: mixed batches, by hooks that pass `adapter_names` to the layers."""
        names = kwargs.get("adapter_names")
        if names is not None and self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. undula.rows trains mixed batches"
            )
        unknown = sorted(set(names or ()) - {*self.peft_config, "__base__"})
        if unknown:
            there = ", ".join(self.peft_config)
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are: {there}, __base__ (no "
                "adapter)"
            )
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
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return storing.stored(cls, model, config, adapter_name, found)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict = storing.checked(model, adapter_name, state_dict)
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return storing.placed(model, adapter_name, renamed)


def _known(layers: dict[str, LinearView], model: nn.Module) -> dict[str, LinearView]:
    """The same layers with the other names that the model has for them."""
    for other, n in aliases(model).items():
        if n in layers:
            layers[n].also += (other,)
    return layers


def _on_meta() -> bool:
    """Whether PEFT makes the parameters of new modules on the meta device just now (`low_cpu_mem_usage`)."""
    trial = nn.Module()
    trial.register_parameter("p", nn.Parameter(torch.empty(0)))
    return trial.p.is_meta  # type: ignore[return-value]


def _parts_that_peft_would_mistake(model: nn.Module, config: UndulaConfig, alone: bool) -> set[str]:
    """Names that would make PEFT or transformers take one tensor for another adapter's.  Factors are safe inside a
    PeftModel (see `storing.stored`); copies of whole modules are not, and transformers goes by names alone."""
    copies = {n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    names = [n for n, _ in model.named_parameters()]
    if not alone:
        saved = tuple(config.modules_to_save or ())
        names = [n for n in names if any(n.startswith(f"{c}.") for c in copies) or set(saved) & set(n.split("."))]
    return {part for n in names for part in n.split(".")} | {"undula_factors", "base_layer"}


def _route(module, args, kwargs, *, known: dict, names: list[str], beams: int):
    """A forward pre-hook that tells a layer whose row is whose; beam search repeats every row."""
    if len(names) != len(args[0]) == len(names) * beams:
        names = [n for n in names for _ in range(beams)]
    if len(names) != len(args[0]):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {len(args[0])} respectively. Give one name per row of the batch that this "
            f"{type(module.base_layer).__name__ if isinstance(module, UndulaLayer) else 'module'} sees"
        )
    if not isinstance(module, UndulaLayer):
        return args, {**kwargs, "adapter_names": names}
    key = (module, len(names))
    if key not in known:  # one call to generate passes each layer many times
        known[key] = module.rows(names)
    return args, {**kwargs, "rows": known[key]}
