"""Token classification: a tag for each token, and the entities that tags make (NER)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from ...core.ranges import Count
from ..data.tagged_rows import TaggedRows
from ..data.tags import OUTSIDE, agreement
from .answering import outputs, windows
from .causal_lm import IGNORED
from .classification import LENGTH
from .heads import named_outputs
from .outputs import head_of, own_names, with_head
from .packing import Flat, beginnings, longest, of_tokens, probed
from .shown import Piece, pieces
from .step import Step, apart_in_one_pass, packed
from .task import (
    Example,
    Examples,
    Processor,
    Task,
    Traced,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@Task.register
@dataclass(frozen=True)
class TokenClassification(TaggedRows):
    """A tag for each token: precision, recall and F1 of whole entities (strict, see `tags`), accuracy of tags, loss.

    Rows are tokens with as many tags (lists, a sentence of a CoNLL file, texts with blanks between), or a text with
    spans {start, end, label}, which become tags in BIO of its words.  A tag stands at the first piece of its token; the
    other pieces are not learned.  Tags are texts, a `ClassLabel`'s numbers, or numbers of `names`, which lists all tags
    in order (empty: those in the data).  Tokens that `max_length` cuts off are said to be O.
    """

    peft = "TOKEN_CLS"
    pipeline = "token-classification"
    headline = "f1"

    tokens: str | None = None
    tags: str | None = None
    text: str | None = None
    spans: str | None = None
    max_length: Count | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        if not head_of(config, "ForTokenClassification"):
            return None
        return cls(names=own_names(config) or tuple(map(str, range(int(config.num_labels or 0)))))

    def figures(self, parts: Mapping[str, Dataset]) -> dict[str, Any]:
        """The entities of each type, and the tokens."""
        found: dict[str, Any] = {"entities": {}, "tokens": {}}
        for part, rows in parts.items():
            tags = [[self.names[n] for n in each] for each in rows["tags"][:]]
            counted = Counter(kind for each in tags for kind, _, _ in self.scheme().spans(each))
            found["entities"][part] = dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
            found["tokens"][part] = sum(map(len, tags))
        return found

    def told(self, figures: Mapping[str, Any]) -> Iterator[str]:
        for part, counted in figures["entities"].items():
            shown = ", ".join(f"{kind} {n}" for kind, n in list(counted.items())[:20]) or "none"
            yield f"entities in {figures['tokens'][part]} {part} tokens: {shown}"
        every = {kind for counted in figures["entities"].values() for kind in counted}
        for part, counted in figures["entities"].items():
            if lacking := every - set(counted):
                yield f"types without a {part} entity: {', '.join(sorted(lacking)[:20])}"

    def outputs(self) -> dict[str, Any]:
        return named_outputs(self.names)

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        from transformers import AutoModelForTokenClassification as Auto

        return with_head(Auto, path, self.names, dtype=dtype, **quantised, **self.outputs())

    def processor(self, path: str) -> Processor:
        """A fast tokenizer, which alone knows the word that a piece is of, and which takes words."""
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(path)
        if not found.is_fast:
            raise ValueError(
                f"{type(found).__name__} does not tell which word a piece is of: token classification needs a fast "
                "tokenizer (tokenizer.json)"
            )
        if getattr(found, "add_prefix_space", None) is False:  # byte-level ones, whose words begin with a blank
            found = AutoTokenizer.from_pretrained(path, add_prefix_space=True)
        return found

    def pieces(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[Any, list[int | None], int]:
        """(the encoded row, the first piece of each token or None where it has none, how many pieces there were)."""
        limit = self.max_length or min(LENGTH, tokenizer.model_max_length)
        encoded = tokenizer(row["tokens"], is_split_into_words=True, verbose=False)
        had = len(encoded["input_ids"])
        if had > limit:
            encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=limit)
        first: list[int | None] = [None] * len(row["tokens"])
        for piece, word in enumerate(encoded.word_ids()):
            if word is not None and first[word] is None:
                first[word] = piece
        return encoded, first, had

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        return self.traced(row, tokenizer)[0]

    def traced(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Traced:
        encoded, first, had = self.pieces(row, tokenizer)
        count, lost = len(encoded["input_ids"]), dict[str, tuple[int, int]]()
        if had > count:
            lost["the row is cut at its end"] = had, count
        elif None in first:
            lost["words are lost, of which the tokenizer makes nothing"] = len(first), len(first) - first.count(None)
        labels = [IGNORED] * count
        for piece, tag in zip(first, row.get("tags") or [], strict=False):
            if piece is not None:
                labels[piece] = tag
        return {**encoded, "labels": labels}, lost

    def shown(self, row: Mapping[str, Any], processor: Processor) -> list[Piece]:
        said = " ".join(f"{t}/{self.names[n]}" for t, n in zip(row["tokens"], row["tags"], strict=True))
        return pieces(self.example(row, processor), processor, said)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)

    def step(self, examples: Examples, model: PreTrainedModel) -> Step:
        flats = [Flat(of_tokens, begin) for begin in beginnings(model)]
        rows = probed(longest(examples))
        return packed(model, flats, self.collator(examples.processor), apart_in_one_pass, [*rows, rows[0]])

    def items(self, batch: Mapping[str, torch.Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def said_of(
        self, model: PreTrainedModel, examples: Examples, batch: int
    ) -> Iterator[tuple[int, torch.Tensor, float, int]]:
        """(number of the row, probabilities (tokens, tags), the sum of the losses, how many there are) of every row;
        of a token that was cut off the outside tag has all, and where there is none, no tag has any."""
        outside = self.names.index(OUTSIDE) if OUTSIDE in self.names else None
        left = examples.processor.padding_side == "left"
        for numbers, inputs, logits in outputs(model, examples, batch):
            losses = torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), inputs["labels"], ignore_index=IGNORED, reduction="none"
            ).sum(1)
            counted = (inputs["labels"] != IGNORED).sum(1)
            for at, row in enumerate(numbers):
                encoded, first, _ = self.pieces(examples.rows[row], examples.processor)
                shift = logits.shape[1] - len(encoded["input_ids"]) if left else 0
                found = torch.zeros(len(first), len(self.names), dtype=torch.float64)
                if outside is not None:
                    found[:, outside] = 1.0
                there = [i for i, piece in enumerate(first) if piece is not None]
                places = [shift + piece for piece in first if piece is not None]
                found[there] = logits[at, places].cpu().double().softmax(1)
                yield row, found, float(losses[at]), int(counted[at])

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        wanted, found, loss, count = list[list[str]](), list[list[str]](), 0.0, 0
        for row, probabilities, lost, tokens in self.said_of(model, examples, batch):
            wanted.append([self.names[n] for n in examples.rows[row]["tags"]])
            found.append(self._likeliest(probabilities))
            loss, count = loss + lost, count + tokens
        pairs = [(a, b) for want, have in zip(wanted, found, strict=True) for a, b in zip(want, have, strict=True)]
        spans = [[self.scheme().spans(tags) for tags in each] for each in (wanted, found)]
        return {
            "loss": loss / max(count, 1),
            **agreement(*spans),
            "accuracy": sum(a == b for a, b in pairs) / max(len(pairs), 1),
        }

    def answers(
        self, model: PreTrainedModel, rows: Iterable[Mapping[str, Any]], processor: Processor, batch: int
    ) -> Iterator[dict[str, Any]]:
        """{entities: [{label, start, end, text, score}]}: characters of the text, of tokens with a blank between them;
        the score is the mean of the probabilities of its tags."""
        for window in windows(self, rows, processor, batch):
            found = {row: p for row, p, _, _ in self.said_of(model, window, batch)}
            for number in range(len(window)):
                row, p = window.rows[number], found[number]
                if not p.isfinite().all():
                    raise ValueError(f"the model's output for {row['text']!r:.60} is not finite: open it in float32")
                tags = self._likeliest(p)
                yield {"entities": [self._entity(row, p, span) for span in self.scheme().spans(tags)]}

    def _likeliest(self, p: torch.Tensor) -> list[str]:
        """The tag of each token; O where no tag has a probability."""
        return [
            self.names[n] if has else OUTSIDE for n, has in zip(p.argmax(1).tolist(), p.any(1).tolist(), strict=True)
        ]

    def _entity(self, row: Mapping[str, Any], p: torch.Tensor, span: tuple[str, int, int]) -> dict[str, Any]:
        label, first, behind = span
        start, end = row["starts"][first], row["starts"][behind - 1] + len(row["tokens"][behind - 1])
        score = float(p[first:behind].max(1).values.mean())
        return {"label": label, "start": start, "end": end, "text": row["text"][start:end], "score": score}
