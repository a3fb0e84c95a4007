"""One batch, many adapters: which rows go through which adapter, told once for all layers."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Factors, Method
from .rowwise import Rows, rows_of, together
from .share import Form, Share, changed, flat
from .shelf import Held
from .shelved import Shelved
from .views import LinearView

numbers = itertools.count(1)


class Route:
    """The rows of one batch, for all layers of one model: made when `undula.rows` is entered, and found by whatever
    computes in that context.  With `tokens` the batch is flat, and its rows are tokens: names[i] has tokens[i] of
    them."""

    def __init__(
        self,
        host: Any,
        used: Mapping[str, Adapter],
        names: tuple[str | None, ...],
        tokens: tuple[int, ...] | None,
        formed: Callable[[str], Form],
    ):
        self.host, self.used, self.names, self.tokens = host, used, names, tokens
        self.count = len(names) if tokens is None else sum(tokens)
        self.within: dict[tuple, Route] = {}  # those of blocks within this one that were left
        self.ready: set[str] = set()  # adapters whose layers are ready within the block, those of blocks around it too
        self.owed = False  # whether layers wait to be computed again, see `forward`
        self.loose: dict[str, set[str]] = {}  # {adapter: its sites that are no plain pair}
        self.laws: dict[tuple[str, bool], Rows | None] = {}
        self.rows = rows_of(names, tokens)
        self._orders: dict[tuple[Any, ...], Tensor | None] = {}
        self._placed: dict[tuple[Any, ...], Tensor] = {}
        self._here: dict[str, tuple[list[Share], list[Shelved]]] = {}  # what is at each site that was computed
        shares: dict[tuple[int, int], Share] = {}
        shelved: dict[int, Shelved] = {}
        for name, rows in self.rows.items():
            adapter = used[name]
            if isinstance(adapter, Held):
                placed = set(adapter.spots)
                shelf = adapter.shelf
                if shelf is not None:
                    if id(shelf) not in shelved:
                        shelved[id(shelf)] = Shelved(shelf, self.count)
                    shelved[id(shelf)].add(adapter, rows)
            else:
                plain = formed(name)
                placed = {p.path for p in plain}
                if plain:
                    alike = id(plain), len(rows)
                    shares.setdefault(alike, Share(plain, len(rows))).add(adapter, rows)
            if len(placed) < len(adapter.factors):
                self.loose[name] = set(adapter.factors) - placed
        self.shares, self.shelved = list(shares.values()), list(shelved.values())
        self.entered()

    def entered(self) -> None:
        """A block of it begins, here and now."""
        self.number, self.thread, self.frame = next(numbers), threading.get_ident(), _entering()

    def forward(self, x: Tensor, layer: LinearView, path: str) -> Tensor:
        """What the layer at `path` computes of the batch."""
        # reentrant gradient checkpointing: first without gradients, from inputs that want them, then in the backward
        if x.requires_grad and not torch.is_grad_enabled():
            self.owed = True
        found = self._here.get(path)
        if found is None:
            found = self._here[path] = (
                [share for share in self.shares if path in share.sites],
                [each for each in self.shelved if path in each.sites],
            )
        here, shelved = found
        loose = self._rows(path, layer, loose=True) if self.loose else None
        if not here and not shelved and loose is None:
            return layer(x)
        shape = x.shape
        if self.tokens is not None:
            x = x.flatten(0, -2) if x.is_floating_point() else x.flatten()
            self._check_flat(x, layer)
        drops = layer.training and (
            any(share.sites[path].drops for share in here)
            or any(each.drops(path) for each in shelved)
            or (loose is not None and loose.drops)
        )
        if together(x, layer, self.count, drops):
            y = layer(x)
            if shelved:
                times, whole = math.prod(x.shape[1:-1]), y.shape
                x_TI, y = (t if t.ndim == 2 else t.reshape(-1, t.shape[-1]) for t in (x, y))
                for each in shelved:
                    y = each.changed(path, x_TI, y, times, layer)
                y = y.view(whole)
            y = self._changed(y, x, here, path) if here else y
            y = y if loose is None else loose.added(y, x, layer)
        else:
            every = self._rows(path, layer, loose=False)
            assert every is not None
            y = every.forward(x, layer, {})
        if self.tokens is None:
            return y
        return y.reshape(*(shape[:-1] if x.is_floating_point() else shape), y.shape[-1])

    def _check_flat(self, x: Tensor, layer: LinearView) -> None:
        """Raises ValueError for a layer that sees other tokens than the flat batch has, TypeError for one that does not
        take them one by one."""
        if x.shape[0] != self.count:
            raise ValueError(
                f"rows() was given {self.count} tokens in all, this layer sees {x.shape[0]}: an adapted layer has to "
                "see all tokens of the flat batch (leave out of the adapters what sees a part of them, as a head may)"
            )
        if layer.channel != -1 or layer.more is not None or not (layer.product or not x.is_floating_point()):
            raise TypeError(
                f"{layer.call.__qualname__} is no product of single tokens: not within `rows` of a flat batch"
            )

    def _changed(self, y: Tensor, x: Tensor, here: list[Share], path: str) -> Tensor:
        """y with what plain pairs change: the rows are moved once for all of them."""
        order = self._order(here, x.device)
        mine = flat(x if order is None else x[order])
        sizes = [len(share.rows) for share in here]
        changes = [share.change(path, part) for share, part in zip(here, mine.split(sizes), strict=True)]
        return changed(y, changes[0] if len(changes) == 1 else torch.cat(changes), order)

    def _order(self, here: list[Share], device: torch.device) -> Tensor | None:
        """The rows of these shares in turn; None where that is the whole batch as it is."""
        key = device, *map(id, here)
        if key not in self._orders:
            order = [row for share in here for row in share.rows]
            with torch.inference_mode(False):  # a later forward of the batch may want gradients
                as_it_is = order == list(range(self.count))
                self._orders[key] = None if as_it_is else torch.tensor(order, device=device)
        return self._orders[key]

    def law(self, path: str) -> tuple[Method, Factors] | None:
        """What makes the weight at `path`, of a batch with one name for all rows; None where that is the base's."""
        adapter = self.used.get(self.names[0]) if len(set(self.names)) == 1 else None  # type: ignore[arg-type]
        return (
            None if adapter is None or path not in adapter.factors else (adapter.methods[path], adapter.factors[path])
        )

    def sites(self) -> list[tuple[str, Adapter]]:
        """The sites of the batch's adapters, of equal forms those of the first."""
        loose = [(path, self.used[name]) for name, sites in self.loose.items() for path in sites]
        shared = [(path, share.adapters[0]) for share in self.shares for path in share.sites]
        return loose + shared + [(path, each.adapters[0]) for each in self.shelved for path in each.sites]

    def _rows(self, path: str, layer: LinearView, loose: bool) -> Rows | None:
        """The laws at one site, of all adapters or of those that are no plain pair; None where there are none."""
        if (path, loose) not in self.laws:
            names = [n for n, sites in self.loose.items() if path in sites] if loose else list(self.rows)
            here = {n: self.used[n] for n in names if path in self.used[n].factors}
            laws = {n: _law(a, path, loose) for n, a in here.items()}
            with torch.inference_mode(False):
                self.laws[path, loose] = self._rows_of(laws, layer.device) if laws else None
        return self.laws[path, loose]

    def _rows_of(self, laws: Mapping[str, tuple[Method, Factors]], device: torch.device) -> Rows:
        return Rows(laws, self.rows, self.count, device, self._placed)


