"""A run in a file: TOML, as people write it and as every run leaves it beside its run.json, or JSON.

    model = "bundled:minilm"            the fields of `undula.Run` by their names; what is not there has its default
    data = "reviews.csv"
    task = "classification"             a choice by its name,
    lr = 1e-3
    [method]                            or with its options, as a table whose `is` (or `name`) says which
    is = "loran"
    r = 8
    activation = { is = "sinter", a = 1e-3 }

"none" stands for nothing where a field may have nothing and has a default (`eval_rows = "none"`: all).  Paths are
meant from where undula is started, as on the command line.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from ..core import given
from ..core.choice import Choice
from ..core.given import hints, within
from ..io import files, toml
from .fields import bare, decoded, default_of, is_union, told

NONE = "none"
OPTIONS = {
    "set": 'options of the method stand in its table: [method], is = "lora", r = 8',
    "allocate": 'options of the allocator stand in its table: [allocator], is = "adalora", target = 4',
    **dict.fromkeys(
        ("column", "columns"),
        'columns are options of the task: task = { is = "classification", text = "review", label = "stars" }',
    ),
    **dict.fromkeys(("task_set", "task-set"), 'options of the task stand in its table: [task], is = "classification"'),
    "from": 'the adapter that a training begins with is called begin_from = "FOLDER"',
    "override": 'it is called overrides: [overrides], "*.query" = { is = "lora", r = 4 }',
}


def values_in(path: str | Path, kind: type, aside: tuple[str, ...] = ()) -> dict[str, Any]:
    """{field of `kind`, a Run: value} of those that a TOML or JSON file says (a run.json too, as it is).

    Raises FileNotFoundError, or `toml.Faults` (a ValueError) with everything that is wrong with it and where.
    """
    path = Path(path)
    if not path.is_file():
        near = path.parent.iterdir() if path.parent.is_dir() else ()
        there = ", ".join(sorted(p.name for p in near if p.suffix in (".toml", ".json"))) or "none"
        raise FileNotFoundError(f"{path} is no file of a run's settings; such files there: {there}")
    if path.suffix.lower() == ".json":
        with files.door(str(path)):
            data, where = _of_a_run(files.parsed(path.read_bytes(), str(path))), {}
    else:
        text = toml.text_of(path)
        data, where = toml.parsed(text, str(path)), toml.lines(text)
    made, found = {}, []
    for name in [name for name in data if name not in aside]:
        try:
            made[name] = value_of(kind, name, data[name])
        except (LookupError, ValueError, TypeError) as error:
            told = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            found.append((toml.line_of((name,), where), told))
    if found:
        raise toml.Faults(str(path), found)
    return made


def _of_a_run(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in a run.json; others as they are."""
    if not isinstance(data.get("run"), Mapping):
        return data
    return told_of_a_run(data)


