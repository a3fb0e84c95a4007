"""How an adapter was trained to be talked to: its chat template, and what the system says first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...train.run import RUN, Run
from ...train.tasks.format import LONGEST, Chat, Plain
from ..request import Part
from .errors import Wrong

TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
KEPT = 1024  # adapters whose manners are remembered


@dataclass(frozen=True)
class Manner:
    """template: of chats; None: the base's own.  system: what is said first where a talk has nothing of it;
    instruction: what goes before each text of the user's; both as `undula chat` does.  plain: put to the model without
    turns, so that there are no chats with it: between prompt and answer stands this text."""

    template: str | None = None
    system: str = ""
    instruction: str = ""
    plain: str | None = None

    def begun(self, turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """The turns as the adapter was trained on them."""
        said = [{**t, "content": self.instruction + t["content"]} if t["role"] == "user" else dict(t) for t in turns]
        first = bool(self.system) and not any(t["role"] == "system" for t in turns)
        return [{"role": "system", "content": self.system}, *said] if first else said


BASE = Manner()


def manner_of(shelf: Any, parts: Sequence[Part]) -> Manner:
    """That of the adapter of a request; of none, and of several at once, the base's.  Raises Wrong where the adapter's
    own files cannot be read."""
    if len(parts) != 1:
        return BASE
    version = shelf.version((Part(parts[0].name),))
    source = version.terms[0][1]
    try:
        return _read(source.path, source.number)
    except (ValueError, LookupError, TypeError, OSError):
        raise Wrong(f"how {parts[0].name!r} is to be talked to cannot be read from its files", "model") from None


@lru_cache(maxsize=KEPT)
def _read(path: Path, number: int) -> Manner:
    """What the files of an adapter say; `number` tells one that was put in its place."""
    if (path / RUN).is_file():
        form = getattr(Run.load(path).task, "format", None)
        if isinstance(form, Plain):
            return Manner(plain=form.between, instruction=form.instruction)
        return Manner(form.template or None, form.system, form.instruction) if isinstance(form, Chat) else BASE
    if (path / TEMPLATE).is_file():
        return Manner(_text(path / TEMPLATE))
    if (path / TOKENIZER).is_file():
        found = json.loads(_text(path / TOKENIZER)).get("chat_template")
        return Manner(found) if isinstance(found, str) else BASE
    return BASE


def _text(path: Path) -> str:
    if path.stat().st_size > LONGEST:
        raise ValueError(f"{path.name} is too long")
    return path.read_text(encoding="utf-8")