def _law(adapter: Adapter, path: str, product: bool) -> tuple[Method, Factors]:
    """What makes the outputs of a layer; of a product it may be a weight that is there already."""
    copies = adapter.copies if product and isinstance(adapter, Held) else {}
    return copies.get(path, adapter.methods[path]), adapter.factors[path]


class Routing(Protocol):
    """What tells a layer its route: the host."""

    routed: bool

    def route(self, slot: Any) -> Route | None: ...


class At:
    """A Route in the place of a layer's method."""

    def __init__(self, route: Route, path: str):
        self.route, self.path = route, path

    def forward(self, x: Tensor, layer: LinearView, f: Factors) -> Tensor:
        return self.route.forward(x, layer, self.path)


ROUTES: ContextVar[tuple[Route, ...]] = ContextVar("undula.rows", default=())  # of this context, the last entered last

GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def _frames() -> list[FrameType]:
    frame, found = sys._getframe(1), []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _entering() -> int | None:
    """The generator that enters `rows`, None where no generator does: it may be left and come back to."""
    own = (contextlib.__file__, __file__, str(Path(__file__).with_name("mixing.py")))
    outside = next((f for f in _frames() if f.f_code.co_filename not in own), None)
    return id(outside) if outside is not None and outside.f_code.co_flags & GENERATOR else None


def innermost(routes: Sequence[Route]) -> Route:
    """The route that counts.  Raises RuntimeError where that is one of a generator that waits while another's block is
    gone on with: both share the context of their caller."""
    last = routes[-1]
    if last.frame is not None and len(routes) > 1:
        running = {id(frame) for frame in _frames()}
        if last.frame not in running and any(r.frame in running for r in routes):
            raise RuntimeError(
                "two generators are inside `undula.rows` of one model in turns, and the one that goes on now is not "
                "the one that entered last: collect each one's outputs within its block, or give each a thread or task"
            )
    return last
