"""One batch, many adapters: the law of a layer while `undula.rows` is entered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import reference
from .kernels.grouped import grouped, stacked
from .method import Factors, LowRank, Method
from .sites import LinearView, adapted


class Rows:
    """Row i of a batch goes through the law named names[i]; names without a law here pass the frozen layer alone.

    Low-rank laws share one frozen product and grouped low-rank ones; any other runs on its own rows.
    """

    def __init__(self, laws: Mapping[str, tuple[Method, Factors]], names: Sequence[str | None], device: torch.device):
        self.count = len(names)
        self.low: list[tuple[LowRank, Factors]] = []
        self.counts: list[int] = []
        self.other: list[tuple[Method, Factors, Tensor]] = []
        order: list[int] = []
        for name, (method, f) in laws.items():
            mine = [i for i, n in enumerate(names) if n == name]
            if isinstance(method, LowRank):
                self.low.append((method, f))
                self.counts.append(len(mine))
                order += mine
            else:
                self.other.append((method, f, torch.tensor(mine, device=device)))
        # None: the rows are sorted already and all of them low-rank, nothing need be moved
        self.order = None if order == list(range(self.count)) else torch.tensor(order, device=device)
        self._kept: tuple | None = None

    def forward(self, x: Tensor, layer: LinearView, f: Factors) -> Tensor:
        if x.shape[0] != self.count:
            raise ValueError(
                f"rows() was given {self.count} names, this layer sees a batch of {x.shape[0]}: give one name per row "
                "of the batch (generation with several beams or returned sequences multiplies the rows)"
            )
        plain = layer.product and layer.more is None
        if layer.channel != -1 or not x.is_floating_point() or layer.training or not plain:
            return self._one_by_one(x, layer)
        y = layer(x)
        if self.low:
            y = self._grouped(x, y)
        for method, own, index in self.other:
            y = y.index_copy(0, index, method.forward(x[index], layer, own))
        return y

    def _one_by_one(self, x: Tensor, layer: LinearView) -> Tensor:
        """Each adapter's own forward on its own rows: convolutions, embeddings, forwards of a class's own, and training
        (dropout)."""
        y = layer(x)
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
            raise TypeError(f"{layer.call.__qualname__} does not give a row for each row: not within `rows`")
        order = torch.arange(self.count, device=x.device) if self.order is None else self.order
        low = [(m, f, rows) for (m, f), rows in zip(self.low, order.split(self.counts), strict=True)]
        for method, own, index in low + self.other:
            more, named = layer.more or ((), {})
            args = (x[index], *(self._of_rows(t, index) for t in more))
            by_name = {k: self._of_rows(t, index) for k, t in named.items()}
            y = y.index_copy(0, index, adapted(method, layer.with_more((), {}), own, args, by_name))
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

    def _grouped(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, stacks = self._pairs()
        mine = x if self.order is None else x[self.order]
        dtype = pairs[0][1].dtype
        change = grouped(mine.reshape(mine.shape[0], -1, x.shape[-1]).to(dtype), pairs, self.counts, stacks)
        change = change.view(*mine.shape[:-1], change.shape[-1])
        if self.order is None:
            return reference.added(y, change) if torch.is_grad_enabled() else y.add_(change)
        if change.dtype == y.dtype:
            return y.index_add(0, self.order, change)
        return y.index_copy(0, self.order, reference.added(y[self.order], change))  # rounded once

    def _pairs(self) -> tuple:
        """(pairs, their stacks); kept where no gradient is wanted for as long as the factors stay, else made anew for
        every graph."""
        if torch.is_grad_enabled():
            self._kept = None
            return self._make()
        now = [(t.data_ptr(), None if t.is_inference() else t._version) for _, f in self.low for t in f.values()]
        if self._kept is None or self._kept[0] != now:
            self._kept = now, self._make()
        return self._kept[1]

    def _make(self) -> tuple:
        pairs = [method.pair(f) for method, f in self.low]
        return pairs, stacked(pairs, self.counts)
