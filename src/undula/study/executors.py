"""Where the runs of a study are made: in this process, or on a Ray cluster."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .sources import Sources
from .trial import Trial, perform

Rivals = Sequence[Sequence[tuple[int, float]]]
Heard = Callable[[int, int], None]


@dataclass(frozen=True)
class Order:
    """A run that was claimed: `rivals` and `halving` as in `Watch`; `sources`: what this process has read already."""

    trial: Trial
    halving: int | None = None
    rivals: Rivals = ()
    sources: Sources | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Ended:
    """A run that came to an end: its figures, or why it failed."""

    order: Order
    result: Mapping[str, Any] | None
    error: str | None


def make(order: Order, heard: Heard = lambda *_: None) -> Ended:
    """Makes one run.  An error of the run is its outcome; Ctrl-C is not caught."""
    from .watch import Watch

    watch = Watch(heard, order.halving, order.rivals)
    try:
        return Ended(order, perform(order.trial, watch, order.sources), None)
    except Exception as error:  # whatever one configuration does must not stop the others
        return Ended(order, None, f"{type(error).__name__}: {error}")


class Executor(abc.ABC):
    """Takes up to `slots` orders at a time."""

    slots: int

    @abc.abstractmethod
    def submit(self, order: Order) -> None:
        """Begins a run, or notes it."""

    @abc.abstractmethod
    def wait(self, heard: Heard) -> Ended:
        """The next run that ends.  Called only while there is one."""

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of what the executor holds."""


class Local(Executor):
    """One run at a time, in this process."""

    slots = 1

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def submit(self, order: Order) -> None:
        self.orders.append(order)

    def wait(self, heard: Heard) -> Ended:
        return make(self.orders.pop(0), heard)

    def close(self) -> None:
        self.orders.clear()


class Ray(Executor):
    """Runs as Ray tasks of `cpus` (and `gpus`) each, `slots` at a time.

    `address`: of a cluster (None: the one that RAY_ADDRESS names, else a new local one with `slots` workers).  Models
    and data must be readable where the tasks run.  Needs the package `ray` (extra `undula[ray]`).
    """

    def __init__(self, slots: int = 2, cpus: float = 1, gpus: float = 0, address: str | None = None):
        if slots < 1:
            raise ValueError(f"at least one run at a time, found slots={slots}")
        import ray

        self.ray, self.slots = ray, slots
        self.own = not ray.is_initialized()
        if self.own:
            where: dict[str, Any] = {"address": address} if address else {}
            if not address and "RAY_ADDRESS" not in os.environ:
                where = {"num_cpus": max(1, round(slots * cpus)), "include_dashboard": False}
            ray.init(log_to_driver=False, configure_logging=False, **where)
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_remote)
        self.running: dict[Any, Order] = {}

    def submit(self, order: Order) -> None:
        self.running[self.task.remote(order.trial.encode(), order.halving, order.rivals)] = order

    def wait(self, heard: Heard) -> Ended:
        (ready, *_), _ = self.ray.wait(list(self.running), num_returns=1)
        order = self.running.pop(ready)
        try:
            result, error = self.ray.get(ready)
        except self.ray.exceptions.RayError as broken:  # the worker died
            result, error = None, f"{type(broken).__name__}: {broken}"
        return Ended(order, result, error)

    def close(self) -> None:
        for task in self.running:
            self.ray.cancel(task, force=True)
        if self.own:
            self.ray.shutdown()


def _remote(
    encoded: dict[str, Any], halving: int | None, rivals: Rivals
) -> tuple[Mapping[str, Any] | None, str | None]:
    ended = make(Order(Trial.decode(encoded), halving, rivals))
    return ended.result, ended.error