def told_of_a_run(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run.json.  One that does not say whether activations are computed again is older than the
    choice by need: they were not."""
    return {"gradient_checkpointing": False, **data["run"], **since(data.get("version"))}


def since(version: Any) -> dict[str, Any]:
    """What a run of an older version did, in settings of this one."""
    plain = {"plain": True} if version in (1, 2, 3) else {}
    return ({"by_chance": True} if version == 1 else {}) | ({"eval_every": 0.0} if version in (1, 2) else {}) | plain


def complete(path: str | Path, kind: type, aside: tuple[str, ...] = ()) -> Any:
    """The `kind` in a file; the fields `aside`, which it has not, may stand there too.  Raises as `values_in`,
    LookupError for a file that does not say what has no default."""
    found = values_in(path, kind, aside)
    missing = [f.name for f in told(kind) if default_of(f) is MISSING and f.name not in found]
    if missing:
        raise LookupError(f"{path} does not say {', '.join(missing)}, which a {kind.__name__.lower()} needs")
    return kind(**found)


def value_of(kind: type, name: str, value: Any) -> Any:
    """A field's value from that of a file.  Raises LookupError, ValueError or TypeError that says what is wrong."""
    fields = {f.name: f for f in told(kind)}
    if name not in fields:
        close = difflib.get_close_matches(name, fields, 1)
        advice = OPTIONS.get(name) or given.HINTS.get(name) or (f"did you mean {close[0]}?" if close else "")
        raise LookupError(f"a run has no {name!r}; {advice or 'it has: ' + ', '.join(fields)}")
    hint = hints(kind)[name]
    found = as_json(value, hint, default_of(fields[name]), name)
    if name not in ("out", "dtype"):
        found = decoded(kind, name, found, name)
    meant = kind.as_meant(name, found)  # type: ignore[attr-defined]
    return given.value(meant, hint, name)


def as_json(value: Any, hint: Any, default: Any, where: str) -> Any:
    """What people write in a file for a field, as `Recipe.encode` has it."""
    hint, _ = within(hint)
    kinds = typing.get_args(hint) if is_union(hint) else (hint,)
    if value == NONE and type(None) in kinds and (bare(hint) is not str or default is not None):
        return None
    family = next((k for k in kinds if inspect.isclass(k) and issubclass(k, Choice)), None)
    if family is not None and isinstance(value, Mapping):
        return _choice(value, family.family, default, where)
    many = [k for k in kinds if typing.get_origin(k) is tuple]
    if many and isinstance(value, Mapping):  # one of several
        value = [value]
    if isinstance(value, list) and many:
        return [as_json(v, typing.get_args(many[0])[0], MISSING, where) for v in value]
    if isinstance(value, Mapping) and (maps := [k for k in kinds if typing.get_origin(k) is collections.abc.Mapping]):
        return {k: as_json(v, typing.get_args(maps[0])[1], MISSING, f"{where}[{k!r}]") for k, v in value.items()}
    return value


def _choice(table: Mapping[str, Any], family: type[Choice], default: Any, where: str) -> dict[str, Any]:
    """A choice in a table; without its name it is the default, with other options."""
    said, base = dict(table), {}
    if "is" not in said and "name" in said:
        said["is"] = said.pop("name")
    if "is" not in said:
        if not isinstance(default, Choice):
            raise ValueError(f'{where} does not say which {family.__name__.lower()}: write {where} = {{ is = "NAME" }}')
        base = default.encode()
    else:
        base = {"is": said.pop("is")}
    if not isinstance(base["is"], str):
        raise ValueError(f"{where}.is is the name of a {family.__name__.lower()}, found {base['is']!r:.80}")
    member = family.named(base["is"])
    kinds, fields = hints(member), {f.name: f for f in dataclasses.fields(member)}  # type: ignore[arg-type]
    for name, value in said.items():  # others are refused where the choice is made
        known = name in kinds and name in fields
        base[name] = as_json(value, kinds[name], default_of(fields[name]), f"{where}.{name}") if known else value
    return base


def written(recipe: Any) -> str:
    """The recipe as a TOML file, from which `load` makes the same one (its `encode` again)."""
    return f"# undula train --config THIS_FILE --out DIRECTORY   repeats this run\n\n{toml.written(said(recipe))}"


def said(recipe: Any) -> dict[str, Any]:
    """What a TOML file says of a recipe."""
    return said_of(type(recipe), recipe.encode())


def said_of(kind: type, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `kind` as TOML holds them, from JSON values; without those that say nothing."""
    kinds, fields = hints(kind), {f.name: f for f in told(kind)}
    data = {name: _said(value, kinds[name], default_of(fields[name])) for name, value in encoded.items()}
    return {name: value for name, value in data.items() if value is not MISSING and value not in ([], {})}


def _said(value: Any, hint: Any, default: Any) -> Any:
    """A JSON value as TOML holds it; MISSING for None where that is what is meant where nothing is said."""
    if value is None:
        return MISSING if default is None else NONE
    hint, _ = within(hint)
    kinds = typing.get_args(hint) if is_union(hint) else (hint,)
    family = next((k for k in kinds if inspect.isclass(k) and issubclass(k, Choice)), None)
    if family is not None and isinstance(value, Mapping):
        member = family.family.named(value["is"])
        types, fields = hints(member), {f.name: f for f in dataclasses.fields(member)}  # type: ignore[arg-type]
        made = {k: _said(v, types[k], default_of(fields[k])) if k in fields else v for k, v in value.items()}
        return {k: v for k, v in made.items() if v is not MISSING}
    if isinstance(value, list) and (many := [k for k in kinds if typing.get_origin(k) is tuple]):
        return [_said(v, typing.get_args(many[0])[0], MISSING) for v in value]
    if isinstance(value, Mapping) and (maps := [k for k in kinds if typing.get_origin(k) is collections.abc.Mapping]):
        return {k: _said(v, typing.get_args(maps[0])[1], MISSING) for k, v in value.items()}
    return value
