"""PEFT's `LoraConfig`, as a file says it: what undula honours, what changes nothing, and that the rest is refused.

Fields of PEFT 0.21.2 and of the versions before it.  An unknown field passes only at a value that says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import files

ABOUT = ("base_model_name_or_path", "task_type", "revision", "auto_mapping")
# Where the layers are (the tensors tell), how training went or was stored, how a start was computed: whatever they say,
# the function is the one that the tensors give.
WITHOUT_EFFECT = {
    "peft_type", "peft_version", "inference_mode", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size",
    "runtime_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"}
READ |= {"target_parameters"}  # see `io.lora_parameters`
READ |= {"bias"}  # those that were trained are in the file, as they are then
BIASES = ("none", "all", "lora_only", None)
# What the file tells as a change of the base's own numbers: read with the base (`undula.io.load_for`).
WITH_BASE = ("lora_bias", "trainable_token_indices")
NOTHING: tuple[Any, ...] = (None, False, "", [], {})
# Starts that leave the base as it is.  PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move it: PEFT does so again on loading,
# or cannot.
STARTS = {True, False, None, "gaussian", "orthogonal", "eva", "mica"}
CONVERT = (
    "saved with that start the base is another one. Convert it in PEFT: save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...) writes a plain LoRA"
)


def needs_base(config: Mapping[str, Any]) -> bool:
    """Whether a configuration says something that `Adapter.load` cannot read and `undula.io.load_for` can."""
    return config.get("peft_type") == "LORA" and any(config.get(name) for name in WITH_BASE)


def check(config: Mapping[str, Any], path: str) -> None:
    """Raises ValueError that names the fields which would change the function and which undula does not read."""
    start = config.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if isinstance(start, list | dict) or start not in STARTS:
        raise ValueError(f"{path}: undula does not read LoRAs with init_lora_weights={start!r:.80}: {CONVERT}")
    if config.get("bias") not in BIASES:
        raise ValueError(f"{path}: bias is none, all or lora_only, found {config['bias']!r:.80}")
    odd = {k: v for k, v in config.items() if k not in READ and k not in WITHOUT_EFFECT and k not in ABOUT}
    odd = {k: v for k, v in odd.items() if not _says_nothing(v)}
    if odd and set(odd) <= set(WITH_BASE):
        raise ValueError(
            f"{path} has {' and '.join(f'{k}={v!r:.60}' for k, v in odd.items())}, which the file tells as a change of "
            f"the base's own numbers: undula.io.load_for(path, model) reads it, {files.conversion(path)} writes it anew"
        )
    if odd:
        told = ", ".join(f"{k!s:.60}={v!r:.60}" for k, v in list(odd.items())[:5])
        raise ValueError(f"{path}: undula does not read LoRAs with {told}")
    for name in ("use_rslora", "use_dora"):
        if config.get(name) not in (True, False, None):
            raise ValueError(f"{path}: {name} is true or false, found {config[name]!r:.80}")


def _says_nothing(value: Any) -> bool:
    return any(type(value) is type(nothing) and value == nothing for nothing in NOTHING)


def about(said: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a configuration says beside, for `Adapter.about`.  Raises ValueError for a name that is no text."""
    for name in ("base_model_name_or_path", "task_type", "revision"):
        if not isinstance(said.get(name), str | None):
            raise ValueError(f"{path}: {name} is a text, found {said[name]!r:.80}")
    return {k: v for k, v in said.items() if v is not None}


def number(value: Any, what: str, path: str) -> float:
    """A finite number.  Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{path}: {what} is a finite number, found {value!r:.80}")
    return float(value)


@dataclass(frozen=True)
class Patterns:
    """PEFT's `rank_pattern` and `alpha_pattern`: the first pattern that matches a tail of a site's name counts.

    PEFT takes them for regular expressions.  Here names count as names, and of the expressions those whose matching
    takes no more than the square of a name's length: no groups, and one repetition.
    """

    names: Mapping[str, tuple[int, Any]]  # tail: (place in the order, value)
    whole: Mapping[str, tuple[int, Any]]  # those that began with ^
    expressions: tuple[tuple[int, re.Pattern[str], Any], ...]

    def of(self, site: str, default: Any) -> Any:
        """The value at a site."""
        parts = site.split(".")
        tails = [".".join(parts[i:]) for i in range(len(parts))]
        found = [self.names[tail] for tail in tails if tail in self.names]
        found += [self.whole[site]] if site in self.whole else []
        found += [(i, value) for i, pattern, value in self.expressions if pattern.match(site)]
        return min(found, key=lambda pair: pair[0])[1] if found else default


LITERAL = re.compile(r"\^?(?:[^\\^$*+?{}\[\]|()]|\\[^0-9A-Za-z])*\$?", re.DOTALL)
TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
MOST_EXPRESSIONS = 64


def patterns(config: Mapping[str, Any], name: str, path: str) -> Patterns:
    """The patterns under this name.  Raises ValueError for what is none, or too costly to match."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name} maps patterns to numbers, found {found!r:.80}")
    names: dict[str, tuple[int, Any]] = {}
    whole: dict[str, tuple[int, Any]] = {}
    expressions = []
    for i, (pattern, value) in enumerate(found.items()):
        value = number(value, f"{name}[{pattern!r:.60}]", path)
        if LITERAL.fullmatch(pattern):
            bare = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"), flags=re.DOTALL)
            (whole if pattern.startswith("^") else names).setdefault(bare, (i, value))
        else:
            expressions.append((i, _expression(pattern, name, path), value))
    if len(expressions) > MOST_EXPRESSIONS:
        raise ValueError(f"{path}: {name} has {len(expressions)} regular expressions: name the modules instead")
    return Patterns(names, whole, tuple(expressions))


def _expression(pattern: str, name: str, path: str) -> re.Pattern[str]:
    tokens = TOKEN.findall(pattern)
    repeated = sum(t in ("*", "+", "?", "{") for t in tokens)
    if len(pattern) > 1000 or repeated > 1 or any(t in ("(", ")", "|") for t in tokens):
        raise ValueError(
            f"{path}: {name} has the regular expression {pattern!r:.80}, which may take for ever to match: undula "
            "reads names, and expressions without groups and with one repetition"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$", re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {name} has {pattern!r:.80}, which is no regular expression: {error}") from None
