"""How prompts and conversations are put to a language model: a chat template, the tokenizer's own or another, or plain
text."""

from __future__ import annotations

import abc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.choice import Choice
from ..data.conversation import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = {  # by name
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}  # fmt: skip
LONGEST = 1 << 20  # bytes of a template


class Format(Choice):
    """How a prompt is put to the model."""

    @abc.abstractmethod
    def __call__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """Everything up to where the completion begins, special tokens included."""


@Format.register
@dataclass(frozen=True)
class Chat(Format):
    """A chat template: one message of the user's, then the assistant's turn.

    template: the name of one of `TEMPLATES`, the path of a file, or Jinja text, which is what is kept and goes into the
    tokenizer; empty: the tokenizer's own.  system: what the system says first, where a conversation has nothing of it.
    instruction: goes before the text of a prompt.

    Raises FileNotFoundError or ValueError for a template that is none.
    """

    instruction: str = ""
    system: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", template_of(self.template))

    def encode(self) -> dict[str, Any]:
        """As JSON values; what came later only where it is said."""
        return {k: v for k, v in super().encode().items() if v or k not in ("system", "template")}

    def begun(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with what the system says first."""
        said = any(message["role"] == "system" for message in messages)
        return messages if said or not self.system else [{"role": "system", "content": self.system}, *messages]

    def __call__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        if not tokenizer.chat_template:
            raise ValueError(
                "this tokenizer has no chat template: use Plain(), or --task-set format=plain; or give it one: "
                "Chat(template='chatml'), or --task-set format=chat --task-set format.template=chatml (or a file)"
            )
        turn = self.begun([{"role": "user", "content": self.instruction + text}])
        return str(tokenizer.apply_chat_template(list(turn), add_generation_prompt=True, tokenize=False))


@Format.register
@dataclass(frozen=True)
class Plain(Format):
    """instruction + text + between, after what the tokenizer itself puts before a text (a beginning token)."""

    instruction: str = ""
    between: str = "\n"

    def __call__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        begin = "".join(tokenizer.convert_ids_to_tokens(begin_ids(tokenizer)))
        return f"{begin}{self.instruction}{text}{self.between}"


def template_of(given: str) -> str:
    """The text of a template: of one by its name, of a file, or as it is."""
    if not given or "{{" in given or "{%" in given:
        return _checked(given, "the template")
    if given in TEMPLATES:
        return TEMPLATES[given]
    path = Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"template={given!r} is no file here, no Jinja text, and no name of a template; there are: "
            f"{', '.join(TEMPLATES)}"
        )
    if path.stat().st_size > LONGEST:
        raise ValueError(f"template={given} has {path.stat().st_size:,} bytes: that is no chat template")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"template={given} is not UTF-8") from None
    if "{{" not in text:
        raise ValueError(f"template={given} holds no Jinja template: nowhere {{{{ ... }}}}")
    return _checked(text, given)


def _checked(text: str, where: str) -> str:
    """Raises ValueError for what is not Jinja, as far as that can be told here."""
    try:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # without transformers nothing trains; whoever has it is told
        return text
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"{where}, line {error.lineno}: this is no Jinja template ({error.message})") from None
    return text


def check_talks(format: Format | None) -> None:
    """Raises ValueError for a format that says nothing of conversations."""
    if isinstance(format, Plain):
        raise ValueError(
            "format=plain writes pairs, and these rows are conversations: leave it out (the tokenizer's chat "
            "template), or say format=chat and format.template=chatml (or a file)"
        )
    if isinstance(format, Chat) and format.instruction:
        raise ValueError("format.instruction goes before the prompt of a pair; in conversations it is format.system")


def unknown_marks(format: Format | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a template of one's own writes as marks, <|...|>, that the tokenizer has no single token for."""
    if not isinstance(format, Chat) or not format.template:
        return []
    marks = dict.fromkeys(re.findall(r"<\|[^|<>{}\s]+\|>", format.template))
    return [mark for mark in marks if len(ids_of(mark, tokenizer)) != 1]


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end token, where there is one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text, but for an encoder's [CLS].  It is seen, not asked: `add_bos_token`
    is False of tokenizers whose post-processor puts a beginning token there (Llama 3's, most that people make)."""
    found = list(tokenizer("", verbose=False)["input_ids"])
    begin, end, cls = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id
    if found and found[-1] in (end, tokenizer.sep_token_id):
        both = found[-1] == begin  # one token for both: what stands alone is what the tokenizer says
        if not both or len(found) > 1 or (begin == end and not getattr(tokenizer, "add_bos_token", False)):
            found.pop()
    return [] if found == [cls] != [begin] else found


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text alone."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
