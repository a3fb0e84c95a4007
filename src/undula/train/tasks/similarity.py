"""Similarity of sentences: an encoder whose vectors lie near each other where the texts mean the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from ...core.extras import needs
from ...core.ranges import Count, Positive
from ..data.columns import numbers, texts
from ..data.faults import Faults
from .answering import windows
from .classification import LENGTH, Regression, correlations
from .lending import evaluating
from .limits import fits as looked_at
from .limits import padding
from .sentences import KEPT, embedded, place_behind, write_behind
from .shown import Piece, text_of
from .task import (
    Example,
    Examples,
    Processor,
    Task,
    Traced,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = {"scores": ("sentence1", "sentence2", "rating"), "pairs": ("anchor", "positive", "negative")}
LIMIT = "_undula_limit"


@Task.register
@dataclass(frozen=True)
class Similarity(Task):
    """Vectors of sentences, by sentence-transformers.  Rows are one of

    - two sentences and how alike they are (`scores`): the cosine of their vectors learns the rating over `scale` (None:
      1, or the largest one where one is beyond 1); Spearman's and Pearson's correlation, mean squared error;
    - an anchor, a text that belongs to it and maybe one that does not (`pairs`): among all texts of the batch its own
      learns to be nearest (MultipleNegativesRankingLoss); the mean reciprocal rank of its own among the texts of all
      rows, and the share of anchors that have it first.

    `kind` names which.  A folder of sentence-transformers keeps its pooling; of any other
    encoder the tokens are averaged.  The adapter's layers are called as the transformer's, so that
    sentence-transformers' own `load_adapter` reads an exported LoRA.
    """

    roles: ClassVar = {
        "sentence1": ("sentence1", "sentence_1", "text1", "premise"),
        "sentence2": ("sentence2", "sentence_2", "text2", "hypothesis"),
        "rating": ("score", "similarity", "similarity_score", "rating", "label", "labels"),
        "anchor": ("anchor", "query", "question"),
        "positive": ("positive", "passage", "answer", "document"),
        "negative": ("negative", "hard_negative"),
        "text": ("text", "sentence"),
    }
    optional = ("negative",)
    targets = ("rating", "anchor", "positive", "negative")
    peft = "FEATURE_EXTRACTION"
    pipeline = "sentence-similarity"
    has_head = False
    mean_loss = True
    own_loss = True

    sentence1: str | None = None
    sentence2: str | None = None
    rating: str | None = None
    anchor: str | None = None
    positive: str | None = None
    negative: str | None = None
    text: str | None = None
    max_length: Count | None = None
    kind: str = "scores"
    scale: Positive | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {' or '.join(KINDS)}; found {self.kind!r}")

    @property
    def headline(self) -> str:  # type: ignore[override]
        """Spearman's correlation; of pairs the mean reciprocal rank."""
        return "mrr" if self.kind == "pairs" else "spearman"

    def columns(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        found = Faults() if faults is None else faults
        made = self._columns(KINDS[self.kind], there, found)
        others = [kind for kind, roles in KINDS.items() if all(set(self.roles[r]) & set(there) for r in roles[:2])]
        if len(made) < 2 and others and self.kind not in others:
            found.missing(
                f"the rows look like {others[0]}, and kind is {self.kind}",
                f"Say so: --task-set kind={others[0]}, in Python Similarity(kind={others[0]!r})",
            )
        if faults is None:
            found.check()
        return made

    def inputs(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        """Of rows to answer: two sentences, or one text (which may be an anchor)."""
        pair = ("sentence1", "sentence2")
        if all(getattr(self, r) in there or set(self.roles[r]) & set(there) for r in pair):
            return self._columns(pair, there, faults)
        one = (self.text, *self.roles["text"], self.anchor, *self.roles["anchor"], *self.roles["sentence1"])
        found = next((c for c in one if c is not None and c in there), None)
        return {"text": found} if found else self._columns(("text",), there, faults)

    def check(self, split: Dataset, faults: Faults) -> None:
        for role, column in self.columns(split.column_names, faults).items():
            if role == "rating":
                numbers(split, column, faults)
            else:
                texts(split, column, faults)

    def fitted(self, train: Dataset) -> Self:
        if self.kind == "pairs" or self.scale is not None:
            return self
        ratings = numbers(train, self.columns(train.column_names)["rating"], Faults())
        return replace(self, scale=max(1.0, max(map(abs, ratings), default=1.0)))

    def check_fitted(self, split: Dataset, faults: Faults) -> None:
        column = self.columns(split.column_names).get("rating")
        beyond = [v for v in numbers(split, column, Faults()) if abs(v) > (self.scale or 1.0)] if column else []
        if beyond:
            faults.add(
                f"{len(beyond)} ratings are beyond the scale, such as {beyond[0]:g}: no cosine is above 1",
                advice=f"scale is what ratings are divided by, and is {self.scale:g}: --task-set scale=...",
            )

    def rows(self, split: Dataset) -> Dataset:
        return self._read(split, self.columns(split.column_names))

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        return self._read(split, self.inputs(split.column_names, faults), faults)

    def _read(self, split: Dataset, columns: Mapping[str, str], faults: Faults | None = None) -> Dataset:
        from datasets import Dataset

        found = Faults() if faults is None else faults
        made: dict[str, Any] = {r: texts(split, c, found) for r, c in columns.items() if r != "rating"}
        if "rating" in columns:
            made["rating"] = [v / (self.scale or 1.0) for v in numbers(split, columns["rating"], found)]
        if faults is None:
            found.check()
        return Dataset.from_dict(made)

    def notes(self, split: Dataset) -> Iterator[str]:
        yield from super().notes(split)
        scale = self.fitted(split).scale
        if self.scale is None and scale is not None and scale > 1:
            yield f"ratings are divided by {scale:g}, the largest, since a cosine is 1 at most (another: scale)"

    @needs("similarity")
    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> Any:
        from transformers import AutoModel

        made = AutoModel.from_pretrained(path, dtype=dtype, **quantised)
        model, told = made if isinstance(made, tuple) else (made, {})
        model.__dict__[LIMIT] = place_behind(model, path)
        unread = {key for key in told.get("missing_keys", ()) if not str(key).startswith("pooler.")}  # nothing asks it
        return (model, {**told, "missing_keys": unread}) if isinstance(made, tuple) else model

    def agree(self, processor: Processor, model: PreTrainedModel) -> None:
        padding(processor, model)
        limit = model.__dict__.get(LIMIT)
        if limit is not None:
            processor.model_max_length = min(processor.model_max_length, limit)

    def beside(self, model: PreTrainedModel, folder: Path) -> None:
        write_behind(model, folder, model.__dict__.get(LIMIT))

    def _texts(self, row: Mapping[str, Any]) -> list[str]:
        every = ("sentence1", "sentence2", "anchor", "positive", "negative", "text")
        return [row[role] for role in every if row.get(role) is not None]

    def example(self, row: Mapping[str, Any], processor: Processor, /) -> Example:
        return self.traced(row, processor)[0]

    def traced(self, row: Mapping[str, Any], processor: Processor, /) -> Traced:
        limit = self.max_length or min(LENGTH, processor.model_max_length)
        made, lost = [], dict[str, tuple[int, int]]()
        for text in self._texts(row):
            ids = processor(text, verbose=False)["input_ids"]
            if len(ids) > limit:
                lost["a text is cut at its end"] = max(len(ids), lost.get("a text is cut at its end", (0, 0))[0]), limit
                ids = processor(text, truncation=True, max_length=limit)["input_ids"]
            made.append(ids)
        return {"input_ids": made, "labels": row.get("rating")}, lost

    def shown(self, row: Mapping[str, Any], processor: Processor) -> list[Piece]:
        found: list[Piece] = [
            (text_of(ids, processor) + "\n", False) for ids in self.example(row, processor)["input_ids"]
        ]
        return [*found, (f"{row['rating']:.3g}" if "rating" in row else "the first is near the second", True)]

    def fits(self, examples: Examples, model: PreTrainedModel, name: str) -> list[str]:
        """Looks at every text."""
        from datasets import Dataset

        every = [text for row in examples.rows for text in self._texts(row)]
        limit = self.max_length or min(LENGTH, examples.processor.model_max_length)
        rows = Dataset.from_dict({"text": every, "label": [0.0] * len(every)})
        alone = Examples(Regression(max_length=limit), rows, examples.processor)
        notes = looked_at(alone, model, name)
        if self.kind == "pairs" and name == "train" and len(set(examples.rows["positive"][:])) < 2:
            raise ValueError(f"the {name} rows have one positive text alone: there is nothing to tell it from")
        return [note.replace(f"{name} rows", f"texts of the {name} rows", 1) for note in notes]

    def collator(self, processor: Processor, /) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        """All texts of a batch in one: the first of every row, then the second ..."""

        def together(examples: list[Example]) -> Mapping[str, torch.Tensor]:
            columns = zip(*(e["input_ids"] for e in examples), strict=True)
            batch = processor.pad({"input_ids": [ids for each in columns for ids in each]}, return_tensors="pt")
            rated = [e["labels"] for e in examples if e["labels"] is not None]
            labels = torch.tensor(rated) if rated else torch.arange(len(examples))
            return {**{k: v for k, v in batch.items() if k in KEPT}, "labels": labels}

        return together

    def batches(self, examples: Examples, size: int) -> Iterator[tuple[list[int], list[Example]]]:
        """In the order of the rows."""
        for start in range(0, len(examples), size):
            numbers = list(range(start, min(start + size, len(examples))))
            yield numbers, [examples[i] for i in numbers]

    def loss(self) -> Callable[[Any, Any], torch.Tensor]:
        """sentence-transformers' own losses."""
        apart = self._loss()

        def loss(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            found = embedded(model, batch)
            return apart(found.view(-1, len(batch["labels"]), found.shape[-1]), batch["labels"])

        return loss

    def _loss(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Of vectors (texts of a row, rows, d) and labels."""
        from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss, MultipleNegativesRankingLoss

        kind: Any = MultipleNegativesRankingLoss if self.kind == "pairs" else CosineSimilarityLoss
        made = kind(None)
        return lambda vectors, labels: made.compute_loss_from_embeddings(list(vectors), labels)

    @torch.no_grad()  # while it computes, not while others look at what it yields
    def _vectors(
        self, model: PreTrainedModel, examples: Examples, batch: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(vectors (texts of a row, rows, d), labels) of every batch, in evaluation mode."""
        collate = self.collator(examples.processor)
        with evaluating(model):
            for _, made in self.batches(examples, batch):
                inputs = {k: v.to(model.device) for k, v in collate(made).items()}
                found = embedded(model, inputs)
                yield found.view(-1, len(made), found.shape[-1]).cpu(), inputs["labels"].cpu()

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        found = list(self._vectors(model, examples, batch))
        vectors = torch.cat([each for each, _ in found], 1)
        mean = float(self._loss()(vectors, torch.cat([labels for _, labels in found])))  # of all rows at once
        if self.kind == "pairs":
            there = [role for role in KINDS["pairs"] if role in examples.rows.column_names]
            return {"loss": mean, **ranks(vectors, [examples.rows[c][:] for c in there])}
        near = torch.cosine_similarity(vectors[0], vectors[1])
        wanted = torch.tensor(examples.rows["rating"][:])
        return {"loss": mean, "mse": float((near - wanted).square().mean()), **correlations(near, wanted)}

    def answers(
        self, model: PreTrainedModel, rows: Iterable[Mapping[str, Any]], processor: PreTrainedTokenizerBase, batch: int
    ) -> Iterator[dict[str, Any]]:
        """{similarity: the cosine} of two sentences, {embedding} of one text."""
        for window in windows(self, rows, processor, batch):
            for vectors, _ in self._vectors(model, window, batch):
                if len(vectors) == 2:
                    yield from ({"similarity": v} for v in torch.cosine_similarity(vectors[0], vectors[1]).tolist())
                else:
                    yield from ({"embedding": v} for v in vectors[0].tolist())


def ranks(vectors: torch.Tensor, columns: Sequence[Sequence[str]]) -> dict[str, float]:
    """{mrr, accuracy_at_1} of the anchors among all different other texts, by cosine; of an anchor with several texts
    of its own the nearest counts.  `vectors`: (2 or 3, rows, d) of the `columns` anchor, positive, maybe negative."""
    anchors, positives, *_ = columns
    number: dict[str, int] = {}
    found = []
    for column, rows in zip(columns[1:], vectors[1:], strict=True):
        for text, vector in zip(column, rows, strict=True):
            if text not in number:
                number[text] = len(number)
                found.append(vector)
    belongs: dict[str, set[int]] = {}
    for anchor, text in zip(anchors, positives, strict=True):
        belongs.setdefault(anchor, set()).add(number[text])
    near = _unit(vectors[0]) @ _unit(torch.stack(found)).T
    own = torch.zeros_like(near, dtype=torch.bool)
    for row, anchor in enumerate(anchors):
        own[row, list(belongs[anchor])] = True
    mine = near.masked_fill(~own, -torch.inf).max(1, keepdim=True).values
    rank = 1 + (near.masked_fill(own, -torch.inf) >= mine).sum(1)
    return {"mrr": float((1 / rank.double()).mean()), "accuracy_at_1": float((rank == 1).double().mean())}


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
