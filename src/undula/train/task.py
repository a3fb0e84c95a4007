"""Tasks: how rows become examples, which head the model gets, and what is measured.

One more task is one more class: registered, a frozen dataclass, its fields the columns and options that a user sets.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from ..choice import Choice

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Example = dict[str, Any]
Processor = Any  # what comes with a pretrained model and makes its inputs: a tokenizer, an image processor


class Task(Choice):
    """What is learned.  `roles` maps each field that names a column to the names it has by default, in order."""

    roles: ClassVar[Mapping[str, tuple[str, ...]]]
    optional: ClassVar[tuple[str, ...]] = ()  # roles that may have no column
    peft: ClassVar[str | None]  # PEFT's task type, written into the adapter directory; None where PEFT has none
    headline: ClassVar[str]  # the metric of tables
    more_is_better: ClassVar[bool] = True
    has_head: ClassVar[bool] = True  # whether the model gets a new head, which trains in full

    def fitted(self, train: Dataset) -> Self:
        """This task with what the training rows tell it (the names of the classes)."""
        return self

    @abc.abstractmethod
    def rows(self, split: Dataset) -> Dataset:
        """The rows with one column per role.  Raises LookupError for missing columns, ValueError for bad values."""

    def splits(self, data: DatasetDict, *names: str) -> DatasetDict:
        """Those of the named splits that there are, checked and with one column per role."""
        from datasets import DatasetDict

        return DatasetDict({name: self.rows(data[name]) for name in names if name in data})

    @abc.abstractmethod
    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        """The pretrained model with this task's head; a new head follows `torch.manual_seed`.  `quantised` is empty, or
        the quantization_config that `from_pretrained` takes."""

    def processor(self, path: str) -> Processor:
        """What came with the pretrained model to make its inputs: its tokenizer, where a task says nothing else."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path)

    def agree(self, processor: Processor, model: PreTrainedModel) -> None:
        """Settles what the two must have in common: for a tokenizer the token to pad with."""
        padding(processor, model)

    @abc.abstractmethod
    def example(self, row: Mapping[str, Any], processor: Processor, /) -> Example:
        """One row as the model's inputs, `labels` included, not padded."""

    @abc.abstractmethod
    def collator(self, processor: Processor, /) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        """Puts examples into a padded batch."""

    def batches(self, examples: Examples, size: int) -> Iterator[tuple[list[int], list[Example]]]:
        """(numbers of the rows, the rows as examples) until all have come; rows of like length come together."""
        made = [examples[i] for i in range(len(examples))]
        order = sorted(range(len(made)), key=lambda i: -len(made[i]["input_ids"]))
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            yield numbers, [made[i] for i in numbers]

    @abc.abstractmethod
    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        """The metrics on these examples."""

    def choose(self, model: PreTrainedModel, examples: Examples, batch: int) -> float:
        """The headline metric alone: what a learning rate and a point of the training are chosen by."""
        return self.score(model, examples, batch)[self.headline]

    def head(self, model: PreTrainedModel) -> tuple[str, ...]:
        """The parameters that train in full: all that stand outside the model's body; none for a language model."""
        return ()

    def columns(self, there: Sequence[str]) -> dict[str, str]:
        """{role: column}.  Raises LookupError that lists the columns that exist."""
        return {role: column for role in self.roles if (column := self._column(role, there)) is not None}

    def _column(self, role: str, there: Sequence[str]) -> str | None:
        named = getattr(self, role)
        for column in self.roles[role] if named is None else (named,):
            if column in there:
                return column
        if named is None and role in self.optional:
            return None
        asked = f"no column {named!r}" if named else f"no column for {role} (looked for {', '.join(self.roles[role])})"
        raise LookupError(
            f"the data have {asked}; their columns are: {', '.join(there)}. "
            f"Name it: {type(self).__name__}({role}=...), or --column {role}=..."
        )


@dataclass(frozen=True)
class Examples:
    """Rows as a torch data set: each becomes an example when it is asked for."""

    task: Task
    rows: Dataset
    processor: Processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        return self.task.example(self.rows[i], self.processor)


def padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Sees to it that tokenizer and model agree on a token to pad with (decoders often come without one)."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def outputs(
    model: PreTrainedModel, examples: Examples, batch: int
) -> Iterator[tuple[list[int], Mapping[str, torch.Tensor], torch.Tensor]]:
    """(numbers of the rows, inputs, logits) of every batch in evaluation mode, in the order of `Task.batches`."""
    collate = examples.task.collator(examples.processor)
    training = model.training
    model.eval()
    try:
        for numbers, made in examples.task.batches(examples, batch):
            inputs = {k: v.to(model.device) for k, v in collate(made).items()}
            given = {k: v for k, v in inputs.items() if k != "labels"}
            yield numbers, inputs, model(**given).logits
    finally:
        model.train(training)
