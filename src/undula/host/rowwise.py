"""One adapted layer, a batch whose rows have laws of their own there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.method import Factors, LowRank, Method
from ..kernels import draws
from ..kernels.grouped import grouped, stacked
from .share import Kept, changed, flat
from .views import LinearView, adapted


class Base:
    """In the place of a method: the frozen layer alone."""

    def forward(self, x: Tensor, layer: LinearView, f: Factors) -> Tensor:
        return layer(x)


class Done:
    """A layer whose output for x is there already; what methods ask of a layer beside is the layer's own."""

    plain = False  # nothing is gained by a product that computes y again

    def __init__(self, layer: LinearView, y: Tensor):
        self.layer, self.y = layer, y

    def __call__(self, x: Tensor) -> Tensor:
        return self.y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class Rows:
    """Row i of a batch goes through the law of its name at one layer; names without a law here pass the frozen layer
    alone.

    Low-rank laws share one frozen product and grouped low-rank ones; any other runs on its own rows.
    """

    def __init__(
        self,
        laws: Mapping[str, tuple[Method, Factors]],
        rows: Mapping[str, list[int]],
        count: int,
        device: torch.device,
        placed: dict[tuple[Any, ...], Tensor] | None = None,  # the places of rows: of one batch they serve all layers
    ):
        self.count = count
        placed = {} if placed is None else placed

        def place(names: tuple[str, ...], order: list[int]) -> Tensor:
            if (device, *names) not in placed:  # each is copied to the device, which a step waits for
                placed[device, *names] = torch.tensor(order, device=device)
            return placed[device, *names]

        self.low: list[tuple[LowRank, Factors]] = []
        self.counts: list[int] = []
        self.other: list[tuple[Method, Factors, Tensor]] = []
        self.names = [name for low in (True, False) for name, (m, _) in laws.items() if isinstance(m, LowRank) == low]
        self.drops = any(method.drops for method, _ in laws.values())
        order: list[int] = []
        low: list[str] = []
        for name, (method, f) in laws.items():
            if isinstance(method, LowRank):
                self.low.append((method, f))
                self.counts.append(len(rows[name]))
                order += rows[name]
                low.append(name)
            else:
                self.other.append((method, f, place((name,), rows[name])))
        # None: the rows are sorted already and all of them low-rank, nothing need be moved
        self.order = None if order == list(range(self.count)) else place(tuple(low), order)
        self._kept = Kept()

    def forward(self, x: Tensor, layer: LinearView, f: Factors) -> Tensor:
        if not together(x, layer, self.count, self.drops):
            return self._one_by_one(x, layer)
        return self.added(layer(x), x, layer)

    def added(self, y: Tensor, x: Tensor, layer: LinearView) -> Tensor:
        """y, the frozen layer's output for x, with what these laws change."""
        if self.low:
            pairs, stacks = self._kept.of([t for _, f in self.low for t in f.values()], self._stacked)
            mine = x if self.order is None else x[self.order]
            y = changed(y, grouped(flat(mine).to(pairs[0][1].dtype), pairs, self.counts, stacks), self.order)
        for method, own, index in self.other:
            at = Done(layer, y[index]) if method.bottleneck else layer  # one that needs W forms it with its change
            y = y.index_copy(0, index, method.forward(x[index], at, own))
        return y

    def _one_by_one(self, x: Tensor, layer: LinearView) -> Tensor:
        """Each adapter's own forward on its own rows: convolutions, embeddings, forwards of a class's own, dropout."""
        y = layer(x)
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
            raise TypeError(f"{layer.call.__qualname__} does not give a row for each row: not within `rows`")
        order = torch.arange(self.count, device=x.device) if self.order is None else self.order
        low = [(m, f, rows) for (m, f), rows in zip(self.low, order.split(self.counts), strict=True)]
        for name, (method, own, index) in zip(self.names, low + self.other, strict=True):
            more, named = layer.more or ((), {})
            args = (x[index], *(self._of_rows(t, index) for t in more))
            by_name = {k: self._of_rows(t, index) for k, t in named.items()}
            with draws.among(name):
                mine = adapted(method, layer.with_more((), {}), own, args, by_name)
            y = y.index_copy(0, index, mine)
        return y

    def _of_rows(self, given: Any, index: Tensor) -> Any:
        """The part of some rows in what a layer is called with beside x.  Raises TypeError for a vector that may be one
        number a row or one a channel."""
        if not isinstance(given, Tensor) or given.shape[:1] != (self.count,):
            return given
        if given.ndim == 1 and self.count > 1:
            raise TypeError(
                f"a layer is called with a vector of {self.count} numbers beside x, as many as there are rows: within "
                "`rows` it is not known whether each is of a row or of a channel"
            )
        return given[index]

    def _stacked(self) -> tuple:
        pairs = [method.pair(f) for method, f in self.low]
        return pairs, stacked(pairs, self.counts)


def rows_of(names: Sequence[str | None], tokens: Sequence[int] | None) -> dict[str, list[int]]:
    """The rows of each name, in the order in which the names come; with `tokens` so many rows for each."""
    rows: dict[str, list[int]] = {}
    at = 0
    for name, count in zip(names, (1,) * len(names) if tokens is None else tokens, strict=True):
        if name is not None and count:
            rows.setdefault(name, []).extend(range(at, at + count))
        at += count
    return rows


def together(x: Tensor, layer: LinearView, count: int, drops: bool) -> bool:
    """Whether the rows of all adapters may share the frozen product.  Raises ValueError for a batch of another size."""
    if x.shape[0] != count:
        raise ValueError(
            f"rows() was given {count} names, this layer sees a batch of {x.shape[0]}: give one name per row "
            "of the batch (generation with several beams or returned sequences multiplies the rows)"
        )
    linear = layer.channel == -1 and x.is_floating_point() and layer.product and layer.more is None
    return linear and not (drops and layer.training)
