"""`UndulaConfig`: a method and PEFT's rules for the layers that get it; or what stands in a directory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ...core.method import Method
from ...io import files, native, reading
from ...observe.probe import Probe


class _PeftType(str):
    """What PEFT takes for a member of its enum PeftType, which nobody can extend: equal to its string, with a value."""

    value = name = property(lambda self: self[:])

    def __str__(self) -> str:
        return f"PeftType.{self[:]}"

    def __deepcopy__(self, memo: Any) -> _PeftType:
        return self


UNDULA: Any = _PeftType(reading.TYPE)

_IN_THE_METHOD = "it is part of the method here, as in undula.peft_config({})"
INSTEAD = {
    "bias": "biases are not trained with an adapter; modules_to_save=[layer] trains a layer in full",
    "target_parameters": (
        "undula adapts Linear, Conv1D, convolutional and Embedding layers; name those in target_modules"
    ),
    "trainable_token_indices": (
        "modules_to_save=['embed_tokens'] trains the whole table, target_modules=['embed_tokens'] adapts it"
    ),
    "rank_pattern": "overrides={pattern: method} gives other methods to some layers",
    "alpha_pattern": "overrides={pattern: method} gives other methods to some layers",
    "layer_replication": "replicate the layers of the model before it is adapted",
    "ensure_weight_tying": "adapt one of the tied layers, or untie them",
    "fan_in_fan_out": "leave it out: how a layer stores its weight is seen from its class",
    "start": _IN_THE_METHOD.format("undula.Centred(undula.LoRA(), PiSSA())"),
    "init_lora_weights": _IN_THE_METHOD.format("undula.Centred(undula.LoRA(), PiSSA())"),
    "r": _IN_THE_METHOD.format("undula.LoRA(r=8)"),
    "lora_alpha": _IN_THE_METHOD.format("undula.LoRA(r=8, alpha=16)"),
    "lora_dropout": _IN_THE_METHOD.format("undula.Dropout(undula.LoRA(), 0.05)"),
    "use_dora": _IN_THE_METHOD.format("undula.DoRA(undula.LoRA())"),
    "use_rslora": _IN_THE_METHOD.format("undula.LoRA(scaling=undula.RankStabilised())"),
}


def refuse(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of PEFT's that undula has not, TypeError for ones that nobody knows.  A value that
    asks for nothing (None, False, "none", an empty list) is let pass."""
    for name, value in options.items():
        if value is None or value is False or value == "none" or (isinstance(value, list | dict | set) and not value):
            continue
        if name in INSTEAD:
            raise ValueError(f"{name}={value!r:.80}: undula has no such option; {INSTEAD[name]}")
        raise TypeError(f"undula.peft_config has no option {name!r}; options of PEFT's own methods do not apply here")


@dataclass
class UndulaConfig(PeftConfig):
    """`method` where PEFT's rules choose; or, read from a directory, `undula`: every site with its method, as
    `undula.io.native` writes it.  A configuration that is on a model has both: used again it is the rules that count,
    and on the same model it means another adapter like that one."""

    method: Any = None
    overrides: dict[str, Any] = field(default_factory=dict)
    target_modules: Any = None
    modules_to_save: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    bias: str = "none"
    target_parameters: Any = None
    trainable_token_indices: Any = None
    undula: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = UNDULA
        if self.undula is None and self.method is None:
            raise ValueError(f"no `undula` object in {files.CONFIG}; a new configuration is undula.peft_config(method)")
        self.probe: Probe | None = None
        self.origin: str | None = None  # which adapter has it: copies of the configuration keep it
        self.rule: Any = None  # `target_modules` while PEFT must not see it
        self.method = None if self.method is None else _method(self.method, "method")
        self.overrides = {pattern: _method(m, f"overrides[{pattern!r}]") for pattern, m in self.overrides.items()}
        self.sites = {} if self.undula is None else reading.read_sites(self.undula, files.CONFIG)[0]
        self.check()

    def with_probe(self, probe: Probe | None) -> UndulaConfig:
        """This configuration with data for starts that ask for them; no file holds them."""
        self.probe = probe
        return self

    def check(self) -> None:
        """Raises what PEFT's own configurations raise, and refuses options that would have no effect."""
        refuse({k: getattr(self, k) for k in ("bias", "target_parameters", "trainable_token_indices")})
        if isinstance(self.target_modules, re.Pattern):
            self.target_modules = self.target_modules.pattern
        for name in ("target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"):
            setattr(self, name, _plain(getattr(self, name)))
        _check_kinds(self)
        fixed = self.method is not None and isinstance(self.target_modules, str)
        for name in ("layers_to_transform", "layers_pattern"):
            if fixed and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a str. Here it is {self.target_modules!r:.60}; "
                    "give a list of names, as in target_modules=['q_proj', 'v_proj']"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def to_dict(self) -> dict[str, Any]:
        """The content of adapter_config.json: the sites of the adapter that has this configuration; without one, the
        method and the rules."""
        none_here = ("bias", "target_parameters", "trainable_token_indices")
        kept = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in none_here}
        if self.undula is None:
            overrides = {pattern: m.encode() for pattern, m in self.overrides.items()}
            del kept["undula"]
            return {**kept, "method": self.method.encode(), "overrides": overrides}
        for rule in ("method", "overrides", "exclude_modules", "layers_to_transform", "layers_pattern"):
            del kept[rule]  # what the rules chose stands in `undula`
        return {**kept, "target_modules": list(self.sites)}

    def save_pretrained(self, save_directory, **kwargs):
        """PEFT's, and the directory's README says how to load it: without undula PEFT ends in a bare KeyError."""
        super().save_pretrained(save_directory, **kwargs)
        readme, note = Path(save_directory, "README.md"), native.README.strip()
        text = readme.read_text(encoding="utf-8") if readme.exists() else ""
        if note not in text:
            readme.write_text(f"{text}\n{note}\n".lstrip(), encoding="utf-8")


def _method(given: Any, where: str) -> Method:
    if isinstance(given, Method):
        return given
    if isinstance(given, Mapping):
        return Method.decode(dict(given))
    raise TypeError(f"{where} is a method such as undula.LoRA(r=8); found {given!r:.80}")


def _plain(rule: Any) -> Any:
    """A rule as JSON has it; sets come in one order."""
    if isinstance(rule, set | frozenset):
        return sorted(rule)
    return list(rule) if isinstance(rule, Iterable) and not isinstance(rule, str) else rule


def _check_kinds(config: UndulaConfig) -> None:
    """PEFT reads a string as a list of letters, and a number in quotes is no layer: neither would choose anything."""
    if isinstance(config.modules_to_save, str):
        raise TypeError(f"modules_to_save is a list of names; found the string {config.modules_to_save!r:.80}")
    for name in ("modules_to_save", "target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name)
        if isinstance(value, list) and not all(isinstance(v, str) for v in value):
            raise TypeError(f"{name} is a list of names; found {value!r:.80}")
    layers = config.layers_to_transform
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"layers_to_transform is a number or a list of numbers; found {layers!r:.80}")
