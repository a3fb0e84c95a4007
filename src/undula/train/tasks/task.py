"""Tasks: how rows become examples, which head the model gets, and what is measured.

One more task is one more class: registered, a frozen dataclass, its fields the columns and options that a user sets.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from ...core.choice import Choice
from ...observe.probe import Loss, loss_of
from ..data.columns import named_columns
from ..data.faults import Faults
from ..data.load import split_of
from ..data.source import named, sound, source_of
from .limits import fits, padding
from .made import Made
from .shown import Piece, pieces
from .step import Step

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

Example = dict[str, Any]
Traced = tuple[Example, dict[str, tuple[int, int]]]  # and what was cut: {what: (tokens that there were, that are kept)}
WINDOW = 64  # batches of rows without labels that are in memory at once, and sorted by their length
Processor = Any  # what comes with a pretrained model and makes its inputs: a tokenizer, an image processor


class Task(Choice):
    """What is learned.  `roles` maps each field that names a column to the names it has by default, in order."""

    roles: ClassVar[Mapping[str, tuple[str, ...]]]
    optional: ClassVar[tuple[str, ...]] = ()  # roles that may have no column
    peft: ClassVar[str | None]  # PEFT's task type, written into the adapter directory; None where PEFT has none
    probable: ClassVar[bool] = True  # that a softmax over its outputs tells what it answers
    own_loss: ClassVar[bool] = False  # that `loss` is none that the model returns of a batch
    auto: ClassVar[str | None] = None  # the class of transformers that opens its model, where no PEFT type tells it
    pipeline: ClassVar[str | None] = None  # what the hub, and transformers' pipelines, call such a task
    headline: ClassVar[str]  # the metric of tables
    more_is_better: ClassVar[bool] = True
    has_head: ClassVar[bool] = True  # whether the model gets a new head, which trains in full
    targets: ClassVar[tuple[str, ...]] = ("label",)  # the roles of what is learned: rows to answer need none of them
    mean_loss: ClassVar[bool] = False  # that the model's loss is a mean, see `items`; one with a new head is so anyway
    advice = """
