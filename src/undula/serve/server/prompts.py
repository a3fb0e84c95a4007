"""From what a client sends to the tokens that the model goes on after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...train.data.conversation import rendered
from ...train.tasks.format import begin_ids, ids_of
from .errors import Wrong
from .manners import BASE, Manner
from .schemas import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SHAPES = "a text, a list of texts, a list of token numbers, or a list of such lists"


def asked(given: Any, field: str, most: int) -> list[str | tuple[int, ...]]:
    """The prompts: texts, or tokens.  Raises Wrong for another shape, an empty one, and more than `most`."""
    if isinstance(given, str):
        found: list[Any] = [given]
    elif isinstance(given, list) and given and all(_is_token(one) for one in given):
        found = [tuple(given)]
    elif isinstance(given, list) and all(isinstance(one, str) for one in given):
        found = given
    elif isinstance(given, list) and all(
        isinstance(one, list) and all(_is_token(token) for token in one) for one in given
    ):
        found = [tuple(one) for one in given]
    else:
        raise Wrong(f"{field} has to be {SHAPES}", field)
    if not found or not all(found):
        raise Wrong(f"{field} is empty, or one of them is", field)
    if len(found) > most:
        raise Wrong(f"{field} has {len(found)} texts; one request takes {most} at most", field)
    return found


def rows(given: Any, field: str, most: int) -> list[Any]:
    """Texts to classify; pairs [a, b] of them; objects {column: text}.  Raises Wrong as `asked`."""
    every = [given] if isinstance(given, str) else given
    kinds: tuple[Callable[[Any], bool], ...] = (
        lambda one: isinstance(one, str),
        lambda one: isinstance(one, list) and len(one) == 2 and all(isinstance(text, str) for text in one),
        lambda one: isinstance(one, dict) and all(isinstance(text, str) for text in one.values()),
    )
    if not isinstance(every, list) or not any(all(map(kind, every)) for kind in kinds):
        raise Wrong(
            f"{field} has to be a text, a list of texts, of pairs [a, b], or of objects {{column: text}}", field
        )
    if not every or not all(every):
        raise Wrong(f"{field} is empty, or one of them is", field)
    if len(every) > most:
        raise Wrong(f"{field} has {len(every)} texts; one request takes {most} at most", field)
    return [tuple(one) if isinstance(one, list) else one for one in every]


def _is_token(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def tokens(prompt: str | tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a prompt, a text behind what the tokenizer puts before one, as in training.  Raises Wrong for a
    number that is no token."""
    if isinstance(prompt, str):
        return (*begin_ids(tokenizer), *ids_of(prompt, tokenizer))
    size = len(tokenizer)
    if odd := [token for token in prompt if not 0 <= token < size]:
        raise Wrong(f"prompt has the number {odd[0]}, and the model has tokens 0 to {size - 1}", "prompt")
    return prompt


def talk(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, manner: Manner = BASE) -> tuple[int, ...]:
    """The tokens of messages in the chat template, up to where the answer begins.  Raises Wrong."""
    turns = [_turn(message, i) for i, message in enumerate(messages)]
    if manner.plain is not None:
        raise Wrong(
            "this adapter was trained on prompts without turns: ask /v1/completions with the prompt "
            + (f"{manner.instruction!r} + " if manner.instruction else "")
            + f"TEXT + {manner.plain!r}",
            "messages",
            code="no_chat_template",
        )
    if not (manner.template or tokenizer.chat_template):
        raise Wrong(
            "this model has no chat template, so messages cannot be put to it: ask /v1/completions with a prompt",
            "messages",
            code="no_chat_template",
        )
    try:
        text = rendered(manner.begun(turns), tokenizer, True, manner.template)
    except ValueError as error:
        raise Wrong(str(error)[:500], "messages") from None
    return tuple(ids_of(text, tokenizer))


def _turn(message: Message, i: int) -> dict[str, str]:
    where = f"messages.{i}"
    if message.role not in ROLES:
        raise Wrong(
            f"{where}.role is {message.role[:50]!r}; turns are of: {', '.join(ROLES)} (tools are not served)",
            f"{where}.role",
        )
    more = {name: value for name, value in (message.model_extra or {}).items() if value not in (None, [])}
    name = more.pop("name", None)
    if more:
        raise Wrong(f"{where} has {', '.join(sorted(more))[:100]}, which is not served here", where)
    turn = {"role": ROLES[message.role], "content": _text(message.content, f"{where}.content")}
    if name is not None:
        if not isinstance(name, str):
            raise Wrong(f"{where}.name is a text", f"{where}.name")
        turn["name"] = name  # for templates that write it
    return turn


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Wrong(f'{where} has to be a text, or a list of {{"type": "text", "text": ...}}', where)
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Wrong(f"{where} has a part of type {str(kind)[:50]!r}: this model reads text alone", where)
        pieces.append(part["text"])
    return "".join(pieces)


def bias_of(said: dict[str, float], size: int) -> dict[int, float]:
    """{token: what is added to its logit}.  Raises Wrong for what is no token."""
    found = {}
    for token, value in said.items():
        if not (token.isascii() and token.isdigit() and int(token) < size):
            raise Wrong(f"logit_bias has {token[:50]!r}, and tokens are 0 to {size - 1}", "logit_bias")
        found[int(token)] = float(value)
    return found
