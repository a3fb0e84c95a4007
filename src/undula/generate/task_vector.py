"""A task as one vector: the mean of the base's last hidden states over a few of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..train.base import config_of, model_folder, opening, quiet
from ..train.rows import rows_of, spaced
from ..train.run import Run
from ..train.tasks.lending import evaluating
from .library import EXPERTS, Library

ROWS = 30  # of a task, as ICM-LoRA takes them
LENGTH = 128  # tokens of a row that are read
TEXTS = ("text", "prompt")


@torch.no_grad()
def task_vectors(model: str, tasks: Sequence[Sequence[str]]) -> Tensor:
    """(tasks, H): of each task's texts the mean over the rows of the last token's state; of an encoder, whose last
    token says nothing, of the tokens' mean.  Empty rows say nothing."""
    from transformers import AutoModel, AutoTokenizer

    from ..train.tasks.prompted import vectors

    tasks = [[text for text in rows if text.strip()] for rows in tasks]
    if not all(tasks):
        raise ValueError("a task vector is made of rows, and there are none")
    folder, writes = model_folder(model), _writes(model)
    with quiet(), opening(model):
        body, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if not writes:
        return torch.stack([vectors(body, tokenizer, rows, LENGTH).mean(0) for rows in tasks])
    with evaluating(body):
        return torch.stack([torch.stack([_last(body, tokenizer, text) for text in rows]).mean(0) for rows in tasks])


def _writes(model: str) -> bool:
    """Whether a model is one that goes on with a text."""
    return any(str(kind).endswith("CausalLM") for kind in config_of(model).architectures or ())


def _last(body: torch.nn.Module, tokenizer: object, text: str) -> Tensor:
    given = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")  # type: ignore[operator]
    state: Tensor = body(**given)[0][0, -1].float()
    return state


def of_experts(library: Library, rows: int = ROWS) -> Tensor:
    """(N, H): the task vectors of a library's experts, of so many training rows of each.  Raises what reading these
    raises."""
    found = []
    for name in library.names:
        run = Run.load(library.path / EXPERTS / name)
        split = rows_of(run).train
        column = next((c for c in TEXTS if c in split.column_names), None)
        if column is None:
            raise ValueError(f"{name}: its rows have no text (columns: {', '.join(split.column_names)}): give tasks=")
        found.append(split.select(spaced(len(split), rows))[column])
    return task_vectors(library.model, found)
