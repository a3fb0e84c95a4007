"""One data set as if clients had it: for experiments."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.choice import Choice
from ..core.ranges import Count, Few, Positive


class Split(Choice):
    """How rows are divided among so many clients."""

    clients: int

    @property
    def names(self) -> tuple[str, ...]:
        """What the clients are called."""
        return tuple(f"client-{i:0{len(str(self.clients))}}" for i in range(1, self.clients + 1))

    @abc.abstractmethod
    def parts(self, labels: Sequence[int] | None, rows: int, seed: int) -> list[list[int]]:
        """The numbers of each client's rows, rising; `labels` are the classes of the rows, where they have any.  Raises
        ValueError."""


@Split.register
@dataclass(frozen=True)
class Dirichlet(Split):
    """Of each class the shares that clients have are drawn from Dirichlet(alpha, ..., alpha) (Hsu, Qi, Brown 2019,
    arXiv:1909.06335): alpha 0.1 leaves most clients few classes, 100 gives all about the same.  Who would have fewer
    than `least` rows gets some of those who have the most."""

    alpha: Positive = 0.5
    clients: Few = 10
    least: Count = 8

    def parts(self, labels: Sequence[int] | None, rows: int, seed: int) -> list[list[int]]:
        if labels is None:
            raise ValueError('split: Dirichlet divides by classes, and these rows have none: take { is = "even" }')
        check_enough(rows, self.clients, self.least)
        draw, kinds = np.random.default_rng(seed), np.asarray(labels)
        found: list[list[int]] = [[] for _ in range(self.clients)]
        for kind in np.unique(kinds):
            (at,) = np.nonzero(kinds == kind)
            draw.shuffle(at)
            shares = draw.dirichlet(np.full(self.clients, self.alpha))
            ends = (np.cumsum(shares)[:-1] * len(at)).astype(int)
            for part, more in zip(found, np.split(at, ends), strict=True):
                part += more.tolist()
        for part in found:
            while len(part) < self.least:
                most = max(found, key=len)
                part.append(most.pop(int(draw.integers(len(most)))))
        return [sorted(part) for part in found]


@Split.register
@dataclass(frozen=True)
class Even(Split):
    """Rows by chance, as many for each client."""

    clients: Few = 10

    def parts(self, labels: Sequence[int] | None, rows: int, seed: int) -> list[list[int]]:
        check_enough(rows, self.clients, 1)
        order = np.random.default_rng(seed).permutation(rows)
        return [sorted(part.tolist()) for part in np.array_split(order, self.clients)]


def check_enough(rows: int, clients: int, least: int) -> None:
    """Raises ValueError."""
    if rows < clients * least:
        raise ValueError(f"split: {rows} training rows are too few for {clients} clients of {least} or more")
