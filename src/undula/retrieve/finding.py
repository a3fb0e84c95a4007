"""Which adapters of a folder are for a task: by its description, or by rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..train.base import same_base
from .describing import readable
from .encoder import Encoder, learn
from .entry import Entry
from .index import Index, Seen, update
from .texts import ENCODER, embedded, of_rows

BY = ("both", "text", "weights")
ALIKE = 1e-5  # cosines: below, what differs is the rounding of texts that were embedded beside others


@dataclass(frozen=True)
class Found:
    """An adapter of a result; `score` is what it was ordered by, `text` and `weights` the cosines of the question with
    its description and with the encoding of its weights, None where it has none."""

    name: str
    path: Path
    score: float
    text: float | None
    weights: float | None
    entry: Entry

    def encode(self) -> dict[str, Any]:
        """As JSON has it."""
        e = self.entry
        return {
            "name": self.name, "path": str(self.path), "score": self.score, "text": self.text,
            "weights": self.weights, "description": e.text, "by": e.by, "base": e.base, "method": e.method,
            "layers": e.layers, "parameters": e.parameters,
        }  # fmt: skip


def question(words: str | None, rows: str | None = None, model: str = ENCODER) -> Tensor:
    """What is asked for as a vector (d) of length 1: a description, rows (a file, what `--data` takes), or both.
    Raises ValueError for neither."""
    parts = []
    if words is not None:
        if not words.strip():
            raise ValueError("the description of the task is empty")
        parts.append(embedded([readable(words)], model)[0])
    if rows is not None:
        parts.append(of_rows(rows, model))
    if not parts:
        raise ValueError("say what the task is, or give rows of it (rows=..., or --rows FILE)")
    return F.normalize(torch.stack(parts).sum(0), dim=-1)


def ranked(
    index: Index,
    asked: Tensor,
    encoder: Encoder | None = None,
    *,
    by: str = "both",
    base: str | None = None,
    top: int | None = None,
) -> list[Found]:
    """The adapters of an index, the likeliest first; of equal ones by name.

    by: "text" is the cosine of `asked` (d) with the description's vector, "weights" with the encoding of the weights;
    "both" the mean of their standard scores over the folder (of text alone where there is no encoder).  `base` leaves
    those of other bases out.  One that lacks what it is ordered by comes in no result of "text" or "weights"; in "both"
    what it lacks counts as the mean.  Raises ValueError.
    """
    check_by(by, encoder is not None)
    if encoder is not None and encoder.model not in ("", index.model):
        raise ValueError(f"the encoder was trained on vectors of {encoder.model}, the index has those of {index.model}")
    which = [i for i in index.usable if base is None or _is(index.entries[i].base, base)]
    if not which:
        return []
    there, texts, weights = index.rows(which)
    text = _scores(texts.any(1), texts @ asked)
    own = torch.full((len(which),), float("nan")) if encoder is None else _encoded(there, weights, asked, encoder)
    score = {"text": text, "weights": own}.get(by)
    if score is None:
        score = torch.stack([_standard(text), _standard(own)]).mean(0) if encoder is not None else text
    order = sorted(
        (i for i in range(len(which)) if score[i].isfinite()),
        key=lambda i: (-round(float(score[i]) / ALIKE), there[i].name),
    )
    return [
        Found(
            there[i].name, index.folder / there[i].name, float(score[i]), _or_none(text[i]), _or_none(own[i]), there[i]
        )
        for i in order[:top]
    ]


def check_by(by: str, encoder: bool) -> None:
    """Raises ValueError for an order that is none, or that takes an encoder where there is none."""
    if by not in BY:
        raise ValueError(f"by is {', '.join(BY)}; found {by!r}")
    if by == "weights" and not encoder:
        raise ValueError("to find by weights takes an encoder of them (--encoder FILE; --learn FILE trains one)")


def _is(said: str, base: str) -> bool:
    return bool(said) and (said == base or same_base(base, said))


def _scores(there: Tensor, found: Tensor) -> Tensor:
    return torch.where(there, found, float("nan"))


@torch.no_grad()
def _encoded(there: Sequence[Entry], weights: Tensor, asked: Tensor, encoder: Encoder) -> Tensor:
    """The cosines with the encodings; NaN of adapters without, and of bases that the encoder does not know."""
    known = [not encoder.base or _is(e.base, encoder.base) for e in there]
    return _scores(weights.any(1) & torch.tensor(known, dtype=torch.bool), encoder(weights) @ asked)


def _standard(found: Tensor) -> Tensor:
    """Standard scores over those that are there; 0, the mean, for the others, and for all where all are alike."""
    there = found[found.isfinite()]
    spread = there.std(correction=0) if len(there) else torch.tensor(0.0)
    return ((found - there.mean()) / spread).nan_to_num(0.0) if spread > ALIKE else torch.zeros_like(found)


def _or_none(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def find(
    words: str | None,
    folder: str | Path,
    *,
    rows: str | None = None,
    top: int | None = 10,
    file: str | Path | None = None,
    encoder: Encoder | str | Path | None = None,
    by: str = "both",
    base: str | None = None,
    seen: Seen = lambda done, of: None,
) -> list[Found]:
    """`update` and `ranked` in one: the adapters below `folder` that are likeliest for a task."""
    check_by(by, encoder is not None)
    known = Encoder.load(encoder) if isinstance(encoder, str | Path) else encoder
    asked = question(words, rows)
    return ranked(update(folder, file, seen=seen), asked, known, by=by, base=base, top=top)


def learned(index: Index, seed: int = 0) -> Encoder:
    """An encoder of weights, trained on an index: on its adapters with an encoding and a text that is more than a
    name, of the base that most of them have.  Raises ValueError where they are too few."""
    which = [i for i in index.usable if index.entries[i].by != "name" and not index.entries[i].silent]
    bases = [index.entries[i].base for i in which]
    most = max(sorted(set(bases)), key=bases.count, default="")
    _, texts, weights = index.rows([i for i in which if index.entries[i].base == most])
    return learn(weights, texts, seed=seed, base=most, model=index.model)
