"""Conversations: `messages` as chat APIs have them, or ShareGPT's `conversations`, to tokens and a mask of what is
learned: the assistant's turns, each with its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .columns import spot
from .faults import Faults
from .source import source_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
ASSISTANT = "assistant"
ROLES = {  # ShareGPT's names of who speaks
    "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT,
    "assistant": ASSISTANT, "model": ASSISTANT, "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
UNSERVED = ("tool_calls", "function_call", "weight", "loss")  # keys that change what is said, or what is learned


def conversations(rows: Dataset, column: str, faults: Faults) -> list[list[Message]]:
    """A column of conversations as lists of {role, content}; also as the JSON text of such a list."""
    return _each(rows, column, faults, _conversation)


def questions(rows: Dataset, column: str, faults: Faults) -> list[list[Message]]:
    """A column of conversations up to where the assistant is to speak: what of it stands at the end is left out."""
    return _each(rows, column, faults, question)


def question(value: Any) -> list[Message]:
    """A conversation up to where the assistant is to speak.  Raises ValueError for what is none."""
    made = messages_of(value)
    while made and made[-1]["role"] == ASSISTANT:
        made.pop()
    if not made or not made[-1]["content"].strip():
        raise ValueError("it says nothing that could be answered")
    return made


def _each(rows: Dataset, column: str, faults: Faults, read: Callable[[Any], list[Message]]) -> list[list[Message]]:
    source, found = source_of(rows), []
    for row, value in enumerate(rows[column][:]):
        try:
            found.append(read(value))
        except ValueError as error:
            found.append([])
            advice = 'A conversation is [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
            what = spot(rows, column, "holds what is no conversation")
            faults.add(what, f"{source.place(row)} ({error})", advice, source.key(row))
    return found


def messages_of(value: Any) -> list[Message]:
    """Raises ValueError for what is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"found the text {value!r:.40}") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"found {value!r:.40}")
    return [_message(i, message) for i, message in enumerate(value)]


def _conversation(value: Any) -> list[Message]:
    """Raises ValueError for what is none, or holds nothing to learn."""
    made = messages_of(value)
    if not any(m["role"] == ASSISTANT for m in made):
        raise ValueError("no turn of the assistant's, so there is nothing to learn")
    while made[-1]["role"] != ASSISTANT:  # nothing is learned from what comes after
        made.pop()
    if len(made) == 1:
        raise ValueError("a turn of the assistant's alone, with nothing that it answers")
    return made


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"message {number + 1} is {message!r:.40}")
    who, said = (next((message[k] for k in keys if message.get(k) is not None), None)
                 for keys in (("role", "from"), ("content", "value")))  # fmt: skip
    if not isinstance(who, str) or who.lower() not in ROLES:
        raise ValueError(f"message {number + 1} has the role {who!r:.40}; known are {', '.join(ROLES)}")
    role = ROLES[who.lower()]
    unserved = [k for k in UNSERVED if message.get(k) not in (None, [], "")]
    if unserved:
        raise ValueError(f"message {number + 1} has {', '.join(unserved)}, which is not served")
    if not isinstance(said, str):
        raise ValueError(f"message {number + 1} has the content {said!r:.40}, which is no text")
    if role == ASSISTANT and not said.strip():
        raise ValueError(f"message {number + 1}, an assistant's, is empty")
    return {"role": role, "content": said}


def rendered(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, generate: bool = False, template: str | None = None
) -> str:
    """The text that a template makes, the tokenizer's where none is given.  Raises ValueError where there is none, or
    it refuses the messages."""
    if not (template or tokenizer.chat_template):
        raise ValueError(
            "this tokenizer has no chat template, so there is no way to write messages: take the tokenizer of a model "
            "made for chats, or give it one: format=Chat(template='chatml'), or --task-set format=chat --task-set "
            "format.template=chatml (or a file); pairs of prompt and completion need none"
        )
    try:
        made = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=generate, tokenize=False
        )
        return str(made)
    except Exception as error:  # whatever a template raises: jinja's errors and Python's
        told = " -> ".join(m["role"] for m in messages[:6])
        raise ValueError(f"the tokenizer's chat template does not take these messages ({told}): {error}") from None


def tokens(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """(the tokens of a conversation, which of them are learned).  Each piece, the assistant's turns and what is between
    them, is tokenised by itself, as it is where the model answers.  A turn's end is what the template puts there; where
    that is no special token, the last turn ends in the tokenizer's end token.

    Raises ValueError for a template that writes a turn otherwise once another follows.
    """
    ids: list[int] = []
    learned: list[bool] = []
    text = ""
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        through = rendered(messages[: i + 1], tokenizer)
        before = rendered(messages[:i], tokenizer, generate=True) if i else _opening(through, messages[:1], tokenizer)
        if not before.startswith(text) or not through.startswith(before):
            raise ValueError(
                "the tokenizer's chat template writes earlier turns otherwise once another turn follows, so that what "
                "is learned is not what would be met: make a row of each assistant's turn"
            )
        for piece, own in ((before[len(text) :], False), (through[len(before) :], True)):
            made = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            kept = _through_end(made, tokenizer) if own else len(made)
            ids += made
            learned += [own and at < kept for at in range(len(made))]
        text = through
    return _ended(ids, learned, tokenizer)


def _opening(through: str, first: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before a conversation's first turn where that is the assistant's: no template writes no messages, so
    it is seen by what a template adds for the model to answer.  Raises ValueError where it is not there."""
    asking = rendered(first, tokenizer, generate=True)
    asks = asking[len(through) :] if asking.startswith(through) else ""
    at = through.find(asks)
    if not asks or at < 0:
        raise ValueError(
            "a conversation begins with a turn of the assistant's, and the tokenizer's chat template does not show "
            "where that begins: put a turn of the system's or the user's before it"
        )
    return through[: at + len(asks)]


def answered(
    messages: Sequence[Message], answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """(the tokens of the messages up to where the assistant speaks, those of its answer with its end), as in `tokens`.
    Raises ValueError for a template that writes the messages otherwise once the answer follows."""
    before = rendered(messages, tokenizer, generate=True)
    through = rendered([*messages, {"role": ASSISTANT, "content": answer}], tokenizer)
    if not through.startswith(before):
        raise ValueError("the tokenizer's chat template writes messages otherwise once an answer follows")
    asked, own = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                  for text in (before, through[len(before) :]))  # fmt: skip
    own = own[: _through_end(own, tokenizer)]
    return asked, _ended(own, [True] * len(own), tokenizer)[0]


def _through_end(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens of a turn are learned: those through its last special one (a line's end after it is not)."""
    special = set(tokenizer.all_special_ids)
    return next((at + 1 for at in range(len(ids) - 1, -1, -1) if ids[at] in special), len(ids))


def _ended(ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    last = max(at for at, own in enumerate(learned) if own)
    ids, learned = ids[: last + 1], learned[: last + 1]
    if ids[-1] not in set(tokenizer.all_special_ids) and tokenizer.eos_token_id is not None:
        return [*ids, tokenizer.eos_token_id], [*learned, True]
    return ids, learned
