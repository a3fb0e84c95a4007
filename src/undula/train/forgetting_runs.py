"""The run of each request to forget: its classes, its layers, the model that it is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..core.method import Additive
from .base import config_of, quiet
from .forgetting_rows import quoted
from .run import Run
from .tasks.forgetting import forgetting
from .tasks.outputs import own_names
from .tasks.task import Task


def planned(run: Run, requests: Sequence[Sequence[str]], options: Mapping[str, Any]) -> Iterator[Run]:
    """The run of each request.  Raises as `forget` does."""
    if not isinstance(run.method, Additive) or any(not isinstance(m, Additive) for m in run.overrides.values()):
        raise TypeError(
            f"a request that can be taken back is an update that is added: {run.method!r} is none (rung "
            f"{'none' if run.method is None else run.method.rung()}); take a method on the rung Additive, such as LoRA"
        )
    for name in ("full", "begin_from"):
        if found := getattr(run, name):
            raise ValueError(
                f"{name}={found!r} is no part of a request, which is an update that is added and can be taken back: "
                "leave it out"
            )
    if not requests or not all(requests):
        raise ValueError("forget takes requests, each of one class or more: forget(run, [['shirt'], ['bag', 'coat']])")
    names, where = known_classes(run.model, run.task), run.where
    if where == "all-linear":
        where = feed_forward(run.model) or where
    earlier: tuple[str, ...] = ()
    for i, request in enumerate(requests):
        classes = tuple([request] if isinstance(request, str) else request)
        if unknown := [name for name in classes if name not in names]:
            raise LookupError(f"the model knows no class {unknown[0]!r}; it knows: {', '.join(map(quoted, names))}")
        if again := [name for i, name in enumerate(classes) if name in (*earlier, *classes[:i])]:
            raise ValueError(f"{again[0]!r} is to be forgotten twice")
        task = forgetting(named(run.task, names), forget=classes, earlier=earlier, **options)
        if set(names) == {*classes, *earlier}:
            raise ValueError("all classes are to be forgotten: one at least is kept")
        base = str(run.model) if i == 0 else str(run.out / "bases" / f"{i:02}")
        yield dataclasses.replace(run, model=base, task=task, where=where, out=run.out / "requests" / f"{i + 1:02}")
        earlier = (*earlier, *classes)


def known_classes(model: str, task: Task) -> tuple[str, ...]:
    """The classes of a model's own head, in its order.  Raises ValueError where it has none."""
    names = own_names(config_of(model))
    if names is None:
        raise ValueError(
            f"{model} has no head with named classes: there is nothing to forget. Begin with a model that was trained "
            "to classify, a whole one: `undula merge RUN --out FOLDER` makes one of a training"
        )
    said = tuple(getattr(task, "names", ()))
    if said and said != names:
        raise ValueError(f"names={list(said)}, but the model's head is for {list(names)}, in this order")
    return names


def named(task: Any, names: tuple[str, ...]) -> Task:
    """A task with these classes.  Raises TypeError for one that has none."""
    if not hasattr(task, "names"):
        raise TypeError(f"classes are forgotten of Classification and ImageClassification; {task!r:.60} has none")
    return dataclasses.replace(task, names=names)  # type: ignore[no-any-return]


def feed_forward(model: str) -> tuple[str, ...]:
    """The linear layers of a transformer's feed-forward networks, by their names in its body: those that are not
    square and stand in no attention.  Empty where it has none, or cannot be told by its configuration."""
    import torch
    from transformers import AutoModel

    try:
        with quiet(), torch.device("meta"):
            body = AutoModel.from_config(config_of(model))
    except Exception:  # whatever another library raises: then it cannot be told
        return ()
    found = []
    for name, module in body.named_modules():
        weight: Any = getattr(module, "weight", None)
        matrix = isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(module, torch.nn.Embedding)
        inside = any(part.isdigit() for part in name.split("."))
        if matrix and inside and weight.shape[0] != weight.shape[1] and "att" not in name.lower():
            found.append(name)
    return tuple(found)
