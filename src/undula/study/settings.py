"""The settings of runs in the tables of a study file: their keys, their types, their values."""

from __future__ import annotations

import collections.abc
import inspect
import json
import typing
from dataclasses import fields
from functools import partial
from typing import Any

from ..core import given
from ..core.choice import Choice, as_json
from ..core.given import hints
from ..io.toml import Path as Place
from ..train.fields import bare, decoded, is_union
from ..train.recipe import Settings
from .brief import brief
from .reader import NUMBER, Reader
from .spec import Training

SETTINGS = {f.name: f for f in fields(Settings)}
KEYS = {name: key for key, name in Training.also.items()}  # of settings that a study file calls otherwise


def kinds(kind: type[Settings]) -> dict[str, Any]:
    """{key of a study file: the types of TOML that it may have} for every setting."""
    return {KEYS.get(name, name): _kind(bare(hints(kind)[name])) for name in SETTINGS}


def _kind(hint: Any) -> Any:
    """The types of TOML that stand for a type."""
    if is_union(hint):
        return tuple(_kind(each) for each in typing.get_args(hint))
    simple = {float: NUMBER, int: int, str: str, bool: bool}
    if hint in simple:
        return simple[hint]
    if inspect.isclass(hint) and issubclass(hint, Choice):
        return (str, dict)
    return {tuple: list, collections.abc.Mapping: dict}[typing.get_origin(hint)]


def read_settings(reader: Reader, place: Place, t: dict[str, Any]) -> dict[str, Any]:
    """The settings in a table, by the names of their fields."""
    made = {}
    for key, found in t.items():
        if (name := Training.also.get(key, key)) not in SETTINGS:
            continue
        before = len(reader.found)
        value = reader.attempt((*place, key), partial(_setting, key, name, found))
        if len(reader.found) == before:
            made[name] = value
    return made


def _setting(key: str, name: str, found: Any) -> Any:
    """Raises ValueError or LookupError that names the key."""
    hint = hints(Training)[name]
    none = name == "where" and not found  # anything else may be a list of none: an arm has it back as it was
    choices = name == "penalty"  # by their names, or as tables
    if isinstance(found, list) and not choices and (none or not all(isinstance(each, str) for each in found)):
        raise ValueError(f"{key} is a list of names and globs, found {found!r:.60}")
    return given.value(Training.as_meant(name, decoded(Training, name, found, key)), hint, key)


def shown(value: Any) -> str:
    """A setting in the name of an arm."""
    if isinstance(value, tuple) and value and all(isinstance(each, Choice) for each in value):
        return " + ".join(brief(each) for each in value)
    return brief(value) if isinstance(value, Choice) else json.dumps(as_json(value))
