"""What the benches of found and fused adapters share: held-out tasks, and an encoder that answers them by adapters.

A task has classes with descriptions and no head: logits = 20 cos(h(x), h0(class)), h the mean of MiniLM's last states
with an adapter, h0 without, so that every adapter of the library can be asked about every task.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import undula
from undula import retrieve
from undula.bundled import model_path

SCALE, LENGTH, BATCH, TOP = 20.0, 16, 100, "bert."


@dataclass(frozen=True)
class Task:
    """A task that no adapter of the library was trained on; rows are (text, number of the class)."""

    name: str
    description: str
    names: tuple[str, ...]
    prompts: tuple[str, ...]
    rows: dict[str, list[tuple[str, int]]]

    def some(self, split: str, number: int, seed: int = 0) -> list[tuple[str, int]]:
        """So many rows, as many of each class as can be."""
        order = torch.randperm(len(self.rows[split]), generator=torch.Generator().manual_seed(seed)).tolist()
        by_class: list[list[tuple[str, int]]] = [[] for _ in self.prompts]
        for i in order:
            by_class[self.rows[split][i][1]].append(self.rows[split][i])
        turns = [row for turn in zip(*by_class, strict=False) for row in turn]
        return turns[:number]


def tasks(file: Path) -> list[Task]:
    """Those of a file of jobs, as `undula library` and `undula train-many` read it."""
    found = []
    for job in tomllib.loads(file.read_text(encoding="utf-8"))["jobs"]:
        names, told = job["task"]["names"], job["task"]["descriptions"]
        rows = {}
        for split in ("train", "test"):
            lines = (Path(job["data"]) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            rows[split] = [(row["text"], names.index(row["label"])) for row in map(json.loads, lines)]
        prompts = tuple(told.get(n) or n for n in names)
        found.append(Task(job["name"], job["description"], tuple(names), prompts, rows))
    return found


def expert(path: Path) -> undula.Adapter:
    """An adapter of the library under the names of the bare encoder."""
    adapter = undula.Adapter.load(path)
    return renamed(adapter, lambda site: site.removeprefix(TOP))


def renamed(adapter: undula.Adapter, name: Any) -> undula.Adapter:
    parts = ("methods", "factors", "shapes", "kernels", "apart")
    own = {part: {name(site): value for site, value in getattr(adapter, part).items()} for part in parts}
    return replace(adapter, about={}, **own)


class Encoder:
    """MiniLM, or what PEFT made of it."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = model_path("minilm")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        self.model.config.use_cache = False

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return {k: found[k] for k in ("input_ids", "attention_mask")}

    def vectors(self, tokens: dict[str, Tensor]) -> Tensor:
        states, mask = self.model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def logits(self, texts: Sequence[str], classes: Tensor) -> Tensor:
        return SCALE * self.vectors(self.tokens(texts)) @ classes.T

    @torch.no_grad()
    def all_vectors(self, texts: Sequence[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), self.model.config.hidden_size)
        for begin in range(0, len(order), BATCH):
            some = order[begin : begin + BATCH]
            found[some] = self.vectors(self.tokens([texts[i] for i in some]))
        return found

    def accuracy(self, task: Task, rows: Sequence[tuple[str, int]], classes: Tensor) -> float:
        return right(self.all_vectors([t for t, _ in rows]), [c for _, c in rows], classes)


def right(vectors: Tensor, labels: Sequence[int], classes: Tensor) -> float:
    """The share of rows whose nearest class is their own."""
    return float(((vectors @ classes.T).argmax(1) == torch.tensor(labels)).float().mean())


def classes_of(task: Task) -> Tensor:
    """h0 of the classes (classes, d), of length 1."""
    return retrieve.embedded(task.prompts)
