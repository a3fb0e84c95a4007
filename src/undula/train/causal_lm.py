"""Causal language modelling: a prompt to its completion, the loss on the completion alone."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..choice import Choice
from .data import texts
from .task import Example, Examples, Task, outputs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # a label that the loss leaves out


class Format(Choice):
    """How a prompt is put to the model."""

    @abc.abstractmethod
    def __call__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """Everything up to where the completion begins, special tokens included."""


@Format.register
@dataclass(frozen=True)
class Chat(Format):
    """The tokenizer's chat template: one message of the user, then the assistant's turn."""

    instruction: str = ""  # goes before the text

    def __call__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        if not tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template: use Plain(), or --task-set format=plain")
        turn = [{"role": "user", "content": self.instruction + text}]
        return str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))


@Format.register
@dataclass(frozen=True)
class Plain(Format):
    """instruction + text + between, after the tokenizer's own beginning token if it has one."""

    instruction: str = ""
    between: str = "\n"

    def __call__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        begin = tokenizer.bos_token if getattr(tokenizer, "add_bos_token", False) else ""
        return f"{begin or ''}{self.instruction}{text}{self.between}"


@Task.register
@dataclass(frozen=True)
class CausalLM(Task):
    """Prompt to completion: loss and perplexity per token of the completion; for the first `generate` rows ROUGE-1, -2
    and -L (F, 0 to 1) of greedy generations, and the share that is the completion to the letter.

    format None: `Chat` where the tokenizer has a template, else `Plain`.
    """

    roles: ClassVar = {"prompt": ("prompt", "text", "instruction"), "completion": ("completion", "summary", "response")}
    peft = "CAUSAL_LM"
    headline = "loss"
    has_head = False
    more_is_better = False

    prompt: str | None = None
    completion: str | None = None
    format: Format | None = None
    max_length: int = 256  # tokens of the prompt: a longer text is cut at its end
    max_completion: int = 64  # tokens of the completion, its end token included
    generate: int = 32

    def rows(self, split: Dataset) -> Dataset:
        from datasets import Dataset

        columns = self.columns(split.column_names)
        return Dataset.from_dict({role: texts(split, column) for role, column in columns.items()})

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM as Auto

        return Auto.from_pretrained(path, dtype=dtype, **quantised)

    def prompt_ids(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens up to where the completion begins, at most `max_length`: what is cut is the text, not what the
        format puts around it."""
        form = self.format or (Chat() if tokenizer.chat_template else Plain())
        ids = _ids(form(text, tokenizer), tokenizer)
        if len(ids) <= self.max_length:
            return ids
        room = self.max_length - len(_ids(form("", tokenizer), tokenizer))
        if room < 1:
            raise ValueError(f"max_length={self.max_length} leaves no room for a text: the format alone is that long")
        cut = str(tokenizer.decode(_ids(text, tokenizer)[:room]))
        return _ids(form(cut, tokenizer), tokenizer)

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        prompt = self.prompt_ids(row["prompt"], tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        completion = (_ids(row["completion"], tokenizer) + end)[: self.max_completion]
        ids = prompt + completion
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORED] * len(prompt) + completion,
        }

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        loss = self.choose(model, examples, batch)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **self.written(model, examples, batch)}

    def choose(self, model: PreTrainedModel, examples: Examples, batch: int) -> float:
        """The loss alone: nothing is generated."""
        total, count = 0.0, 0
        for _, inputs, logits in outputs(model, examples, batch):
            labels = inputs["labels"][:, 1:]
            kept = labels != IGNORED
            own = logits[:, :-1][kept].float()
            total += float(torch.nn.functional.cross_entropy(own, labels[kept], reduction="sum"))
            count += int(kept.sum())
        return total / count

    def written(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        """Greedy generations against the completions, for the first `generate` rows: mean ROUGE F, exact matches."""
        if self.generate < 1:
            return {}
        from rouge_score.rouge_scorer import RougeScorer

        rows = examples.rows.select(range(min(self.generate, len(examples.rows))))
        wanted, found = rows["completion"][:], self.write(model, rows["prompt"][:], examples.processor, batch)
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        scores = [scorer.score(want, text) for want, text in zip(wanted, found, strict=True)]
        rouge = {k: sum(s[k].fmeasure for s in scores) / len(scores) for k in ("rouge1", "rouge2", "rougeL")}
        same = sum(want.strip() == text for want, text in zip(wanted, found, strict=True))
        return rouge | {"exact_match": same / len(found)}

    @torch.no_grad()
    def write(
        self, model: PreTrainedModel, prompts: list[str], tokenizer: PreTrainedTokenizerBase, batch: int
    ) -> list[str]:
        """Greedy completions of the prompts, at most `max_completion` tokens each."""
        ids = [self.prompt_ids(text, tokenizer) for text in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        written = [""] * len(ids)
        training = model.training
        model.eval()
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in numbers]}, padding_side="left", return_tensors="pt")
            made = model.generate(  # type: ignore[operator]
                **inputs.to(model.device),
                max_new_tokens=self.max_completion,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = made[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(numbers, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                written[i] = text.strip()
        model.train(training)
        return written


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
