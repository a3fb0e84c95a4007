"""The options of a command line from the fields of a dataclass (see `train.recipe`), and its values from what was
typed."""

from __future__ import annotations

import collections.abc
import inspect
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from ..core.choice import Choice, plain
from ..core.given import hints
from ..core.options import build, changed, split_pair
from ..train.fields import PANELS, bare, default_of, is_union, told
from ..train.recipe import Settings
from . import shell

Texts = list[str]
C = TypeVar("C", bound=Choice)


def flag(f: Field[Any]) -> str:
    """The option of a field."""
    return f.metadata["flag"] or f"--{f.name.replace('_', '-')}"


def options_flag(f: Field[Any]) -> str:
    """The option of the options of a choice."""
    return f.metadata["options"] or f"{flag(f)}-set"


def own(f: Field[Any]) -> str:
    """The parameter that holds the options of a choice."""
    return f"{f.name}_set"


def offered(kind: type[Settings]) -> list[Field[Any]]:
    """The fields that people may set."""
    return [f for f in told(kind) if f.metadata["offered"]]


def parameters(kind: type[Settings], usual: Mapping[str, str]) -> list[inspect.Parameter]:
    """A parameter for each field that people may set, two for a choice.  `usual`: what stands for a field that has no
    default where nothing is typed."""
    made = []
    for f in offered(kind):
        hint, default = bare(hints(kind)[f.name]), default_of(f)
        help = f.metadata["help"]
        if _is_choice(hint):
            told = usual.get(f.name) if default is MISSING else None if default is None else shell.called(type(default))
            text, panel = help.format(names=_names(hint)), f.metadata["panel"]
            made += [_parameter(f.name, str | None, told, flag(f), text, panel, "NAME")]
            text = f"An option of {_called_in_words(hint)}; of one in it: ITS.NAME=VALUE. Repeatable."
            made += [_parameter(own(f), Texts, [], options_flag(f), text, panel, "NAME=VALUE")]
        elif (family := _several(hint)) is not None:
            text = help.format(names=_names(family))
            made.append(_parameter(f.name, Texts, [], flag(f), text, f.metadata["panel"], "NAME,..."))
        else:
            made.append(
                _parameter(
                    f.name,
                    *_typed(f, hint, default),
                    flag(f),
                    help,
                    f.metadata["panel"],
                    _shape(hint),
                    f.metadata["word"],
                )
            )
    return made


SHAPES = {int: "N", float: "X", Path: "PATH"}  # how the help writes a value


def _shape(hint: Any) -> str:
    return SHAPES.get(hint, "TEXT")


