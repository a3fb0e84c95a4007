"""Choices from `name=value` texts, as on a command line (`activation=sinter`, `activation.a=1e-3`, `inner.r=4`), and
from tables of values, as in a TOML file (`{ activation = { is = "sinter", a = 1e-3 }, inner = { r = 4 } }`)."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from .choice import Choice

C = TypeVar("C", bound=Choice)
OWN = ""  # in a node of the tree: the value of the option itself
Tree = dict[str, Any]


def build(family: type[C], name: str, pairs: Iterable[str]) -> C:
    """The member of `family` called `name` with these options.  Raises LookupError that lists what exists, ValueError
    for text that is no value of the option's type."""
    return family.build(name, _values(family.named(name), _tree(pairs)))


def build_from(family: type[C], name: str, table: Mapping[str, Any]) -> C:
    """The same from a table; `is` names an option that has options itself.  Texts and lists are taken as they are."""
    if "is" in table:
        raise ValueError(f"{name} is named already: `is` names an option that has options itself")
    return family.build(name, _values(family.named(name), _tree_of(table)))


def changed(choice: C, pairs: Iterable[str]) -> C:
    """The same choice with these options, see `build`."""
    values = _changed(choice, _tree(pairs))
    return type(choice).family.build(values.pop("is"), values)  # type: ignore[return-value]


def _changed(choice: Choice, tree: Mapping[str, Tree]) -> dict[str, Any]:
    said = choice.encode()
    for name, node in tree.items():
        own = getattr(choice, name, None)
        if isinstance(own, Choice) and OWN not in node:  # an option of what stands there
            said[name] = _changed(own, node)
        else:
            said |= _values(type(choice), {name: node})
    return said


def split_pair(pair: str, what: str) -> tuple[str, str]:
    """(name, value) of `name=value`, the value to the letter: in a text, blanks mean something.  Raises ValueError."""
    name, mark, value = pair.partition("=")
    if not mark or not name:
        raise ValueError(f"{what} is written NAME=VALUE, found {pair!r}")
    return name.strip(), value


def _tree_of(table: Mapping[str, Any]) -> Tree:
    nodes = {k: _tree_of(v) if isinstance(v, Mapping) else {OWN: v} for k, v in table.items() if k != "is"}
    return nodes | ({OWN: str(table["is"])} if "is" in table else {})


def _tree(pairs: Iterable[str]) -> Tree:
    tree: Tree = {}
    for pair in pairs:
        name, value = split_pair(pair, "an option")
        node = tree
        for part in name.split("."):
            node = node.setdefault(part, {})
        if OWN in node:
            raise ValueError(f"the option {name} is given twice: {node[OWN]!r} and {value!r}")
        node[OWN] = value
    return tree


def _values(member: type[Choice], tree: Mapping[str, Tree]) -> dict[str, Any]:
    """The tree as what `Choice.build` takes; names are checked there."""
    fields = {f.name: f for f in dataclasses.fields(member)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, node in tree.items():
        inner = {k: v for k, v in node.items() if k != OWN}
        nested = inner and name in fields
        values[name] = _nested(member, fields[name], node.get(OWN), inner) if nested else node.get(OWN)
    return values


def _nested(member: type[Choice], field: dataclasses.Field, own: Any, inner: Mapping[str, Tree]) -> dict:
    """An option that has options itself, written as JSON."""
    where = f"{member.__name__}.{field.name}"
    hint = typing.get_type_hints(member)[field.name]
    family = _family(hint)
    if own is None and any(typing.get_origin(k) is collections.abc.Mapping for k in (hint, *typing.get_args(hint))):
        return dict(_leaves(inner))  # NAME.KEY=VALUE: whatever stands behind the first dot is the key
    if family is None:
        raise ValueError(f"{where} is one value and has no option {', '.join(inner)} of its own")
    base: dict[str, Any] = {}
    if own is not None:
        base["is"] = own
    elif isinstance(field.default, Choice):
        base = field.default.encode()
    else:
        raise ValueError(f"{where} has no default: say what it is first ({field.name}=NAME)")
    return base | _values(family.named(base["is"]), inner)


def _leaves(tree: Mapping[str, Tree], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, node in tree.items():
        if name == OWN:
            yield before, node
        else:
            yield from _leaves(node, f"{before}.{name}" if before else name)


def _family(hint: Any) -> type[Choice] | None:
    """The family of choices that a field takes, if it takes one."""
    for kind in (hint, *typing.get_args(hint)):
        if inspect.isclass(kind) and issubclass(kind, Choice):
            return kind.family
    return None
