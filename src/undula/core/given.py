"""What is given to a choice when it is made in Python: every value is of its field's type, every name a field's."""

from __future__ import annotations

import abc
import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import math
import operator
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from numbers import Real
from typing import Any

from .ranges import INT64, Range

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
    "optimizer": "it is called optimiser",
    "betas": "they are called beta1 and beta2",
    "lr": "the learning rate is a setting of the run: Run(lr=...)",
    "weight_decay": "the weight decay is a setting of the run: Run(weight_decay=...)",
    "learning_rate": "it is called lr",
    "lr_scheduler_type": "it is called schedule: Linear(), Cosine() ... of undula.optim.schedules",
    "gradient_accumulation_steps": "it is called accumulate",
    "num_train_epochs": "it is called epochs",
    "warmup_ratio": "it is called warmup",
    "target_modules": "layers are chosen when it is attached: attach(model, method, where=[...])",
}


class Checked(abc.ABCMeta):
    """The class of choices: checks what a member is made from before the member sees it.  Whatever makes a choice, be
    it Python, a file or a command line, comes through here."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if not dataclasses.is_dataclass(cls):
            return super().__call__(*args, **options)
        fields = [f for f in dataclasses.fields(cls) if f.init]
        first = [f.name for f in fields if not f.kw_only]
        names = [*first, *(f.name for f in fields if f.kw_only)]
        also = getattr(cls, "also", {})  # other names of fields
        unknown = [name for name in options if also.get(name, name) not in names]
        if unknown:
            raise TypeError(no_option(cls.__name__, unknown, names))
        if len(args) > len(first):
            most = f"{len(first)} options without their names" if len(first) < len(names) else f"{len(names)} options"
            raise TypeError(f"{cls.__name__} has {most}, found {len(args)}")
        pairs = [*zip(first, args, strict=False), *((also.get(name, name), found) for name, found in options.items())]
        given = dict(pairs)
        if len(given) < len(pairs):
            twice = sorted(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
            raise TypeError(f"{cls.__name__}: {', '.join(twice)} is given twice")
        if as_meant := getattr(cls, "as_meant", None):  # what people write for a field and means a value of it
            given = {name: as_meant(name, found) for name, found in given.items()}
        given = {name: checked(cls, name, found) for name, found in given.items()}
        missing = [f.name for f in fields if f.name not in given and f.default is f.default_factory is MISSING]
        if missing:  # last: a wrong value is told whatever else is not there
            raise TypeError(f"{cls.__name__.lstrip('_')} needs {', '.join(missing)}")
        return super().__call__(**given)


def checked(cls: type, name: str, found: Any) -> Any:
    """`found` as the field `name` of a choice takes it.  Raises ValueError that names the class and the field, the
    range and what was found."""
    return value(found, hints(cls).get(name, Any), f"{cls.__name__.lstrip('_')}.{name}")


def no_option(name: str, unknown: Iterable[str], known: Iterable[str]) -> str:
    """What to say of options that a choice has not."""
    unknown = list(unknown)
    told = "".join(f". {HINTS[each]}" for each in dict.fromkeys(unknown) if each in HINTS)
    return f"{name} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}{told}"


@functools.cache  # a file may name one class thousands of times
def hints(cls: type) -> dict[str, Any]:
    """The types of the fields of a choice, ranges and all.  One whose name is there for type checkers alone is left
    out."""
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError:
        found: dict[str, Any] = {}
        for f in dataclasses.fields(cls):
            alone = type(f.name, (), {"__annotations__": {f.name: f.type}, "__module__": cls.__module__})
            with contextlib.suppress(NameError):
                found |= typing.get_type_hints(alone, include_extras=True)
        return found


def within(hint: Any) -> tuple[Any, Range]:
    """(the type itself, the range that is declared with it)."""
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, Range()
    bare, *declared = typing.get_args(hint)
    numbers = next((each for each in declared if isinstance(each, Range)), Range())
    notes = [each for each in declared if isinstance(each, str)]
    return bare, dataclasses.replace(numbers, note=notes[-1]) if notes else numbers


def value(found: Any, hint: Any, where: str) -> Any:
    """`found` as the type that a field asks for; whole numbers and floats of numpy become Python's, lists tuples.
    Raises ValueError that names the field."""
    hint, numbers = within(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not type(None)]
        if found is None and len(kinds) < len(arguments):
            return None
        tables = [kind for kind in kinds if isinstance(found, Mapping) and _is_mapping(kind)]
        return value(found, (tables or kinds)[0], where) if tables or len(kinds) == 1 else found
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        if isinstance(found, str) or not isinstance(found, list | tuple):
            raise ValueError(f"{where} is a tuple such as ({_example(arguments[0])},), found {shown(found)}")
        return tuple(value(each, arguments[0], where) for each in found)
    if _is_mapping(hint):
        if not isinstance(found, Mapping):
            raise ValueError(f'{where} is a table such as {{"name": {_example(arguments[1])}}}, found {shown(found)}')
        return {name: value(each, arguments[1], f"{where}[{name!r}]") for name, each in found.items()}
    if hint in (bool, str) and not isinstance(found, hint):
        raise ValueError(f"{where} is a {'text' if hint is str else 'bool'}, found {shown(found)}")
    if hint in (int, float):
        return _number(found, hint, numbers, where)
    if isinstance(hint, Checked) and not isinstance(found, hint):
        raise ValueError(_no_member(found, hint, where))
    return found


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is collections.abc.Mapping


def _number(found: Any, kind: type, numbers: Range, where: str) -> Any:
    made = number(found, kind)
    if made is None:
        raise ValueError(f"{where} is {called(kind, numbers, found)}, found {shown(found)}")
    if made not in numbers:
        raise ValueError(f"{where} is {numbers.told(made)}, found {shown(made)}")
    return made


def number(found: Any, kind: type) -> Any:
    """`found` as an integer of 64 bits or as a finite number, numpy's as Python's; None where it is none."""
    if isinstance(found, bool):
        return None
    if kind is int:
        try:
            made = operator.index(found)
        except TypeError:
            return None
        return made if -INT64 <= made <= INT64 else None
    try:
        finite = isinstance(found, Real) and math.isfinite(float(found))
    except OverflowError:  # a whole number beyond all floats
        return None
    return (found if isinstance(found, int | float) else float(found)) if finite else None


def called(kind: type, numbers: Range, found: Any) -> str:
    """What a field of numbers takes instead of `found`, in words."""
    whole = type(found) is int
    name = f"an integer{' of at most 64 bits' if whole else ''}" if kind is int else "a finite number"
    return f"{name} {numbers.told(found if whole else math.nan)}".rstrip()


def _no_member(found: Any, hint: type, where: str) -> str:
    family = hint.__name__
    if inspect.isclass(found):
        return f"{where} is a {family}, found the class {found.__name__}: make one, {found.__name__}(...)"
    return f"{where} is a {family}, an object such as {_example(hint)}; found {shown(found)}"


def _example(hint: Any) -> str:
    registry = getattr(hint, "registry", None)
    if registry:
        return f"{next(iter(registry.values())).__name__}()"
    return '"name"' if hint is str else "1"


def shown(found: Any) -> str:
    if isinstance(found, int) and abs(found) > INT64:  # Python refuses to write numbers of thousands of digits
        return f"a number of {found.bit_length()} bits"
    return f"the class {found.__name__}" if inspect.isclass(found) else f"{found!r:.80}"