Any other task of transformers takes five lines of Python, with a loop or a Trainer of your own:
    model = transformers.AutoModelFor...from_pretrained(MODEL)
    adapter = undula.attach(model, undula.LoRA())
    ...  # train it: adapter.parameters() are what learns, and alone ask for gradients
    adapter.save(OUT)
    undula.merge(model)  # where it is to be an ordinary model again"""

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        """The task that a whole model has been trained for, by its configuration; None where it is not of this kind."""
        return None

    def fitted(self, train: Dataset) -> Self:
        """This task with what the training rows tell it (the names of the classes)."""
        return self

    def check(self, split: Dataset, faults: Faults) -> None:
        """Adds what is wrong with rows, as far as that can be told before the task is fitted."""

    def check_fitted(self, split: Dataset, faults: Faults) -> None:
        """Adds what is wrong with rows that `check` let pass, and that the fitted task alone can tell."""

    @abc.abstractmethod
    def rows(self, split: Dataset) -> Dataset:
        """The rows with one column per role.  Raises LookupError for missing columns, ValueError for bad values, with
        all that is wrong."""

    def splits(self, data: DatasetDict, *names: str, faults: Faults | None = None) -> DatasetDict:
        """Those of the named splits that there are, checked and with one column per role, by this task, which is
        fitted.  Raises as `read` does."""
        found = Faults() if faults is None else faults
        return self._made(self._checked(data, names, found), found)

    def read(self, data: DatasetDict, *names: str, faults: Faults | None = None) -> tuple[Self, DatasetDict]:
        """(this task, fitted to the train split; those of the named splits that there are, see `splits`).

        Raises LookupError or ValueError with all the faults of all these splits, and those that `faults` holds of their
        reading.  Rows that these let go (see `Faults`) are left out, before anything is made of the others.
        """
        found = Faults() if faults is None else faults
        split_of(data, "train")  # refuses data without one
        checked = self._checked(data, ("train", *names), found)
        try:
            task = self.fitted(checked["train"])
        except (LookupError, ValueError) as error:
            found.check()  # of what has faults, classes may be missing
            if not found:
                raise
            found.add(f"{error}, without the rows that are left out")
            raise found.error() from None
        return task, task._made(checked, found)

    def _checked(self, data: DatasetDict, names: Sequence[str], faults: Faults) -> DatasetDict:
        """The splits without the rows that have faults.  Raises where no columns, or no rows, are left to look at."""
        from datasets import DatasetDict

        there = {name: named(data[name], name) for name in dict.fromkeys(names) if name in data}
        for rows in there.values():
            faults.where = source_of(rows).name
            faults.of(faults.where, len(rows))
            self.check(rows, faults)
        kept = {name: sound(rows, faults) for name, rows in there.items()}
        if faults.lookup or any(len(rows) and not len(kept[name]) for name, rows in there.items()):
            raise faults.error()
        return DatasetDict(kept)

    def _made(self, checked: DatasetDict, faults: Faults) -> DatasetDict:
        for rows in checked.values():
            self.check_fitted(rows, faults)
        faults.check()
        return type(checked)({name: self.rows(sound(rows, faults)) for name, rows in checked.items()})

    def notes(self, split: Dataset) -> Iterator[str]:
        """Sentences on what is done with the rows of a split as they were read, for its reader to know."""
        used = set(self.columns(split.column_names).values())
        unused = [c for c in split.column_names if c not in used]
        if unused:
            yield f"columns that are not used: {', '.join(map(repr, unused))[:200]}"

    def figures(self, parts: Mapping[str, Dataset]) -> dict[str, Any]:
        """What the report says of the rows (as `splits` gives them), beside their numbers."""
        return {}

    def told(self, figures: Mapping[str, Any]) -> Iterator[str]:
        """Sentences on those figures."""
        return iter(())

    @abc.abstractmethod
    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        """The pretrained model with this task's head; a new head follows `torch.manual_seed`.  `quantised` is empty, or
        the quantization_config that `from_pretrained` takes."""

    def outline(self, config: PretrainedConfig) -> PreTrainedModel | None:
        """Such a model by its configuration alone; None where a class of transformers (`auto`, `peft`) makes it."""
        return None

    def processor(self, path: str) -> Processor:
        """What came with the pretrained model to make its inputs: its tokenizer, where a task says nothing else."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path)

    def agree(self, processor: Processor, model: PreTrainedModel) -> None:
        """Settles what the two must have in common: for a tokenizer the token to pad with."""
        padding(processor, model)

    def beside(self, model: PreTrainedModel, folder: Path) -> None:
        """Writes into a folder with the whole model what belongs to it besides."""

    @abc.abstractmethod
    def example(self, row: Mapping[str, Any], processor: Processor, /) -> Example:
        """One row as the model's inputs, `labels` included, not padded."""

    def traced(self, row: Mapping[str, Any], processor: Processor, /) -> Traced:
        """`example`, and what of the row is lost in it."""
        return self.example(row, processor), {}

    def fits(self, examples: Examples, model: PreTrainedModel, name: str) -> list[str]:
        """Looks at every row as the model will get it.  Returns sentences on what is cut or left out of them; raises
        ValueError for rows that the model cannot take."""
        return fits(examples, model, name)

    @abc.abstractmethod
    def collator(self, processor: Processor, /) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        """Puts examples into a padded batch."""

    def gatherer(
        self, processor: Processor, model: PreTrainedModel
    ) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        """Puts examples into a batch to train on: as `collator`, or another batch with the same loss."""
        return self.collator(processor)

    def step(self, examples: Examples, model: PreTrainedModel) -> Step:
        """How a step is taken without what it does in vain, its loss and its gradients the same but for rounding."""
        return Step()

    def batches(self, examples: Examples, size: int) -> Iterator[tuple[list[int], list[Example]]]:
        """(numbers of the rows, the rows as examples) until all have come; rows of like length come together."""
        made = [examples[i] for i in range(len(examples))]
        order = sorted(range(len(made)), key=lambda i: -len(made[i]["input_ids"]))
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            yield numbers, [made[i] for i in numbers]

    def items(self, batch: Mapping[str, torch.Tensor]) -> int:
        """How many things the loss of a batch is the mean of: rows, or where labels stand at tokens, those that count.
        Batches that are accumulated weigh by it."""
        labels = batch.get("labels")
        return 1 if labels is None else len(labels)

    def loss(self) -> Loss:
        """What a training lowers, a function of the model and a batch that `collator` made."""
        return loss_of

    def shown(self, row: Mapping[str, Any], processor: Processor) -> list[Piece]:
        """A row as the model sees it, for people: (text, whether it is learned) in order."""
        return pieces(self.example(row, processor), processor)

    def reads(self, there: Sequence[str]) -> str:
        """What was found in columns of these names, in words."""
        return ", ".join(f"{role} is {column!r}" for role, column in self.columns(there).items())

    def arguments(self, **settings: Any) -> TrainingArguments:
        """The settings of its trainer."""
        from transformers import TrainingArguments

        return TrainingArguments(**settings)

    def fitter(self) -> Callable[..., Any] | None:
        """What makes its trainer of what a Trainer takes; None: the usual one."""
        return None

    @abc.abstractmethod
    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        """The metrics on these examples."""

    def choose(self, model: PreTrainedModel, examples: Examples, batch: int) -> float:
        """The headline metric alone: what a learning rate and a point of the training are chosen by."""
        return self.score(model, examples, batch)[self.headline]

    def watched(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        """The metrics while it trains, the headline among them: all of `score`, where that is what `choose` takes."""
        if type(self).choose is Task.choose:
            return self.score(model, examples, batch)
        return {self.headline: self.choose(model, examples, batch)}

    def weights(self, train: Dataset) -> list[float] | None:
        """What the loss of a row of each class is multiplied by while it trains; None: the model's own loss."""
        return None

    def head(self, model: PreTrainedModel) -> tuple[str, ...]:
        """The parameters that train in full: all that stand outside the model's body; none for a language model."""
        return ()

    def answers(
        self, model: PreTrainedModel, rows: Iterable[Mapping[str, Any]], processor: Processor, batch: int
    ) -> Iterator[dict[str, Any]]:
        """What the model says to rows without labels, {role: value} as `asked` gives them: a dict of JSON values for
        each, in their order.  The rows may be endless: so many as make 64 batches are in memory at once.

        Raises NotImplementedError for a task that cannot, ValueError for a row whose answer is not finite.
        """
        raise NotImplementedError(f"{type(self).__name__} answers no rows")

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        """The rows with one column per role, but without what is learned: what `answers` takes.  Adds what is wrong
        with them; raises LookupError where a column is missing."""
        raise NotImplementedError(f"{type(self).__name__} reads no rows without labels")

    def inputs(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        """{role: column} of rows without labels.  Raises as `columns` does."""
        return self._columns([role for role in self.roles if role not in self.targets], there, faults)

    def columns(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        """{role: column}.  Raises LookupError that lists the columns that exist, or adds to the `faults`."""
        return self._columns(self.roles, there, faults)

    def _columns(self, roles: Iterable[str], there: Sequence[str], faults: Faults | None) -> dict[str, str]:
        found = faults if faults is not None else Faults()
        made = {role: column for role in roles if (column := self._column(role, there, found)) is not None}
        made = self._apart(made, found)
        if faults is None:
            found.check()
        return made

    def _apart(self, made: Mapping[str, str], faults: Faults) -> dict[str, str]:
        """{role: column} without optional roles that nobody has named and whose column another has.  A column that two
        others have is a fault."""
        asked = {role for role in made if role not in self.optional or getattr(self, role) is not None}
        taken = {made[role] for role in asked}
        left = {role: column for role, column in made.items() if role in asked or column not in taken}
        for column in dict.fromkeys(left.values()):
            if len(those := [role for role in left if left[role] == column]) > 1:
                faults.missing(
                    f"the column {column!r} is both {' and '.join(those)}, which are told apart by nothing",
                    f"Name another for one of them: --column {those[0]}=... or --column {those[-1]}=...",
                )
        return left

    def _column(self, role: str, there: Sequence[str], faults: Faults) -> str | None:
        named = getattr(self, role)
        for column in self.roles[role] if named is None else (named,):
            if column in there:
                return column
        if named is not None or role not in self.optional:
            looked = f"no column for {role} (looked for {', '.join(self.roles[role])})"
            faults.missing(
                f"the data have {looked if named is None else f'no column {named!r}'}; "
                f"their columns are: {named_columns(there)}",
                f"Name it: --column {role}=..., in Python {type(self).__name__}({role}=...)",
            )
        return None


@dataclass(frozen=True)
class Examples:
    """Rows as a torch data set: each becomes an example when it is asked for, and is kept where it is tokens (see
    `made`).  `seen`: what a look at all of them found (see `limits.fits`)."""

    task: Task
    rows: Dataset
    processor: Processor
    seen: dict[str, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)
    made: Made = field(default_factory=Made, init=False, repr=False, compare=False)
    steps: dict[Any, tuple[Any, Step]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        kept = self.made.get(i)
        return self.traced(i)[0] if kept is None else kept

    def traced(self, i: int) -> Traced:
        """Row i as an example, and what of it is lost; see `Task.traced`."""
        example, lost = self.task.traced(self.rows[i], self.processor)
        self.made.keep(i, example)
        return example, lost

    def step(self, model: PreTrainedModel) -> Step:
        """How a model takes its steps of them, see `Task.step`: looked at once on each device, by a few forwards."""
        key = id(model), model.device
        if key not in self.steps:
            self.steps[key] = model, self.task.step(self, model)  # with the model, so that no other has its id
        return self.steps[key][1]
