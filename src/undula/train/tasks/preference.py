"""Preference: of two answers to a prompt the chosen one is to be likelier than the rejected one (DPO)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import logsigmoid

from ...core.ranges import Natural, PartShare, Positive
from ...host.reference import alone
from ...observe.listen import moved
from ...observe.probe import Loss
from ..data.conversation import answered
from ..data.faults import Faults
from ..data.preference_rows import preferences
from .causal_lm import CausalLM, room
from .format import Chat, Plain, begin_ids, end_ids, ids_of
from .lending import evaluating
from .limits import END
from .shown import Piece, text_of
from .step import Step
from .task import Example, Examples, Task, Traced

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

LOSSES = (  # of TRL
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
ELSEWHERE = ("completion", "context", "messages", "text", "form")  # fields of CausalLM that say nothing here


@Task.register
@dataclass(frozen=True)
class Preference(CausalLM):
    """Direct preference optimisation by TRL's DPOTrainer (Rafailov et al. 2023, arXiv:2305.18290).

    With the margin m = beta [(log p(y+|x) - log q(y+|x)) - (log p(y-|x) - log q(y-|x))], where p is the model, q the
    base with the adapter off, y+ the chosen answer and y- the rejected one, the loss is -log sigmoid(m), or what
    `loss_type` names among TRL's.  Metrics of the validation rows: this loss (whatever is trained), the mean margin,
    and the share of rows whose margin is above 0 (one of 0, as before any training, counts half).

    Rows: chosen and rejected, texts or conversations (lists of messages); with a prompt, a text or messages; or without
    one: then it is what both have in common at their beginning.  A prompt that is a text is put to the model by
    `format`; a beginning in common of two texts as it is.
    """

    roles: ClassVar = {
        "prompt": ("prompt", "instruction", "question"),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
    }
    optional = ("prompt",)
    targets = ("chosen", "rejected")
    headline = "accuracy"
    more_is_better = True
    mean_loss = True

    generate: Natural = 0
    chosen: str | None = None
    rejected: str | None = None
    beta: Positive = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: PartShare | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            raise LookupError(f"no loss of preferences is called {self.loss_type!r}; there are: {', '.join(LOSSES)}")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type=exo_pair needs label_smoothing, such as 1e-3")
        idle = [name for name in ELSEWHERE if getattr(self, name) is not None]
        idle += [name for name in ("generate", "packing") if getattr(self, name)]
        if idle:
            raise ValueError(f"{', '.join(idle)} would do nothing: preference rows have prompt, chosen, rejected")

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> None:
        return None

    def _writer(self) -> CausalLM:
        return CausalLM(prompt=self.prompt, format=self.format)

    def inputs(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        return self._writer().inputs(there, faults)

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        return self._writer().asked(split, faults)

    def columns(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        return self._columns(self.roles, there, faults)

    def reads(self, there: Sequence[str]) -> str:
        found = ", ".join(f"{role} is {column!r}" for role, column in self.columns(there).items())
        return found if "prompt" in self.columns(there) else f"{found}; the prompt is what both begin with"

    def check(self, split: Dataset, faults: Faults) -> None:
        columns = self.columns(split.column_names, faults)
        if {"chosen", "rejected"} <= set(columns):
            preferences(split, columns, faults)

    def rows(self, split: Dataset) -> Dataset:
        from datasets import Dataset

        faults = Faults()
        made = preferences(split, self.columns(split.column_names), faults)
        faults.check()
        return Dataset.from_dict(made)

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        return self.traced(row, tokenizer)[0]

    def traced(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Traced:
        """{prompt_ids, chosen_ids, rejected_ids}, and as `input_ids` the longer of the two rows.  Who gives way is as
        in `CausalLM`; of conversations and of beginnings in common what is cut of the prompt is its beginning."""
        whole, lost, text = room(tokenizer), dict[str, tuple[int, int]](), row.get("prompt")
        ends = [ids_of(row[name], tokenizer) + end_ids(tokenizer) for name in self.targets]
        if row.get("messages") is not None:
            both = [answered(self._talk(row["messages"]), row[name], tokenizer) for name in self.targets]
            prompt, ends = both[0][0], [ids for _, ids in both]
        elif text is not None:
            form = self.format or (Chat() if tokenizer.chat_template else Plain())
            prompt = ids_of(form(text, tokenizer), tokenizer)
        else:
            prompt = begin_ids(tokenizer) + ids_of(row["text"], tokenizer)
        had, longest = len(prompt), max(map(len, ends))
        most = self.max_completion or max(1, whole - min(had, self.max_length or whole // 2))
        if longest > most:
            lost[f"an answer is cut at its end, {END}"] = longest, most
            ends = [ids[:most] for ids in ends]
        left = self.max_length or max(1, whole - min(longest, most))
        if had > left:
            prompt = prompt[-left:] if text is None else self.prompt_ids(text, tokenizer, left)
            lost[f"the prompt is cut at {'its beginning' if text is None else 'the end of its text'}"] = had, left
        chosen, rejected = ends
        example = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        return {**example, "input_ids": prompt + max(ends, key=len)}, lost

    def shown(self, row: Mapping[str, Any], processor: PreTrainedTokenizerBase) -> list[Piece]:
        made = self.example(row, processor)
        prompt, chosen, rejected = (text_of(made[f"{name}_ids"], processor) for name in ("prompt", *self.targets))
        return [(prompt, False), (chosen, True), (" rather than ", False), (rejected, True)]

    def step(self, examples: Examples, model: PreTrainedModel) -> Step:
        return Step()  # TRL's own

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        """TRL's: {input_ids, attention_mask, completion_mask} of 2 N rows, first the chosen, then the rejected."""
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        return DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)

    def items(self, batch: Mapping[str, torch.Tensor]) -> int:
        return len(batch["input_ids"]) // 2

    def loss(self) -> Loss:
        """-log sigmoid of the margin, the mean over the rows."""
        return lambda model, batch: -logsigmoid(self.margins(model, batch)).mean()

    def margins(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """m of each row, see the class: (N)."""
        own = log_probabilities(model, batch)
        with torch.no_grad(), alone(model):
            base = log_probabilities(model, batch)
        better, worse = (own - base).chunk(2)
        return self.beta * (better - worse)

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        found = torch.cat(list(self._margins(model, examples, batch)))
        return {
            "loss": float(-logsigmoid(found).mean()),
            "accuracy": float((found > 0).double().mean() + (found == 0).double().mean() / 2),
            "margin": float(found.mean()),
        }

    def choose(self, model: PreTrainedModel, examples: Examples, batch: int) -> float:
        return self.score(model, examples, batch)[self.headline]

    def watched(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        return self.score(model, examples, batch)  # nothing is generated: all of it takes the same two passes

    @torch.no_grad()
    def _margins(self, model: PreTrainedModel, examples: Examples, batch: int) -> Iterator[torch.Tensor]:
        collate = self.collator(examples.processor)
        with evaluating(model):
            for _, made in self.batches(examples, batch):
                yield self.margins(model, moved(collate(made), model.device)).float().cpu()

    def arguments(self, **settings: Any) -> TrainingArguments:
        from trl import DPOConfig

        from ..trainer import checkpointing

        own = {"beta": self.beta, "loss_type": [self.loss_type], "label_smoothing": self.label_smoothing or 0.0}
        plain = {**checkpointing(False), "bf16": False}  # TRL's are on where nothing is said
        # the trainer brings what the base says of each batch, so TRL needs no second model
        return DPOConfig(**plain | settings | own, max_length=None, precompute_ref_log_probs=True)

    def fitter(self) -> Callable[..., Any]:
        from .preference_trainer import preference_trainer

        return preference_trainer


def log_probabilities(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """log p of each row's answer, the sum over its tokens: (2 N)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    found = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (found * batch["completion_mask"][:, 1:]).sum(-1)
