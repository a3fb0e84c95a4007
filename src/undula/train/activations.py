"""What a batch leaves in memory until its backward pass, whether that fits, and passes that leave no trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..observe.listen import moved
from . import processes
from .tasks.lending import still_statistics
from .tasks.segments import segments
from .tasks.step import Step
from .tasks.task import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM = 0.9  # of the memory that is free; the rest is for what a backward pass takes beside
GROUPS = Path("/sys/fs/cgroup")
GROUP_FILES = (  # limit, use, statistics and in these what can be given back: of version 2, and of version 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the Trainer will put the model."""
    there = next((p.device for p in model.parameters()), torch.device("cpu"))
    kept = there.type != "cpu" or (processes.count() > 1 and processes.on_cpu()) or not torch.accelerator.is_available()
    return there if kept else torch.accelerator.current_accelerator() or there


@contextlib.contextmanager
def placed(model: PreTrainedModel) -> Iterator[torch.device]:
    """Within, the model is on the device that will train it."""
    device = device_of(model)
    home = next((p.device for p in model.parameters()), device)
    if home != device:
        model.to(device)  # type: ignore[arg-type]
    try:
        yield device
    finally:
        if home != device:
            model.to(home)  # type: ignore[arg-type]


@contextlib.contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """In training mode within; afterwards gradients, buffers, modes and random generators are what they were."""
    import numpy

    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    gradients = [(p, p.grad) for p in model.parameters()]
    drawn = random.getstate(), numpy.random.get_state()
    devices = [device_of(model)] if device_of(model).type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        try:
            still_statistics(model.train().modules())
            model.zero_grad()
            yield
        finally:
            random.setstate(drawn[0])
            numpy.random.set_state(drawn[1])
            for p, gradient in gradients:
                p.grad = gradient
            with torch.no_grad():
                for name, b in model.named_buffers():  # by name: a model that moves gets others
                    b.copy_(buffers[name])
            for module, mode in modes:
                module.training = mode


@dataclass(frozen=True)
class AsTrained:
    """What makes a batch of examples, a model's loss of one up to a factor, and what the model is put into."""

    gather: Callable[[list[Any]], Any]
    loss: Callable[[Any, Any], torch.Tensor]
    around: Callable[[Any], contextlib.AbstractContextManager[None]]


def step_of(model: PreTrainedModel, examples: Examples, plain: bool) -> AsTrained:
    """As the Trainer of such a run takes its steps."""
    task = examples.task
    step = Step() if plain else examples.step(model)

    def loss(model: Any, batch: Any) -> torch.Tensor:
        given = {name: value for name, value in batch.items() if name != "segments"}
        with segments(batch.get("segments")):
            if step.head is None or task.own_loss:
                return task.loss()(model, given)
            return step.head.losses(model, given).sum()

    return AsTrained(step.gather or task.gatherer(examples.processor, model), loss, step.around)


@contextlib.contextmanager
def saved(model: nn.Module) -> Iterator[dict[str, int]]:
    """Within, the bytes that autograd keeps of forwards for their backward, beside what the model holds anyway:
    {"bytes": ...} after it.  Each storage counts once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept, found = dict[int, torch.Tensor](), {"bytes": 0}

    def keep(t: torch.Tensor) -> torch.Tensor:
        t = t.detach()  # a node that keeps its own result would hold itself, and all before it, for good
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t  # alive until the end, so no two have one address
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield found
    found["bytes"] = sum(t.untyped_storage().nbytes() for t in kept.values())


def saved_bytes(model: nn.Module, batch: Any, loss: Any) -> int:
    """What autograd keeps of a batch for its backward pass."""
    with saved(model) as found:
        loss(model, batch)
    return found["bytes"]


def of_largest_batch(model: PreTrainedModel, examples: Examples, batch: int, plain: bool = False) -> int:
    """Bytes that the largest batch would keep, by one row of middling length: so many for each of its tokens, for as
    many as `batch` rows of the longest have (of rows without tokens: for each row)."""
    lengths = examples.seen.get("lengths") or ()
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    middling = order[len(order) // 2] if order else 0
    rows = min(batch, len(examples))
    times = rows * max(lengths) / max(1, lengths[middling]) if order else rows
    step = step_of(model, examples, plain)
    with unchanged(model), placed(model) as device, step.around(model):
        one = step.gather([examples[middling]])
        return int(times * saved_bytes(model, moved(one, device), step.loss))


def free(device: torch.device) -> int | None:
    """Bytes that this process may still take there; None where nobody knows."""
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [_available(), *_left_of_groups()]
    known = [bytes for bytes in found if bytes is not None]
    return min(known) // processes.count() if known else None


def _available() -> int | None:
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    return int(psutil.virtual_memory().available)


def _left_of_groups() -> Iterator[int | None]:
    """What the limits of control groups, as of a container, leave; files of caches count as free."""
    for limit, used, told, cache in GROUP_FILES:
        with contextlib.suppress(OSError, ValueError, IndexError):
            most = int((GROUPS / limit).read_text())  # "max" is no number
            stat = dict(line.split() for line in (GROUPS / told).read_text().splitlines())
            yield max(0, most - int((GROUPS / used).read_text()) + int(stat.get(cache, 0)))


def again(model: PreTrainedModel, examples: Examples, batch: int, plain: bool = False) -> tuple[bool, str | None]:
    """(whether activations are to be computed again in the backward pass, a sentence where they are): only where what
    the largest batch keeps would not fit the memory that is free, and the model can."""
    left = free(device_of(model)) if getattr(model, "supports_gradient_checkpointing", False) else None
    if left is None or (needed := of_largest_batch(model, examples, batch, plain)) <= ROOM * left:
        return False, None
    return True, (
        f"a batch of {batch} rows would keep about {needed / 2**30:.2g} GiB until its backward pass, and "
        f"{left / 2**30:.2g} GiB are free: activations are computed again there, for a third more time. Smaller "
        "batches with accumulate need less; gradient_checkpointing=False keeps them whatever is free"
    )
