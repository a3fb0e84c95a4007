"""Causal language modelling: prompts to completions, conversations, plain texts."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from ...core.ranges import Count, Natural
from ...observe.listen import moved
from ..data.conversation import Message, rendered, tokens
from ..stages import advanced
from .format import (
    Chat,
    Format,
    Plain,
    begin_ids,
    end_ids,
    ids_of,
    unknown_marks,
)
from .generation import Sampling, room_after, write
from .labelled import ALL, Head, seen, told
from .language_rows import LanguageRows
from .lending import evaluating
from .limits import END, NOTHING, UNLIMITED, Cuts
from .outputs import head_of
from .packing import Flat, Packer, check_apart, flattens, longest, next_tokens, probed
from .rouge import agreement, compared
from .shown import IGNORED
from .step import Step, apart_in_one_pass, packed
from .task import (
    WINDOW,
    Example,
    Examples,
    Task,
    Traced,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LENGTH = 2048  # tokens of a row where neither the task nor the model says less
WRITTEN = 256  # tokens that a prompt is continued by at most, where nothing tells how long completions are


@Task.register
@dataclass(frozen=True)
class CausalLM(LanguageRows):
    """Next tokens.  Rows are one of

    - pairs of a prompt and its completion; a `context` (Dolly's, Alpaca's `input`) follows the prompt;
    - conversations, `messages` of {role, content} or ShareGPT's {from, value}: the assistant's turns are learned;
    - plain texts, all of which is learned,

    by the columns that there are.  Loss and perplexity per learned token; for the first `generate` rows ROUGE-1, -2 and
    -L (F, 0 to 1) of greedy generations of the (last) completion, and the share that is the completion to the letter.

    form: one of `forms`, where the columns allow several; format None: `Chat` where the tokenizer has a template, else
    `Plain`.
    max_length, max_completion: tokens of the prompt (a longer text is cut at its end) and of the completion with its
    end token.  None: together 2048, or what the model has positions for; the prompt gives way first, down to a half.
    packing: several rows of a batch in one, each attending to itself alone (see `packing.Packer`): the same loss
    without the padding.
    What is cut is told.  A completion that is cut has no end token: it does not end there.
    """

    peft = "CAUSAL_LM"
    pipeline = "text-generation"
    headline = "loss"
    has_head = False
    more_is_better = False

    prompt: str | None = None
    completion: str | None = None
    format: Format | None = None
    max_length: Count | None = None
    max_completion: Count | None = None
    generate: Natural = 32
    context: str | None = None
    messages: str | None = None
    text: str | None = None

    form: str | None = None
    packing: bool = False

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        return cls() if head_of(config, "ForCausalLM") or head_of(config, "LMHeadModel") else None

    def encode(self) -> dict[str, Any]:
        """As JSON values; what came later only where it is said."""
        newer = ("context", "messages", "text", "form", "packing")
        return {k: v for k, v in super().encode().items() if k not in newer or v not in (None, False)}

    def asked_ids(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, new: int, cuts: Cuts | None = None
    ) -> list[int]:
        """The tokens of a row that is to be gone on with, {prompt}, {messages} or {text}, as in training; a prompt that
        leaves less than half of the model's places, and not `new`, is cut at its end, and counted in `cuts`.  Raises
        ValueError for another row that leaves no place."""
        if row.get("messages") is not None:
            ids = ids_of(rendered(self._talk(row["messages"]), tokenizer, generate=True), tokenizer)
        elif row.get("text") is not None:
            ids = begin_ids(tokenizer) + ids_of(row["text"], tokenizer)
        else:
            whole = min(tokenizer.model_max_length, UNLIMITED)
            ids = self.prompt_ids(row["prompt"], tokenizer, max(1, whole // 2, whole - new))
            form = self.format or (Chat() if tokenizer.chat_template else Plain())
            had = len(ids_of(form(row["prompt"], tokenizer), tokenizer))
            if cuts is not None and len(ids) < had:
                cuts.add("the prompt is cut at the end of its text", had, len(ids))
        room_after(len(ids), tokenizer)
        return ids

    def answers(
        self,
        model: PreTrainedModel,
        rows: Iterable[Mapping[str, Any]],
        processor: PreTrainedTokenizerBase,
        batch: int,
        sampling: Sampling | None = None,
    ) -> Iterator[dict[str, Any]]:
        """{text, ended: whether it ended by itself}; sampling None: the likeliest tokens, `max_completion` of them at
        most (None: 256)."""
        how = Sampling(self.max_completion or WRITTEN) if sampling is None else sampling
        cuts, count, left = Cuts(), 0, iter(rows)
        while window := list(itertools.islice(left, WINDOW * batch)):
            ids = [self.asked_ids(row, processor, how.max_new_tokens, cuts) for row in window]
            for made in write(model, ids, processor, batch, how, count):
                yield {"text": made.text.strip(), "ended": made.ended}
            count += len(window)
        for note in cuts.told(count, "given"):
            logging.getLogger("undula.train").warning(note)

    def _talk(self, messages: Sequence[Message]) -> Sequence[Message]:
        return self.format.begun(messages) if isinstance(self.format, Chat) else messages

    def processor(self, path: str) -> PreTrainedTokenizerBase:
        """The tokenizer, with this format's template where it has one."""
        own = super().processor(path)
        if isinstance(self.format, Chat) and self.format.template:
            own.chat_template = self.format.template
        return own

    def fits(self, examples: Examples, model: PreTrainedModel, name: str) -> list[str]:
        notes = super().fits(examples, model, name)
        if self.packing and name == "train":
            first = [examples[i] for i in range(min(3, len(examples)))]
            check_apart(model, examples.processor.pad_token_id, first)
        strange = unknown_marks(self.format, examples.processor) if name == "train" else []
        if strange:
            notes.append(
                f"the template writes {', '.join(strange)}, which this tokenizer has no tokens of its own for: they "
                "are read as ordinary text, several tokens each"
            )
        return notes

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM as Auto

        return Auto.from_pretrained(path, dtype=dtype, **quantised)

    def prompt_ids(self, text: str, tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> list[int]:
        """The tokens up to where the completion begins, at most `max_length` (or `most`): what is cut is the text, not
        what the format puts around it."""
        most = self.max_length or most or room(tokenizer)
        form = self.format or (Chat() if tokenizer.chat_template else Plain())
        ids = ids_of(form(text, tokenizer), tokenizer)
        if len(ids) <= most:
            return ids
        left = most - len(ids_of(form("", tokenizer), tokenizer))
        if left < 1:
            raise ValueError(f"max_length={most} leaves no room for a text: the format alone is that long")
        cut = str(tokenizer.decode(ids_of(text, tokenizer)[:left]))
        return ids_of(form(cut, tokenizer), tokenizer)

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        return self.traced(row, tokenizer)[0]

    def traced(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Traced:
        if row.get("completion") is not None:
            return self._pair(row, tokenizer)
        if row.get("messages") is not None:
            ids, learned = tokens(self._talk(row["messages"]), tokenizer)
            what = "the conversation is cut"
        else:
            begin = begin_ids(tokenizer)
            ids = begin + ids_of(row["text"], tokenizer) + end_ids(tokenizer)
            learned, what = [at >= len(begin) for at in range(len(ids))], "the text is cut"
        limit, had, lost = self.max_length or room(tokenizer), len(ids), {}
        if had > limit:
            ids, learned = ids[:limit], learned[:limit]
            lost[f"{what} at its end, {END}"] = had, limit
        if not any(learned[1:]):
            lost[NOTHING] = had, len(ids)
        return _example(ids, learned), lost

    def _pair(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Traced:
        """Prompt and completion: who of the two gives way, see the class."""
        whole, lost = room(tokenizer), {}
        form = self.format or (Chat() if tokenizer.chat_template else Plain())
        asked = len(ids_of(form(row["prompt"], tokenizer), tokenizer))
        completion = ids_of(row["completion"], tokenizer) + end_ids(tokenizer)
        most = self.max_completion or max(1, whole - min(asked, self.max_length or whole // 2))
        if len(completion) > most:
            lost[f"the completion is cut at its end, {END}"] = len(completion), most
            completion = completion[:most]
        prompt = self.prompt_ids(row["prompt"], tokenizer, max(1, whole - len(completion)))
        if len(prompt) < asked:
            lost["the prompt is cut at the end of its text"] = asked, len(prompt)
        return _example(prompt + completion, [False] * len(prompt) + [True] * len(completion)), lost

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def gatherer(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        return self._packer(tokenizer, model) if self.packing else self.collator(tokenizer)

    def _packer(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Packer:
        return Packer(tokenizer.pad_token_id, flattens(model))

    def step(self, examples: Examples, model: PreTrainedModel) -> Step:
        head, tokenizer = self._head(examples, model), examples.processor
        if flattens(model):  # it tells rows apart by itself
            return Step(head=head)
        rows = probed(longest(examples))
        labels = next_tokens if head is None else lambda rows: told(next_tokens(rows))
        flat = Flat(labels, more={"use_cache": False})
        step = packed(model, [flat], self.collator(tokenizer), apart_in_one_pass, [*rows, rows[0]])
        return replace(step, head=head)

    def _head(self, examples: Examples, model: PreTrainedModel) -> Head | None:
        """How the model's head is asked for what is learned alone; None where it is for all tokens or none."""
        short = probed(longest(examples))
        return seen(model, moved(self.collator(examples.processor)(short), model.device))

    def items(self, batch: Mapping[str, torch.Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        loss = self.choose(model, examples, batch)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **self.written(model, examples, batch)}

    @torch.no_grad()
    def choose(self, model: PreTrainedModel, examples: Examples, batch: int) -> float:
        """The loss alone: nothing is generated.  Raises ValueError for rows that have none."""
        total, count = 0.0, 0
        with evaluating(model):
            head, collate = self._head(examples, model) or Head(ALL), self.collator(examples.processor)
            for numbers, made in self.batches(examples, batch):
                inputs = moved(collate(made), model.device)
                if items := self.items(inputs):
                    total, count = total + float(head.losses(model, inputs).sum()), count + items
                advanced(len(numbers))
        if not count:
            raise ValueError(f"no token of these {len(examples)} rows is learned, so there is no loss to measure")
        return total / count

    def written(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        """Greedy generations against the completions, for the first `generate` rows: mean ROUGE F, exact matches.  Of
        plain texts there are none."""
        if self.generate < 1 or "text" in examples.rows.column_names:
            return {}
        rows, tokenizer = examples.rows.select(range(min(self.generate, len(examples.rows)))), examples.processor
        if "messages" in rows.column_names:
            told = [str(messages[-2]["content"]) if len(messages) > 1 else "" for messages in rows["messages"]]
            asked = [self._talk(messages[:-1]) for messages in rows["messages"]]
            wanted = [messages[-1]["content"] for messages in rows["messages"]]
            ids = [ids_of(rendered(m, tokenizer, generate=True), tokenizer) for m in asked]
        else:
            told, wanted = rows["prompt"][:], rows["completion"][:]
            ids = [self.prompt_ids(text, tokenizer) for text in rows["prompt"]]
        longest = max(len(ids_of(text, tokenizer)) for text in wanted) + 1
        found = self._written(model, ids, tokenizer, batch, self.max_completion or longest + longest // 2)
        examples.seen["written"] = compared(told, wanted, found)
        return agreement(wanted, found)

    def write(
        self, model: PreTrainedModel, prompts: list[str], tokenizer: PreTrainedTokenizerBase, batch: int
    ) -> list[str]:
        """Greedy completions of the prompts, at most `max_completion` tokens each (None: 256), whatever the model's
        generation_config says of beams, penalties and sampling."""
        ids = [self.prompt_ids(text, tokenizer) for text in prompts]
        return self._written(model, ids, tokenizer, batch, self.max_completion or WRITTEN)

    def _written(
        self, model: PreTrainedModel, ids: list[list[int]], tokenizer: PreTrainedTokenizerBase, batch: int, most: int
    ) -> list[str]:
        whole = max(2, min(tokenizer.model_max_length, UNLIMITED))
        ids = [i[-(whole - 1) :] for i in ids]  # a place for one token at least
        return [made.text.strip() for made in write(model, ids, tokenizer, batch, Sampling(most))]


def room(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a row may have where the task does not say: `padding` writes what the model takes."""
    return max(2, min(LENGTH, tokenizer.model_max_length))


def _example(ids: list[int], learned: list[bool]) -> Example:
    labels = [token if own else IGNORED for token, own in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
