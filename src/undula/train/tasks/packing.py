"""Rows without padding between them: several in one row of a batch, each attending to itself alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .lending import evaluating
from .shown import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBED = 24  # tokens of each of the rows by which it is seen whether a model keeps them apart
LOOKED_AT = 32  # rows, of which the longest are taken
CLOSE, HALF_CLOSE = 1e-3, 5e-2  # of the logits' size, in whole and in half precision


@dataclass(frozen=True)
class Packer:
    """Puts examples into as few rows as they need, none wider than the longest example (`flat`: into one row).

    {input_ids, labels, position_ids (B, W), use_cache False}, without an attention mask: from positions that begin
    again transformers tells where a row ends (`masking_utils.find_packed_sequence_indices`), as long as there is no
    cache.  The first token of each has no label, for nothing before it is its own.  What is left of a row is filled
    with padding that is a row of its own.  The loss, a mean over the learned tokens, is that of the padded examples.
    """

    pad: int
    flat: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(example["input_ids"]) for example in examples]
        width = sum(lengths) if self.flat else max(lengths)
        bins = fitted(lengths, width)
        ids, labels, positions = (list[list[int]]() for _ in range(3))
        for members in bins:
            chosen = [examples[i] for i in members]
            left = width - sum(lengths[i] for i in members)
            ids.append([token for example in chosen for token in example["input_ids"]] + [self.pad] * left)
            learned = [label for example in chosen for label in (IGNORED, *example["labels"][1:])]
            labels.append(learned + [IGNORED] * left)
            positions.append([at for n in (*(lengths[i] for i in members), left) for at in range(n)])
        made = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {**{name: torch.tensor(rows) for name, rows in made.items()}, "use_cache": False}


Labels = Callable[[list[Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Flat:
    """Puts examples behind each other into one row without any padding, the longest first.

    {input_ids, whatever else there is of each token, position_ids (1, T), labels, segments: the lengths}, and what
    `more` says: a row for a model whose attention asks for segments, see `segments`.
    begin: the first position of a row; labels: makes {labels, ...} of the examples, in that order.
    """

    labels: Labels
    begin: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Raises ValueError for examples that hold something else than tokens."""
        return self.row(sorted(examples, key=lambda each: -len(each["input_ids"])))

    def row(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The same of examples in the order in which they come."""
        lengths = tuple(len(each["input_ids"]) for each in rows)
        names = [name for name in rows[0] if name not in ("labels", "attention_mask")]
        for name in names:
            if [len(each[name]) for each in rows] != list(lengths):
                raise ValueError(f"{name} is not of each token, so rows cannot stand behind each other")
        made = {name: torch.tensor([[v for each in rows for v in each[name]]]) for name in names}
        made["position_ids"] = torch.cat([self._positions(ids) for ids in made["input_ids"][0].split(lengths)])[None]
        return {**made, **self.labels(list(rows)), "segments": lengths, **self.more}

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Of a row's tokens.  Models that begin behind the position of padding give that to its token within a row too,
        and do not count it."""
        if not self.begin:
            return torch.arange(len(ids))
        counted = ids != self.begin - 1
        return counted.cumsum(0) * counted + self.begin - 1


def next_tokens(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Labels of a language model's rows (1, T): nothing before a row's first token is its own."""
    return {"labels": torch.tensor([[label for each in rows for label in (IGNORED, *each["labels"][1:])]])}


def of_tokens(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Labels of each token (1, T)."""
    return {"labels": torch.tensor([[label for each in rows for label in each["labels"]]])}


def fitted(lengths: Sequence[int], width: int) -> list[list[int]]:
    """The numbers of the lengths, in groups of at most `width` in sum: first fit, the longest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, left in enumerate(room) if left >= lengths[i]), None)
        if at is None:
            bins.append([i])
            room.append(width - lengths[i])
        else:
            bins[at].append(i)
            room[at] -= lengths[i]
    return bins


def flattens(model: PreTrainedModel) -> bool:
    """Whether the model's attention tells rows apart in a batch of one row alone, as flash attention does."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


def longest(examples: Any) -> list[Any]:
    """Those by which it is seen what a model takes: of rows of a token or two the first is all that there is to see."""
    found = [examples[i] for i in range(min(LOOKED_AT, len(examples)))]
    return sorted(found, key=lambda each: -len(each["input_ids"]))[:3]


def cut(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The beginnings of examples, of different lengths, by which it is seen what a model takes."""
    found = []
    for at, each in enumerate(examples):
        whole, most = len(each["input_ids"]), max(2, PROBED - 5 * at)
        found.append({k: v if k == "labels" or len(v) != whole else list(v)[:most] for k, v in each.items()})
    return found


def probed(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those with every other token learned, whatever is of the whole."""
    rows = cut(examples)
    return [
        {**row, "labels": [token if i % 2 else IGNORED for i, token in enumerate(row["input_ids"])]} for row in rows
    ]


def beginnings(model: PreTrainedModel) -> tuple[int, ...]:
    """What the first position of a row may be for this model: RoBERTa and its kin begin behind that of padding."""
    pad = model.config.pad_token_id
    return (0,) if pad is None else (0, pad + 1)


@torch.no_grad()
def check_apart(model: PreTrainedModel, pad: int, examples: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a model that does not keep packed rows apart: seen by the logits of a few short rows,
    packed and each by itself."""
    short = [{name: list(each[name])[:PROBED] for name in ("input_ids", "labels")} for each in (*examples, examples[0])]
    try:
        with evaluating(model):
            batch = Packer(pad, flat=True)(short)
            together = model(batch["input_ids"].to(model.device), position_ids=batch["position_ids"].to(model.device),
                             use_cache=False).logits[0]  # fmt: skip
            (order,) = fitted([len(each["input_ids"]) for each in short], together.shape[0])
            rows = [torch.tensor([short[i]["input_ids"]], device=model.device) for i in order]
            alone = torch.cat([model(row, use_cache=False).logits[0] for row in rows])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"{_refused(model)}: it takes no such batch ({error!s:.200}). {ADVICE}") from error
    off, size = float((together - alone).abs().max()), float(alone.abs().max())
    most = CLOSE if alone.dtype in (torch.float32, torch.float64) else HALF_CLOSE
    if not off <= most * size:
        raise ValueError(
            f"{_refused(model)}: they would see each other (the logits of a row differ by {off / size:.2g} of their "
            f"size once another stands before it). {ADVICE}"
        )


ADVICE = "Leave packing out: rows are padded then"


def _refused(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} cannot be trained on packed rows"