def option(name: str, kind: Any, default: Any = None) -> inspect.Parameter:
    """A parameter beside the fields; `kind` is annotated with its `typer.Option`."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def signature(
    options: Sequence[inspect.Parameter],
    early: Sequence[str],
    panels: Sequence[str] = PANELS,
    arguments: Sequence[inspect.Parameter] = (),
) -> inspect.Signature:
    """What a verb takes: its context, arguments, and options in the order of the help: by panel, in each those first
    that are needed `early`."""

    def order(p: inspect.Parameter) -> tuple[int, int]:
        panel = panels.index(p.annotation.__metadata__[0].rich_help_panel)
        return panel, early.index(p.name) if p.name in early else len(early)

    ctx = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    return inspect.Signature([ctx, *arguments, *sorted(options, key=order)])


def values(
    kind: type[Settings], typed: Mapping[str, Any], said: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
    """The values of fields: those that a file has `said`, but where parameters are `given`; else the parameters' own.
    Fields without one are left out.  Raises ValueError or LookupError for text that is no value."""
    made = dict(said)
    for f in offered(kind):
        if f.name not in said or f.name in given:
            value = _value(f, hints(kind)[f.name], typed)
            made |= {} if value is MISSING else {f.name: value}
        elif own(f) in given:
            if said[f.name] is None:
                raise ValueError(f"{options_flag(f)} has options of what is none in the file: name one with {flag(f)}")
            made[f.name] = changed(said[f.name], typed[own(f)])
    return made


def _value(f: Field[Any], declared: Any, typed: Mapping[str, Any]) -> Any:
    found, hint = typed[f.name], bare(declared)
    if _is_choice(hint):
        none = found is not None and found.strip().lower() == "none" and type(None) in typing.get_args(declared)
        return None if none else _choice(f, hint, found, typed[own(f)])
    if (family := _several(hint)) is not None:
        return tuple(_built(family, text) for text in found)
    if typing.get_origin(hint) is collections.abc.Mapping:
        return _by_pattern(f, typing.get_args(hint)[1], found)
    if isinstance(found, list):
        return found[0] if len(found) == 1 and is_union(hint) else tuple(found)
    return MISSING if found is None and default_of(f) is MISSING else found


def _choice(f: Field[Any], family: type[Choice], text: str | None, pairs: Texts) -> Any:
    if text is None:
        if pairs:
            raise ValueError(
                f"{options_flag(f)} has the options of {_called_in_words(family)}: name one with {flag(f)}"
            )
        return default_of(f)
    name, *more = text.split(",")
    if "{names}" in f.metadata["help"]:
        member(family, name)
    return build(family, name.strip(), [*more, *pairs])


def member(family: type[C], name: str) -> type[C]:
    """The member of that name.  Raises LookupError that lists them as the help does."""
    family.members()
    if plain(name.strip()) not in family.registry:
        raise LookupError(
            f"no {family.__name__.lower()} is called {name.strip()!r}; there are: {_names(family)}{family.advice}"
        )
    return family.named(name.strip())


def _by_pattern(f: Field[Any], family: type[Choice], texts: Texts) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        pattern, spec = split_pair(text, "an override")
        if pattern in found:
            raise ValueError(f"{flag(f)} {pattern} is given twice: a pattern has one {family.__name__.lower()}")
        name, *pairs = spec.split(",")
        found[pattern] = build(family, name.strip(), pairs)
    return found


def _typed(f: Field[Any], hint: Any, default: Any) -> tuple[Any, Any]:
    """(type, default) of a parameter."""
    if hint is torch.dtype:
        return str, str(default).removeprefix("torch.")
    if hint in (int, float, bool, str, Path):
        return hint | None, None if default is MISSING else default
    if typing.get_origin(hint) is None:
        raise TypeError(f"a command line has no option for {f.name}, which is a {hint}")
    return Texts, [default] if isinstance(default, str) else list(default)


def _parameter(
    name: str, kind: Any, default: Any, flag: str, help: str, panel: str, shape: str, word: str | None = None
) -> inspect.Parameter:
    names = f"{flag}/--no-{flag[2:]}" if bool in (kind, *typing.get_args(kind)) else flag
    kind, parser = (Any, _number_or(word)) if word else (kind, None)
    flags = typer.Option(names, help=help, metavar=shape, rich_help_panel=panel, parser=parser)
    return option(name, Annotated[kind, flags], default)


def _number_or(word: str) -> Callable[[Any], Any]:
    """What reads a number, or the word that stands in its place."""

    def number(text: Any) -> Any:
        if text == word or not isinstance(text, str):
            return text
        try:
            return float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a valid float, nor {word!r}") from None

    return number


def _is_choice(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, Choice)


def _several(hint: Any) -> type[Choice] | None:
    """The family of which a field takes several."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
    return kinds[0] if kinds and _is_choice(kinds[0]) else None


def _built(family: type[C], text: str) -> C:
    """A choice from NAME,NAME=VALUE,..."""
    name, *pairs = text.split(",")
    member(family, name)
    return build(family, name.strip(), pairs)


def _names(family: type[Choice]) -> str:
    return ", ".join(sorted(shell.called(kind) for kind in family.members()))


def _called_in_words(family: type[Choice]) -> str:
    name = family.__name__.lower()
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
