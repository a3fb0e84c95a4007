"""What `--help` shows of the options, so that 80 columns are enough."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

from typer.core import TyperCommand

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
SHAPES = {"str": "TEXT", "list[str]": "TEXT", "int": "N", "float": "X", "path": "PATH"}  # of a value, by its type


def told(params: list[Any], ctx: Any) -> list[Any]:
    """Parameters as the help shows them: one name for what is said or unsaid, nothing behind an option that takes no
    value, and where some have panels, those without in the last one.  Hidden arguments stand nowhere."""
    params = [p for p in params if p.param_type_name == "option" or not getattr(p, "hidden", False)]
    panels = [panel for p in params if (panel := getattr(p, "rich_help_panel", None))]
    return [_one(p, panels[-1] if panels else None, ctx) for p in params]


def _one(param: Any, last: str | None, ctx: Any) -> Any:
    shown = copy.copy(param)
    if param.param_type_name != "option":
        return shown
    if getattr(param, "is_flag", False):
        shown.metavar = ""
    elif param.metavar is None and hasattr(param, "display_type_rich"):
        kind = str(param.display_type_rich(ctx)).strip("<>").removesuffix(" range")
        shown.metavar = SHAPES.get(kind)
    if param.secondary_opts:  # another column for one option would squeeze all of them
        shown.secondary_opts = []
        shown.help, shown.show_default = f"{param.help} (not: {', '.join(param.secondary_opts)})", False
    shown.rich_help_panel = getattr(param, "rich_help_panel", None) or last
    return shown


class Readable:
    """What of a command makes its help readable in 80 columns."""

    def format_help(self: Any, ctx: Any, formatter: Any) -> None:
        shown = copy.copy(self)
        shown.params = told(self.get_params(ctx), ctx)
        shown.add_help_option = False
        super(Readable, shown).format_help(ctx, formatter)  # type: ignore[misc]


class Verb(Readable, TyperCommand):
    """A verb."""


class Weighted(Verb):
    """One whose --weights takes the numbers that follow: those below zero are no options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, joined(list(args)))


def joined(args: list[str]) -> list[str]:
    """`--weights 1 -1` as `--weights=1,-1`."""
    at = args.index("--weights") + 1 if "--weights" in args else len(args)
    numbers = list(itertools.takewhile(NUMBER.fullmatch, args[at:]))
    if not any(n.startswith("-") for n in numbers):
        return args
    return [*args[: at - 1], f"--weights={','.join(numbers)}", *args[at + len(numbers) :]]


def paragraphs(text: str | None) -> str:
    """A docstring with its lines joined: the help folds them itself."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def first_sentence(text: str | None) -> str:
    """What the list of verbs says of one."""
    whole = paragraphs(text)
    return whole.partition(". ")[0].rstrip(".") + "."
