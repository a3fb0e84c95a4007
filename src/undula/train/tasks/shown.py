"""An example as the model will see it, for people: its tokens as text, special ones visible, and which are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Piece = tuple[str, bool]  # (text, whether it is learned)
IGNORED = -100  # a label that the loss leaves out
MOST = 1200  # characters of an example: of the rest it is said how much there is


def pieces(example: Mapping[str, Any], processor: Any, label: str | None = None) -> list[Piece]:
    """A task's example: tokens whose own labels the loss counts are learned; what stands for the whole row, as a class
    does, comes last.  `label`: what to call it."""
    ids, labels = example.get("input_ids"), example.get("labels")
    if ids is None:
        shapes = [f"{name} {' x '.join(map(str, v.shape))}" for name, v in example.items() if hasattr(v, "shape")]
        found: list[Piece] = [(", ".join(shapes), False)]
    elif isinstance(labels, Sequence) and label is None and _same(ids, labels):
        return shortened(_runs(ids, [token != IGNORED for token in labels], processor))
    else:
        found = [(text_of(ids, processor), False)]
    if label is None and isinstance(labels, Sequence) and all(isinstance(token, int) for token in labels):  # as of T5
        label = text_of([token for token in labels if token != IGNORED], processor)
    return shortened([*found, (str(labels) if label is None else label, True)])


def _same(ids: Sequence[int], labels: Sequence[int]) -> bool:
    """Whether what is learned is these tokens, or some of them."""
    return len(ids) == len(labels) and all(b in (a, IGNORED) for a, b in zip(ids, labels, strict=True))


def text_of(ids: Sequence[int], processor: Any) -> str:
    """Tokens as text, special ones among them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _runs(ids: Sequence[int], learned: Sequence[bool], processor: Any) -> list[Piece]:
    """Neighbours that are learned, or are not, together."""
    found: list[Piece] = []
    begin = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or learned[at] != learned[begin]:
            found.append((text_of(ids[begin:at], processor), learned[begin]))
            begin = at
    return found


def shortened(found: Sequence[Piece]) -> list[Piece]:
    """Of pieces that are long the beginning and the end."""
    most = max(80, MOST // max(len(found), 1))
    return [(_short(text, most), learned) for text, learned in found]


def _short(text: str, most: int) -> str:
    left = len(text) - most
    return text if left < 40 else f"{text[: most // 2]} [... {left:,} characters ...] {text[len(text) - most // 2 :]}"
