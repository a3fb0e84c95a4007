"""What an adapter's files say of it in words."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..io.native import README as NATIVE
from ..io.peft import README as PEFT
from ..train.card import MARK
from .places import EXPERT, README

LONGEST = 2000  # characters: MiniLM reads 256 words
LARGEST = 1 << 20
FRONT = re.compile(r"\A---\n.*?\n---\n", re.S)
# None of these reads a part of the text again and again, whatever the text: what is opened ends at its end.
FENCED = re.compile(r"^```.*?(?:^```[ \t]*$|\Z)", re.S | re.M)
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
IMAGE, LINK = re.compile(r"!\[[^][]*\]\([^()]*\)"), re.compile(r"\[([^][]*)\]\([^()]*\)")
TABLE = re.compile(r"^[ \t]*\|.*$", re.M)
MARKS = re.compile(r"^[ \t]*[#>*+-]+(?:[ \t]+|$)|[*_`]+", re.M)


def described(path: Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> tuple[str, str]:
    """(text, where it is from: "description", "card", "config", "name") of an adapter's directory or file.

    A description of an expert counts first, then a card that a person wrote, then what the configuration says of the
    task (its classes, its data); else there is the name alone.  Never empty, and such as an encoder reads: what no
    character is (halves of one, bytes of a name in another encoding) is a question mark.
    """
    text, by = _told(path, config, about)
    return readable(text), by


def readable(text: str) -> str:
    """With question marks for what no character is: no tokenizer takes that."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _told(path: Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> tuple[str, str]:
    facts = _facts(config, about)
    if path.is_dir():
        if told := _expert(path / EXPERT):
            return told, "description"
        if card := _card(path / README):
            return f"{card} {facts}".strip()[:LONGEST], "card"
    if facts:
        return facts[:LONGEST], "config"
    return re.sub(r"[-_.]+", " ", path.stem if path.is_file() else Path(os.path.abspath(path)).name), "name"


def _expert(path: Path) -> str:
    try:
        said = json.loads(_read(path) or "{}")
    except (ValueError, RecursionError):
        return ""
    text = said.get("description") if isinstance(said, dict) else None
    return " ".join(text.split())[:LONGEST] if isinstance(text, str) else ""


def _card(path: Path) -> str:
    """The prose of a card; empty for one that undula wrote, which says what the configuration says."""
    text = _read(path)
    first = text.partition("\n")[0]
    if MARK in text or first in (NATIVE.partition("\n")[0], PEFT.partition("\n")[0]):
        return ""
    for pattern in (FRONT, FENCED, COMMENT, IMAGE, TABLE):
        text = pattern.sub("", text)
    return " ".join(MARKS.sub("", LINK.sub(r"\1", text)).split())[:LONGEST]


def _facts(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Of the configuration: the classes and the data of the training."""
    told = about.get("training")
    data = told.get("data") if isinstance(told, Mapping) else None
    classes = about.get("classes")
    parts = []
    if isinstance(classes, list | tuple) and classes:
        parts.append(", ".join(map(str, classes)))
    if isinstance(data, str) and data:
        parts.append(re.sub(r"[-_.:/]+", " ", data))
    if parts and isinstance(task := config.get("task_type") or about.get("task_type"), str):
        parts.append(task.replace("_", " ").lower())
    return ". ".join(parts)


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST).decode("utf-8", errors="replace")
    except OSError:
        return ""
