"""Forgetting classes that a model knows, and keeping the others: GS-LoRA (Zhao et al. 2024, arXiv:2403.11530) and
GS-LoRA++ (arXiv:2501.09705).

    L = CE(kept rows) + beta relu(bound - CE(rows to forget))
        ++ near KL(kept rows) + apart relu(apart_bound - KL(rows to forget))
    KL: of softmax(prototype of the row's class) to softmax(embedding of the row)

CE is a mean over the rows of its kind in the batch; a prototype is the mean of what the base gives to its head for the
class's training rows.  The forgetting term has no gradient once CE reaches the bound, so nothing is driven without end;
by default it is ln C, the loss of who knows nothing of C classes.  The head stays as it is.

Settled here: the rows to forget are repeated until they are as many as those that are kept, so a batch is half of each
on average.  Checkpoints are chosen on validation rows by the H-mean; the authors' code chooses them on its test rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.ranges import Count, NotNegative, Positive
from ...host.reference import alone
from ...observe.probe import Loss
from .classification import Classification
from .heads import Classes
from .image_classification import ImageClassification
from .outputs import logits_of, with_embeddings
from .step import Step
from .task import Examples, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel


def h_mean(before: float, after: float, kept: float) -> float:
    """2 D K / (D + K), D = before - after the fall of the accuracy on what is to be forgotten, K the accuracy on the
    rest; 0 where nothing fell."""
    drop = max(0.0, before - after)
    return 2 * drop * kept / (drop + kept) if drop + kept > 0 else 0.0


@dataclass(frozen=True)
class Forgets(Classes):
    """What forgetting has beside a classification.

    forget: the classes; earlier: those that earlier requests have forgotten, whose rows are left out.  beta: the weight
    of forgetting; bound: its end (None: ln C).  shots: so many training rows of each class at most.  near, apart,
    apart_bound: the prototype terms of GS-LoRA++, none where near and apart are 0.
    """

    headline = "h_mean"
    own_loss = True
    offered = False  # `undula forget` makes one for each request

    forget: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    beta: NotNegative = 0.5
    bound: Positive | None = None
    shots: Count | None = None
    near: NotNegative = 0.0
    apart: NotNegative = 0.0
    apart_bound: Positive = 10.0

    def __post_init__(self) -> None:
        if self.class_weights is not None:
            raise ValueError(f"{type(self).__name__} has a loss of its own, in which classes have no weights")
        if both := set(self.forget) & set(self.earlier):
            raise ValueError(f"{', '.join(sorted(both))}: to be forgotten, and forgotten earlier")

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        return None

    def fitted(self, train: Dataset) -> Self:
        made = super().fitted(train)
        unknown = [name for name in (*made.forget, *made.earlier) if name not in made.names]
        if unknown or not made.forget:
            what = f"there is no class {unknown[0]!r}" if unknown else "no class is named to be forgotten"
            raise LookupError(f"{what}; there are: {', '.join(made.names)}")
        if set(made.names) == {*made.forget, *made.earlier}:
            raise ValueError("all classes are to be forgotten: one at least is kept")
        return made

    def head(self, model: PreTrainedModel) -> tuple[str, ...]:
        """None of it trains."""
        return ()

    def weights(self, train: Dataset) -> None:
        return None

    def step(self, examples: Examples, model: PreTrainedModel) -> Step:
        return Step()

    def numbers(self, classes: Sequence[str]) -> list[int]:
        return [self.names.index(name) for name in classes]

    def fits(self, examples: Examples, model: PreTrainedModel, name: str) -> list[str]:
        """Raises ValueError where no row is to be forgotten, or none kept."""
        labels = examples.rows["label"][:]
        gone, kept = self.kinds(labels)
        for what, rows in (("to be forgotten", gone), ("that are kept", kept)):
            if not rows:
                raise ValueError(f"{name} has no row of the classes {what}; it has {len(labels)} rows")
        return super().fits(examples, model, name)

    def kinds(self, labels: Sequence[int]) -> tuple[list[int], list[int]]:
        """(numbers of the rows to forget, of those to keep); what was forgotten earlier is in neither."""
        gone, earlier = set(self.numbers(self.forget)), set(self.numbers(self.earlier))
        return (
            [i for i, label in enumerate(labels) if label in gone],
            [i for i, label in enumerate(labels) if label not in gone | earlier],
        )

    def loss(self) -> Loss:
        return self.lost

    def lost(self, model: Any, batch: Any, prototypes: Tensor | None = None) -> Tensor:
        """The loss of a batch; with `prototypes` (classes, d) also that of GS-LoRA++."""
        given, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
        if prototypes is None:
            logits, embedded = logits_of(model(**given)), None
        else:
            logits, embedded = with_embeddings(model, len(self.names), given)
        gone = torch.isin(labels, torch.tensor(self.numbers(self.forget), device=labels.device))
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        bound = math.log(len(self.names)) if self.bound is None else self.bound
        found = _mean(losses, ~gone) + self.beta * (bound - _mean(losses, gone, bound)).relu()
        if prototypes is not None and embedded is not None:
            apart = _divergence(prototypes.to(embedded)[labels], embedded)
            found = found + self.near * _mean(apart, ~gone)
            found = found + self.apart * (self.apart_bound - _mean(apart, gone, self.apart_bound)).relu()
        return found

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        """{h_mean, forgotten, kept: accuracies; forgotten_before: the base's; loss: on what is kept}."""
        labels = examples.rows["label"][:]
        logits = examples.seen["logits"] = self.logits(model, examples, batch)
        gone, kept = self.kinds(labels)
        if "forgotten_before" not in examples.seen:  # the base is the same whatever is trained
            rows = Examples(self, examples.rows.select(gone), examples.processor)
            with alone(model):
                found = self.logits(model, rows, batch)
            examples.seen["forgotten_before"] = accuracy(found, [labels[i] for i in gone])
        before = examples.seen["forgotten_before"]
        after, rest = (accuracy(logits[rows], [labels[i] for i in rows]) for rows in (gone, kept))
        told = torch.tensor([labels[i] for i in kept])
        return {
            "h_mean": h_mean(before, after, rest),
            "forgotten": after,
            "forgotten_before": before,
            "kept": rest,
            "loss": float(F.cross_entropy(logits[kept], told)),
        }

    def fitter(self) -> Callable[..., Any]:
        from .forgetting_trainer import ForgettingTrainer

        return ForgettingTrainer


def accuracy(logits: Tensor, labels: Sequence[int]) -> float:
    """The share of rows whose largest output is their class's."""
    return float((logits.argmax(1) == torch.tensor(labels)).double().mean())


def _mean(losses: Tensor, chosen: Tensor, none: float = 0.0) -> Tensor:
    """The mean of the chosen ones; `none` where there is none, with a gradient of zero."""
    return losses[chosen].mean() if bool(chosen.any()) else losses.sum() * 0.0 + none


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL( softmax(p) || softmax(q) ) of each row."""
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@Task.register
@dataclass(frozen=True)
class ForgetTexts(Forgets, Classification):
    """Classes of texts that a model is to forget, see `Forgets`."""


@Task.register
@dataclass(frozen=True)
class ForgetImages(Forgets, ImageClassification):
    """Classes of images that a model is to forget, see `Forgets`."""


KINDS: dict[type[Task], type[Forgets]] = {Classification: ForgetTexts, ImageClassification: ForgetImages}


def forgetting(task: Task, **options: Any) -> Forgets:
    """The task of forgetting classes of another.  Raises TypeError for a task without classes."""
    kind = KINDS.get(type(task))
    if kind is None:
        there = ", ".join(each.__name__ for each in KINDS)
        raise TypeError(f"classes are forgotten of {there}; {type(task).__name__} has none")
    return kind(**{f.name: getattr(task, f.name) for f in fields(task)}, **options)  # type: ignore[arg-type]
