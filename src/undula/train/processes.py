"""One run on several processes (torchrun): each trains on rows of its own, the first one claims, measures, writes and
speaks, and what they do next they agree on.

The launcher says by WORLD_SIZE, RANK and LOCAL_RANK how many there are; transformers' Trainer averages the gradients
(DistributedDataParallel).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # others wait while the first one measures; a launcher ends them all where one dies
CUT = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


class Elsewhere(RuntimeError):
    """The first process has failed, and says why."""


def started() -> int:
    """How many processes the launcher started; 1 without one."""
    told = os.environ.get("WORLD_SIZE", "")
    return int(told) if told.isdigit() else 1


def count() -> int:
    """How many processes are joined; 1 where none are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return count() == 1 or dist.get_rank() == 0


def join() -> None:
    """Joins the processes that a launcher started, where nobody has.  Raises RuntimeError where that is not possible,
    since each would then train by itself, and all into one directory; ValueError for launchers that cut the model."""
    for name, what in CUT.items():
        if os.environ.get(name, "").lower() == "true":
            raise ValueError(
                f"this launcher asks for {what}, which cuts the model: undula train spreads rows alone and keeps the "
                "model whole in each process. Start it with torchrun, or train in a loop of your own (docs: Several "
                "processes)"
            )
    if started() > 1 and count() == 1:
        from accelerate import PartialState

        PartialState(cpu=on_cpu(), timeout=PATIENCE)
    if count() != started():
        raise RuntimeError(apart(started(), count()))


def apart(asked: int, found: int) -> str:
    """That processes are not joined as they were started, in words."""
    return (
        f"the environment says that {asked} processes were started, and {found} are joined: they would train the same "
        "thing by themselves. Start them with torchrun --nproc-per-node N -m undula train ..., which sets WORLD_SIZE, "
        "RANK and LOCAL_RANK (for one process alone: unset WORLD_SIZE)"
    )


def on_cpu() -> bool:
    """Whether several processes train on the CPU: they have nothing else that could exchange gradients, or are to."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is None or device.type == "mps" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def by_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, told to all; they wait for it.  What it raises there is raised there, and
    `Elsewhere` in the others."""
    if count() == 1:
        return work()
    error: Exception | None = None
    told: list[T | str | None] = [None, None]
    if is_first():
        try:
            told[0] = work()
        except Exception as found:
            error, told[1] = found, f"{type(found).__name__}: {found}"
    dist.broadcast_object_list(told, 0)
    if error is not None:
        raise error
    if told[1] is not None:
        raise Elsewhere(f"the first process ended: {told[1]}")
    return told[0]  # type: ignore[return-value]


def first_then_all(work: Callable[[], T]) -> T:
    """`work` in every process, in the first before all others: what it downloads is there then, and what is wrong is
    said once."""
    found: list[T] = []
    by_first(lambda: found.append(work()))
    return found[0] if found else work()


def agreed(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag: whether it is set in any process.  `device` is one that the processes exchange tensors of."""
    if count() == 1:
        return flags
    t = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return [bool(flag) for flag in t.tolist()]


def wait() -> None:
    """Waits for all others."""
    if count() > 1:
        dist.barrier()


def launcher() -> str:
    """What stands before `undula` in a command that starts as many processes; empty for one."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    if started() == 1:
        return ""
    nodes = (
        ""
        if here in ("", str(started()))
        else f"--nnodes {started() // int(here)} --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
    )
    return f"torchrun {nodes}--nproc-per-node {here or started()} -m "
