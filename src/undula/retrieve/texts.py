"""Texts, and rows, as vectors of a sentence encoder: mean of its last states, of length 1 (all-MiniLM-L6-v2's own)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.extras import needs
from ..train.base import model_folder, opening, quiet
from ..train.rows import spaced

ENCODER = "bundled:minilm"
LENGTH = 256
ROWS = 64  # of a file of examples that are looked at


@functools.lru_cache(2)
@needs("hf")
def _opened(model: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    with quiet(), opening(model):
        folder = model_folder(model)
        return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def embedded(texts: Sequence[str], model: str = ENCODER) -> Tensor:
    """Vectors (N, d) of length 1, float32, on the CPU."""
    from ..train.tasks.prompted import vectors

    tokenizer, encoder = _opened(model)
    if not texts:
        return torch.zeros(0, encoder.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    found = torch.empty(len(texts), encoder.config.hidden_size)
    found[order] = F.normalize(vectors(encoder, tokenizer, [texts[i] for i in order], LENGTH), dim=-1)
    return found


def of_rows(source: str, model: str = ENCODER) -> Tensor:
    """What rows are about (d): the mean direction of their texts, each with its label, of ROWS of them, evenly spaced.

    `source` is what `undula train --data` takes.  Raises what reading it raises, ValueError where no column is a text.
    """
    from ..train.data.load import load_data

    splits = load_data(source)
    rows = splits["train" if "train" in splits else next(iter(splits))]
    rows = rows.select(spaced(len(rows), ROWS))
    classes = {n: f.names for n, f in rows.features.items() if hasattr(f, "names")}
    texts = [" ".join(_words(row, classes)) for row in rows]
    if not any(texts):
        raise ValueError(f"{source} has no column of texts; it has: {', '.join(rows.column_names)}")
    return F.normalize(embedded([t for t in texts if t], model).mean(0), dim=-1)


def _words(row: dict[str, Any], classes: dict[str, list[str]]) -> list[str]:
    named = {k: classes[k][v] if k in classes and isinstance(v, int) and v >= 0 else v for k, v in row.items()}
    return [v for v in named.values() if isinstance(v, str) and v.strip()]
