"""One batch, many adapters: which rows go through which adapter, told once for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .kernels import reference
from .kernels.grouped import grouped, stacked
from .method import Factors, LowRank, Method
from .methods.dropout import bare
from .pool import Pool, Pools
from .sites import LinearView, adapted


class Base:
    """In the place of a method: the frozen layer alone."""

    def forward(self, x: Tensor, layer: LinearView, f: Factors) -> Tensor:
        return layer(x)


class Rows:
    """Row i of a batch goes through the law named names[i] of one layer; names without a law here pass the frozen layer
    alone.

    Low-rank laws share one frozen product and grouped low-rank ones; any other runs on its own rows.
    """

    def __init__(self, laws: Mapping[str, tuple[Method, Factors]], names: Sequence[str | None], device: torch.device):
        self.count = len(names)
        self.low: list[tuple[LowRank, Factors]] = []
        self.counts: list[int] = []
        self.other: list[tuple[Method, Factors, Tensor]] = []
        self.drops = any(bare(method) is not method for method, _ in laws.values())
        order: list[int] = []
        rows = rows_of(names)
        for name, (method, f) in laws.items():
            if isinstance(method, LowRank):
                self.low.append((method, f))
                self.counts.append(len(rows[name]))
                order += rows[name]
            else:
                self.other.append((method, f, torch.tensor(rows[name], device=device)))
        # None: the rows are sorted already and all of them low-rank, nothing need be moved
        self.order = None if order == list(range(self.count)) else torch.tensor(order, device=device)
        self._kept: tuple | None = None

    def forward(self, x: Tensor, layer: LinearView, f: Factors) -> Tensor:
        if not together(x, layer, self.count, self.drops):
            return self._one_by_one(x, layer)
        return self.added(layer(x), x, layer)

    def added(self, y: Tensor, x: Tensor, layer: LinearView) -> Tensor:
        """y, the frozen layer's output for x, with what these laws change."""
        if self.low:
            pairs, stacks = self._pairs()
            mine = x if self.order is None else x[self.order]
            y = changed(y, grouped(_flat(mine, pairs[0][1].dtype), pairs, self.counts, stacks), self.order)
        for method, own, index in self.other:
            y = y.index_copy(0, index, method.forward(x[index], layer, own))
        return y

    def _one_by_one(self, x: Tensor, layer: LinearView) -> Tensor:
        """Each adapter's own forward on its own rows: convolutions, embeddings, forwards of a class's own, dropout."""
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

    def _pairs(self) -> tuple:
        """(pairs, their stacks); kept where no gradient is wanted for as long as the factors stay, else made anew for
        every graph."""
        if torch.is_grad_enabled():
            return self._make()
        now = [(t.data_ptr(), None if t.is_inference() else t._version) for _, f in self.low for t in f.values()]
        if self._kept is None or self._kept[0] != now:
            self._kept = now, self._make()
        return self._kept[1]

    def _make(self) -> tuple:
        pairs = [method.pair(f) for method, f in self.low]
        return pairs, stacked(pairs, self.counts)


def rows_of(names: Sequence[str | None]) -> dict[str, list[int]]:
    """The rows of each name, in the order in which the names come."""
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name is not None:
            rows.setdefault(name, []).append(i)
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


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of any number of dimensions as (N, T, I)."""
    return x.reshape(x.shape[0], -1 if x.numel() else 1, x.shape[-1]).to(dtype)


def changed(y: Tensor, change: Tensor, order: Tensor | None) -> Tensor:
    """y with `change` (N, T, O) added to the rows `order`, or to all of them, in the wider type and rounded once."""
    change = change.view(change.shape[0], *y.shape[1:])
    if order is None:
        return reference.added(y, change) if torch.is_grad_enabled() else y.add_(change)
    if change.dtype == y.dtype:
        return y.index_add(0, order, change) if torch.is_grad_enabled() else y.index_add_(0, order, change)
    return y.index_copy(0, order, reference.added(y[order], change))


class Share:
    """The rows of a batch that go through the adapters of one pool, sorted by adapter."""

    def __init__(self, pool: Pool, count: int):
        self.pool, self.count = pool, count
        self.order: list[int] = []
        self.counts: list[int] = []
        self.at: list[int] = []  # rows of the pool
        self.adapters: list[Adapter] = []

    def add(self, adapter: Adapter, at: int, rows: list[int]) -> None:
        self.order += rows
        self.counts.append(len(rows))
        self.at.append(at)
        self.adapters.append(adapter)

    def settle(self) -> None:
        """What all layers will read: how the rows lie, and of which adapters' pairs a product is made."""
        K, N = len(self.at), len(self.order)
        self.equal = len(set(self.counts)) == 1
        self.each = not self.equal and N <= 2 * K  # mostly rows of their own: a pair for every row
        repeats = [k for k, n in enumerate(self.counts) for _ in range(n)] if self.each else list(range(K))
        at = [self.at[k] for k in repeats]
        self.index = None if self.order == list(range(self.count)) else torch.tensor(self.order)
        self.chosen = slice(at[0], at[-1] + 1) if at == list(range(at[0], at[0] + len(at))) else torch.tensor(at)
        self.repeats = torch.tensor(repeats) if self.each else None
        self._there: dict[torch.device, tuple[Tensor | None, Any, Tensor | None]] = {}

    def positions(self, device: torch.device) -> tuple[Tensor | None, Any, Tensor | None]:
        """(rows of the batch, rows of the pool, the adapter of each pair) on a device."""
        if device not in self._there:
            every = (self.index, self.chosen, self.repeats)
            self._there[device] = tuple(t.to(device) if isinstance(t, Tensor) else t for t in every)  # type: ignore[assignment]
        return self._there[device]

    def change(self, path: str, x: Tensor) -> Tensor:
        """s B A x of these rows at one site, (N, T, O)."""
        plain, (index, chosen, repeats) = self.pool.sites[path], self.positions(x.device)
        mine = _flat(x if index is None else x[index], plain.dtype)
        if torch.is_grad_enabled():
            A_KRI = torch.stack([a.factors[path][plain.A] for a in self.adapters])
            B_KOR = torch.stack([a.factors[path][plain.B] for a in self.adapters])
            if repeats is not None:
                A_KRI, B_KOR = A_KRI[repeats], B_KOR[repeats]
        else:
            A_KRI, B_KOR = self.pool.A[path].rows(chosen), self.pool.B[path].rows(chosen)
        if self.equal or self.each:
            z_KTR = torch.bmm(mine.reshape(len(A_KRI), -1, mine.shape[2]), A_KRI.transpose(1, 2))
            return torch.bmm(z_KTR * plain.s, B_KOR.transpose(1, 2)).view(*mine.shape[:2], B_KOR.shape[1])
        parts = zip(mine.split(self.counts), A_KRI.unbind(), B_KOR.unbind(), strict=True)
        return torch.cat([p @ A.t() * plain.s @ B.t() for p, A, B in parts])


