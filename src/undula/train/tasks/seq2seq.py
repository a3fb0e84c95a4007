"""Sequence to sequence: a text to another, by a model with an encoder and a decoder (T5, BART, Marian ...)."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from ...core.ranges import Count, Natural
from ..data.columns import texts
from ..data.faults import Faults
from .answering import outputs
from .causal_lm import IGNORED, LENGTH, WRITTEN
from .decoders import greedy, settle_start, with_decoder_inputs
from .limits import Cuts, padding, vocabulary
from .rouge import agreement, compared
from .shown import Piece, pieces, text_of
from .task import (
    WINDOW,
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
class Seq2Seq(Task):
    """Text to text: loss and perplexity per token of the target; for the first `generate` rows ROUGE-1, -2 and -L (F, 0
    to 1) of greedy generations, and the share that is the target to the letter.

    `prefix` stands before every source, as T5's "summarize: ".  max_length, max_target: tokens of the source and of the
    target with its end token (None: 2048, or what model and tokenizer are made for).  What is cut is told; a target
    that is cut has no end token.
    """

    roles: ClassVar = {
        "source": ("source", "text", "document", "input", "question", "article"),
        "target": ("target", "summary", "output", "answer", "translation"),
    }
    targets = ("target",)
    peft = "SEQ_2_SEQ_LM"
    pipeline = "text2text-generation"
    headline = "loss"
    has_head = False
    mean_loss = True
    more_is_better = False

    source: str | None = None
    target: str | None = None
    prefix: str = ""
    max_length: Count | None = None
    max_target: Count | None = None
    generate: Natural = 32

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as KNOWN

        kinds = set(getattr(config, "architectures", None) or ())
        return cls() if kinds & set(KNOWN.values()) else None

    def check(self, split: Dataset, faults: Faults) -> None:
        for column in self.columns(split.column_names, faults).values():
            texts(split, column, faults)

    def rows(self, split: Dataset) -> Dataset:
        from datasets import Dataset

        faults, columns = Faults(), self.columns(split.column_names)
        made = {role: texts(split, column, faults) for role, column in columns.items()}
        faults.check()
        return Dataset.from_dict(made)

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        from datasets import Dataset

        columns = self.inputs(split.column_names, faults)
        return Dataset.from_dict({role: texts(split, column, faults) for role, column in columns.items()})

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        from transformers import AutoModelForSeq2SeqLM as Auto

        return Auto.from_pretrained(path, dtype=dtype, **quantised)

    def agree(self, processor: Processor, model: PreTrainedModel) -> None:
        padding(processor, model)
        settle_start(processor, model)

    def _source(self, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, dict[str, tuple[int, int]]]:
        encoded = tokenizer(self.prefix + text, verbose=False)
        had, limit = len(encoded["input_ids"]), self.max_length or room(tokenizer)
        if had <= limit:
            return dict(encoded), {}
        cut = tokenizer(self.prefix + text, truncation=True, max_length=limit)
        return dict(cut), {"the source is cut at its end": (had, limit)}

    def _target(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        ids = list(tokenizer(text_target=text, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        return self.traced(row, tokenizer)[0]

    def traced(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Traced:
        example, lost = self._source(row["source"], tokenizer)
        labels, limit = self._target(row["target"], tokenizer), self.max_target or room(tokenizer)
        if len(labels) > limit:
            lost["the target is cut at its end, its end token included"] = len(labels), limit
        return {**example, "labels": labels[:limit]}, lost

    def shown(self, row: Mapping[str, Any], processor: Processor) -> list[Piece]:
        example = self.example(row, processor)
        return pieces(example, processor, text_of(example["labels"], processor))

    def fits(self, examples: Examples, model: PreTrainedModel, name: str) -> list[str]:
        found = super().fits(examples, model, name)
        size = vocabulary(model)
        largest = max(token for text in examples.rows["target"] for token in self._target(text, examples.processor))
        if size is not None and largest >= size:
            raise ValueError(
                f"{name} targets hold the id {largest}, but the model's embedding has {size} rows (ids 0 to "
                f"{size - 1}): take the tokenizer that belongs to the model, or resize the model's embedding"
            )
        return found

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        from transformers import DataCollatorForSeq2Seq

        padded = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        return lambda examples: with_decoder_inputs(padded(examples), tokenizer)

    def items(self, batch: Mapping[str, torch.Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        loss = self.choose(model, examples, batch)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **self.written(model, examples, batch)}

    def choose(self, model: PreTrainedModel, examples: Examples, batch: int) -> float:
        """The loss alone: nothing is generated."""
        total, count = 0.0, 0
        for _, inputs, logits in outputs(model, examples, batch, labels=True):
            kept = inputs["labels"] != IGNORED
            own = logits[kept].float()
            total += float(torch.nn.functional.cross_entropy(own, inputs["labels"][kept], reduction="sum"))
            count += int(kept.sum())
        return total / max(count, 1)

    def written(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        """Greedy generations against the targets of the first `generate` rows."""
        if self.generate < 1:
            return {}
        rows, tokenizer = examples.rows.select(range(min(self.generate, len(examples.rows)))), examples.processor
        longest = max(len(self._target(text, tokenizer)) for text in rows["target"])
        most = self.max_target or longest + longest // 2 + 1
        found = self.write(model, rows["source"][:], tokenizer, batch, most)
        examples.seen["written"] = compared(rows["source"][:], rows["target"][:], found)
        return agreement(rows["target"][:], found)

    def write(
        self, model: PreTrainedModel, sources: list[str], tokenizer: PreTrainedTokenizerBase, batch: int, most: int,
        cuts: Cuts | None = None,
    ) -> list[str]:  # fmt: skip
        """What the model makes of the sources, greedily, `most` tokens each at most; what is cut is added to `cuts`."""
        cuts = Cuts() if cuts is None else cuts
        made, found = [], [""] * len(sources)
        for text in sources:
            example, lost = self._source(text, tokenizer)
            for what, (had, kept) in lost.items():
                cuts.add(what, had, kept)
            made.append({k: example[k] for k in ("input_ids", "attention_mask")})
        order = sorted(range(len(made)), key=lambda i: len(made[i]["input_ids"]))
        most = min(most, room(tokenizer) - 1)
        with greedy(model):
            for start in range(0, len(order), batch):
                numbers = order[start : start + batch]
                inputs = tokenizer.pad([made[i] for i in numbers], return_tensors="pt").to(model.device)
                ids = model.generate(**inputs, max_new_tokens=most)  # type: ignore[operator]
                for i, text in zip(numbers, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                    found[i] = text.strip()
        return found

    def answers(
        self, model: PreTrainedModel, rows: Iterable[Mapping[str, Any]], processor: Processor, batch: int
    ) -> Iterator[dict[str, Any]]:
        """{text}: the likeliest tokens, `max_target` of them at most (None: 256)."""
        cuts, count, left = Cuts(), 0, iter(rows)
        while window := [row["source"] for row in itertools.islice(left, WINDOW * batch)]:
            for text in self.write(model, window, processor, batch, self.max_target or WRITTEN, cuts):
                yield {"text": text}
            count += len(window)
        for note in cuts.told(count, "given"):
            logging.getLogger("undula.train").warning(note)


def room(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a text may have where the task does not say."""
    return max(2, min(LENGTH, tokenizer.model_max_length))
