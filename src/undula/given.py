"""What is given to a choice when it is made in Python: every value is of its field's type, every name a field's."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Iterable
from typing import Any

# What people look for under other names: the words of PEFT, of papers, of other methods here
HINTS = {
    "dropout": "dropout is a method around a method: Dropout(LoRA(...), p=0.1)",
    "lora_dropout": "dropout is a method around a method: Dropout(LoRA(...), p=0.1)",
    "start": "a start is an option of Centred, around the method: Centred(LoRA(...), start=...); "
    'on a command line --method centred --set start=..., in a study {method = "centred", set = {start = ...}}',
    "init_lora_weights": "a start is an option of Centred, around the method: Centred(LoRA(...), start=...)",
    "rank": "the rank is called r",
    "lora_alpha": "it is called alpha",
    "use_rslora": "scaling=RankStabilised()",
    "use_dora": "DoRA is a method around a method: DoRA(LoRA(...))",
    "target_modules": "layers are chosen when it is attached: attach(model, method, where=[...])",
}

# Fields that mean the same in every choice that has them
POSITIVE = {"alpha", "kappa", "max_length", "max_completion", "total", "target"}
NOT_NEGATIVE = {"std", "seed", "oversample", "iterations", "warmup", "settle", "search", "between", "generate"}
SHARES = {"beta1", "beta2"}


class Checked(abc.ABCMeta):
    """The class of choices: checks what a member is made from before the member sees it."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if not dataclasses.is_dataclass(cls):
            return super().__call__(*args, **options)
        names = [f.name for f in dataclasses.fields(cls) if f.init]
        unknown = [name for name in options if name not in names]
        if unknown or len(args) > len(names):
            what = no_option(cls.__name__, unknown, names) if unknown else f"{cls.__name__} has {len(names)} options"
            raise TypeError(what)
        twice = set(names[: len(args)]) & set(options)
        if twice:
            raise TypeError(f"{cls.__name__}: {', '.join(sorted(twice))} is given twice")
        hints = _hints(cls)
        given = {**dict(zip(names, args, strict=False)), **options}
        where = cls.__name__.lstrip("_")
        values = {k: value(v, hints.get(k, Any), f"{where}.{k}") for k, v in given.items()}
        for name, found in values.items():
            if isinstance(found, int | float):
                _check_range(name, found, where)
        return super().__call__(**values)


def _check_range(name: str, found: float, where: str) -> None:
    if name in POSITIVE and not found > 0:
        raise ValueError(f"{where}.{name} is greater than 0, found {found}")
    if name in NOT_NEGATIVE and found < 0:
        raise ValueError(f"{where}.{name} is not negative, found {found}")
    if name in SHARES and not 0 <= found < 1:
        raise ValueError(f"{where}.{name} is at least 0 and below 1, found {found}")


def no_option(name: str, unknown: Iterable[str], known: Iterable[str]) -> str:
    """What to say of options that a choice has not."""
    unknown = list(unknown)
    told = "".join(f". {HINTS[each]}" for each in dict.fromkeys(unknown) if each in HINTS)
    return f"{name} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}{told}"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # names that only type checkers import
        return {}


def value(found: Any, hint: Any, where: str) -> Any:
    """`found` as the type that a field asks for; whole numbers and floats of numpy become Python's, lists tuples.
    Raises ValueError that names the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not type(None)]
        if found is None and len(kinds) < len(arguments):
            return None
        return value(found, kinds[0], where) if len(kinds) == 1 else found
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        if isinstance(found, str) or not isinstance(found, list | tuple):
            raise ValueError(f"{where} is a tuple such as ({_example(arguments[0])},), found {_shown(found)}")
        return tuple(value(each, arguments[0], where) for each in found)
    if hint in (bool, str) and not isinstance(found, hint):
        raise ValueError(f"{where} is a {'text' if hint is str else 'bool'}, found {_shown(found)}")
    if hint is int:
        return _whole(found, where)
    if hint is float:
        return _finite(found, where)
    if isinstance(hint, Checked) and not isinstance(found, hint):
        raise ValueError(_no_member(found, hint, where))
    return found


def _whole(found: Any, where: str) -> int:
    try:
        if not isinstance(found, bool):
            return operator.index(found)
    except TypeError:
        pass
    raise ValueError(f"{where} is an integer, found {_shown(found)}")


def _finite(found: Any, where: str) -> Any:
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise ValueError(f"{where} is a float, found {_shown(found)}")
    if not math.isfinite(found):
        raise ValueError(f"{where} is a finite number, found {found}")
    return found if isinstance(found, int | float) else float(found)


def _no_member(found: Any, hint: type, where: str) -> str:
    family = hint.__name__
    if inspect.isclass(found):
        return f"{where} is a {family}, found the class {found.__name__}: make one, {found.__name__}(...)"
    return f"{where} is a {family}, an object such as {_example(hint)}; found {_shown(found)}"


def _example(hint: Any) -> str:
    registry = getattr(hint, "registry", None)
    if registry:
        return f"{next(iter(registry.values())).__name__}()"
    return '"name"' if hint is str else "1"


def _shown(found: Any) -> str:
    return f"the class {found.__name__}" if inspect.isclass(found) else f"{found!r:.80}"