class Route:
    """The rows of one batch, for all layers of one model: made when `undula.rows` is entered, and found by whatever
    computes in that context."""

    def __init__(
        self, host: Any, used: Mapping[str, Adapter], names: tuple[str | None, ...], pools: Pools, outer: Route | None
    ):
        self.host, self.used, self.names, self.outer = host, used, names, outer
        self.loose: dict[str, set[str]] = {}  # {adapter: its sites outside of a pool}
        self.laws: dict[tuple[str, bool], Rows | None] = {}
        shares: dict[int, Share] = {}
        rows = rows_of(names)
        for name, adapter in used.items():
            pooled = pools.of(name, adapter)
            if pooled is None:
                self.loose[name] = set(adapter.factors)
                continue
            pool, at = pooled
            if len(pool.sites) < len(adapter.factors):
                self.loose[name] = set(adapter.factors) - set(pool.sites)
            if id(pool) not in shares:
                shares[id(pool)] = Share(pool, len(names))
            shares[id(pool)].add(adapter, at, rows[name])
        self.shares = list(shares.values())
        for share in self.shares:
            share.settle()

    def forward(self, x: Tensor, layer: LinearView, path: str) -> Tensor:
        """What the layer at `path` computes of the batch."""
        here = [share for share in self.shares if path in share.pool.sites]
        loose = self._rows(path, layer, loose=True) if self.loose else None
        drops = any(share.pool.sites[path].drops for share in here) or (loose is not None and loose.drops)
        if not together(x, layer, len(self.names), drops):
            every = self._rows(path, layer, loose=False)
            return layer(x) if every is None else every.forward(x, layer, {})
        y = layer(x)
        for share in here:
            y = changed(y, share.change(path, x), share.positions(x.device)[0])
        return y if loose is None else loose.added(y, x, layer)

    def sites(self) -> dict[str, Adapter]:
        """The sites of the batch's adapters, each with one that has it."""
        loose = {path: self.used[name] for name, sites in self.loose.items() for path in sites}
        return loose | {path: share.adapters[0] for share in self.shares for path in share.pool.sites}

    def _rows(self, path: str, layer: LinearView, loose: bool) -> Rows | None:
        """The laws at one site, of all adapters or of those in no pool there; None where there are none."""
        if (path, loose) not in self.laws:
            names = [n for n, sites in self.loose.items() if path in sites] if loose else list(self.used)
            here = {n: self.used[n] for n in names if path in self.used[n].factors}
            laws = {n: (a.methods[path], a.factors[path]) for n, a in here.items()}
            self.laws[path, loose] = Rows(laws, self.names, layer.device) if laws else None
        return self.laws[path, loose]


class At:
    """A Route in the place of a layer's method."""

    def __init__(self, route: Route, path: str):
        self.route, self.path = route, path

    def forward(self, x: Tensor, layer: LinearView, f: Factors) -> Tensor:
        return self.route.forward(x, layer, self.path)


ROUTE: ContextVar[Route | None] = ContextVar("undula.rows", default=None)


def routes() -> Iterator[Route]:
    """The routes of this context, the innermost first."""
    route = ROUTE.get()
    while route is not None:
        yield route
        route = route.outer
