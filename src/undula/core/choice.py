"""Configuration as values: a choice is a frozen dataclass, registered by name, that goes to JSON and back.

`Method`, `Start`, `Scaling`, `Activation` ... are families; each family keeps its own registry, so a file can name
only what exists, and decoding never imports or runs anything that a file asks for.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from . import given
from .given import Checked, hints, no_option, within
from .ranges import Range

JSON_VALUES = (bool, int, float, str)


def plain(name: str) -> str:
    """`Sine-LoRA`, `sine_lora` and `SineLoRA` are one name."""
    return name.replace("-", "").replace("_", "").lower()


class Choice(metaclass=Checked):
    """One of several interchangeable things.  A direct subclass is a family, a concrete one a member of it."""

    family: ClassVar[type[Choice]]
    registry: ClassVar[dict[str, type[Any]]]
    advice: ClassVar[str] = ""  # what to do where no member is what is wanted
    offered: ClassVar[bool] = True  # False: made by a verb of its own, to be read back from its files, and in no list

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Choice in cls.__bases__:
            cls.family, cls.registry = cls, {}

    @classmethod
    def register(cls, member: type) -> type:
        """Class decorator of every member: `@Start.register`.  A name can be taken once."""
        taken = cls.registry.get(plain(member.__name__), member)
        if (taken.__module__, taken.__qualname__) != (member.__module__, member.__qualname__):
            raise ValueError(f"two {cls.__name__}s named {member.__name__}: {taken.__module__} and {member.__module__}")
        cls.registry[plain(member.__name__)] = member  # a notebook cell that runs again replaces its class
        return member

    @classmethod
    def members(cls) -> list[type]:
        """All members of this family that are offered."""
        return [member for member in cls.registry.values() if member.offered]

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """The member of this family called `name`.  Raises LookupError that lists the members."""
        member = cls.registry.get(plain(name))
        if member is None:
            known = ", ".join(sorted(m.__name__ for m in cls.members()))
            raise LookupError(f"no {cls.__name__.lower()} is called {name!r}; there are: {known}{cls.advice}")
        return member

    @classmethod
    def build(cls, name: str, options: Mapping[str, Any]) -> Self:
        """A member from its name and its fields as JSON values (or as text, from a command line)."""
        return cls._built(name, options, text=True)

    @classmethod
    def _built(cls, name: str, options: Mapping[str, Any], text: bool) -> Self:
        """`text`: whether numbers may be written as texts, as on a command line."""
        member = cls.named(name)
        kinds, fields = hints(member), {f.name: f for f in dataclasses.fields(member)}  # type: ignore[arg-type]
        unknown = sorted(set(options) - set(fields))
        if unknown:
            raise LookupError(no_option(member.__name__, unknown, fields))
        values = {k: from_json(v, kinds[k], f"{member.__name__}.{k}", text) for k, v in options.items()}
        missing = [
            f.name
            for f in fields.values()
            if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{member.__name__} needs {', '.join(missing)}")
        return member(**values)

    @classmethod
    def decode(cls, data: Any) -> Self:
        """The inverse of `encode`: `{"is": name, field: value, ...}`.  Strict: a number is a number, no text of one.
        Raises ValueError or LookupError."""
        return cls._decoded(data, text=False)

    @classmethod
    def _decoded(cls, data: Any, text: bool) -> Self:
        if not isinstance(data, dict) or not isinstance(data.get("is"), str):
            raise ValueError(f'a {cls.__name__.lower()} is written {{"is": name, ...}}, found {data!r:.80}')
        return cls._built(data["is"], {k: v for k, v in data.items() if k != "is"}, text)

    def encode(self) -> dict[str, Any]:
        """This choice as JSON values."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"is": self.public().__name__, **{f.name: as_json(getattr(self, f.name)) for f in fields}}

    @classmethod
    def public(cls) -> type:
        """The registered class that files name.  Raises LookupError for one that is not registered."""
        if cls.registry.get(plain(cls.__name__)) is not cls:
            raise LookupError(
                f"{cls.__name__} is not registered, so no file could name it: a name that starts with an underscore is "
                "a helper's, and of a class that was defined twice only the newer one counts"
            )
        return cls


def as_json(value: Any) -> Any:
    """A field's value as JSON values."""
    if isinstance(value, Choice):
        return value.encode()
    if isinstance(value, Mapping):
        return {name: as_json(v) for name, v in value.items()}
    return [as_json(v) for v in value] if isinstance(value, tuple) else value


def from_json(value: Any, hint: Any, where: str, text: bool = False) -> Any:
    """`value` as the type `hint`; where `text` may stand for numbers it is parsed.  What a number may be is checked
    where the choice is made.  Raises ValueError or LookupError that names `where`."""
    hint, numbers = within(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not type(None)]
        if len(kinds) < len(arguments) and (
            value is None or (text and isinstance(value, str) and value.strip() == "none")
        ):
            return None
        shape = tuple if isinstance(value, list | tuple) else collections.abc.Mapping  # a text, or several by name
        many = [
            kind for kind in kinds if typing.get_origin(kind) is shape and isinstance(value, list | tuple | Mapping)
        ]
        return from_json(value, (many or kinds)[0], where, text)
    if text and isinstance(value, str) and hint is not str:  # in a text, blanks mean something
        value = value.strip()
    if inspect.isclass(hint) and issubclass(hint, Choice):
        return _member(value, hint, where, text)
    if origin is tuple:
        items = (
            value.split(",") if isinstance(value, str) else [value] if isinstance(value, Mapping | Choice) else value
        )
        if not isinstance(items, list | tuple):
            raise ValueError(f"{where} is a list, found {value!r:.80}")
        return tuple(from_json(v, arguments[0], where, text) for v in items)
    if origin is collections.abc.Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is a table, found {value!r:.80}")
        return {name: from_json(v, arguments[1], f"{where}[{name!r}]", text) for name, v in value.items()}
    return _plain(value, hint, where, text, numbers)


def _member(value: Any, hint: type[Choice], where: str, text: bool) -> Choice:
    found = value
    if isinstance(value, str):
        found = hint.family._built(value, {}, text)
    elif not isinstance(value, Choice):
        found = hint.family._decoded(value, text)
    if not isinstance(found, hint.family):
        raise ValueError(f"{where} is a {hint.family.__name__.lower()}, found {found!r:.80}")
    return found


def _plain(value: Any, hint: Any, where: str, text: bool, numbers: Range) -> Any:
    assert hint in JSON_VALUES, f"{where}: fields are numbers, strings, choices, tuples of these, or None; not {hint}"
    if text and hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    fits = hint is float and isinstance(value, int) and not isinstance(value, bool) or type(value) is hint
    if fits or (text and isinstance(value, str) and hint is not bool):
        try:
            made = hint(value)
        except (ValueError, OverflowError):
            made = math.nan
        if hint is not float and hint is not int or given.number(made, hint) is not None:
            return made
    if hint in (int, float):
        raise ValueError(f"{where} is {given.called(hint, numbers, value)}, found {given.shown(value)}")
    raise ValueError(f"{where} is {hint.__name__}, found {value!r:.80}")
