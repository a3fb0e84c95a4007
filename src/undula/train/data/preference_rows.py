"""Preference pairs as people have them, to rows of one shape: what is asked, the chosen and the rejected answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .columns import spot, texts
from .conversation import ASSISTANT, Message, messages_of
from .faults import Faults
from .source import source_of

if TYPE_CHECKING:
    from datasets import Dataset

ADVICE = (
    "A row has chosen and rejected, two different answers: texts, or lists of messages that end in the assistant's "
    "turn; and a prompt, or a beginning that both share"
)


def preferences(split: Dataset, columns: Mapping[str, str], faults: Faults) -> dict[str, Any]:
    """{messages, chosen, rejected} of conversations, {prompt, chosen, rejected} of texts, {text, chosen, rejected} of
    texts that begin alike; what is wrong is added to the faults."""
    if any(_is_talk(value) for column in columns.values() for value in split[column][:1]):
        return _talks(split, columns, faults)
    found = {role: texts(split, columns[role], faults) for role in ("chosen", "rejected")}
    source = source_of(split)
    if "prompt" in columns:
        found["prompt"] = texts(split, columns["prompt"], faults)
    else:
        found["text"] = []
    for row, (better, worse) in enumerate(zip(found["chosen"], found["rejected"], strict=True)):
        shared = "" if "prompt" in columns else _beginning(better, worse)
        why = "the two are the same" if better == worse and better.strip() else ""
        if not why and "prompt" not in columns and better.strip() and worse.strip() and not shared.strip():
            why = "there is no prompt, and the two have no beginning in common"
        if not why and "text" in found and not (better[len(shared) :].strip() and worse[len(shared) :].strip()):
            why = "after what both begin with one of them is empty" if better.strip() and worse.strip() else ""
        if why:
            faults.add(
                spot(split, columns["chosen"], "holds no preference"),
                f"{source.place(row)} ({why})",
                ADVICE,
                source.key(row),
            )
        if "text" in found:
            found["text"].append(shared)
            found["chosen"][row], found["rejected"][row] = better[len(shared) :], worse[len(shared) :]
    return found


def _is_talk(value: Any) -> bool:
    """Whether it is a list of messages, or the JSON text of one."""
    return isinstance(value, list) or isinstance(value, str) and value.lstrip().startswith("[{")


def _beginning(one: str, other: str) -> str:
    """What two texts have in common, up to the end of a word, the white space after it left to what follows."""
    cut = _common(one, other)
    while cut and not (one[cut - 1].isspace() or one[cut - 1] in ":>]"):
        cut -= 1
    return one[:cut].rstrip(" ")


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items are the same at the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _talks(split: Dataset, columns: Mapping[str, str], faults: Faults) -> dict[str, Any]:
    source, asked = source_of(split), split[columns["prompt"]][:] if "prompt" in columns else None
    made: dict[str, list[Any]] = {"messages": [], "chosen": [], "rejected": []}
    both = zip(split[columns["chosen"]][:], split[columns["rejected"]][:], strict=True)
    for row, (better, worse) in enumerate(both):
        try:
            found = _talk(None if asked is None else asked[row], better, worse)
        except ValueError as error:
            found = [], "", ""
            what = spot(split, columns["chosen"], "holds no preference")
            faults.add(what, f"{source.place(row)} ({error})", ADVICE, source.key(row))
        for column, value in zip(made, found, strict=True):
            made[column].append(value)
    return made


def _talk(asked: Any, better: Any, worse: Any) -> tuple[list[Message], str, str]:
    """(the messages before the answer, the chosen answer, the rejected one).  Raises ValueError."""
    chosen, rejected = _messages(better, "chosen"), _messages(worse, "rejected")
    shared = _common(chosen, rejected)
    before = [] if asked is None else _messages(asked, "prompt", "user")
    if all(message in chosen[:shared] for message in before):
        before = []  # the prompt stands in the conversations too
    if chosen == rejected:
        raise ValueError("the two are the same")
    if len(chosen) != shared + 1 or len(rejected) != shared + 1:
        raise ValueError("the two differ by more than their last turn")
    if chosen[-1]["role"] != ASSISTANT or rejected[-1]["role"] != ASSISTANT:
        raise ValueError("the last turn is not the assistant's")
    messages = [*before, *chosen[:shared]]
    if not messages:
        raise ValueError("there is no prompt, and the two have no turn in common")
    if not all(answer[-1]["content"].strip() for answer in (chosen, rejected)):
        raise ValueError("an answer is empty")
    return messages, chosen[-1]["content"], rejected[-1]["content"]


def _messages(value: Any, name: str, role: str = ASSISTANT) -> list[Message]:
    """A list of messages, or a text as one turn.  Raises ValueError."""
    if isinstance(value, str) and not _is_talk(value):
        if not value.strip():
            raise ValueError(f"{name} is empty")
        return [{"role": role, "content": value}]
    try:
        return messages_of(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
