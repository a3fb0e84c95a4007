"""The rows of a batch that go through adapters on a shelf.

Rows that follow each other through one adapter (a prompt) take two products with its rows of the tables, as they lie
there, into the output as it is: nothing is sorted, moved or copied.  Rows that stand alone (one token of each of many
requests) take two passes over the tables for all of them, whatever their adapters' ranks (see `kernels.bags`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.method import Method
from ..kernels import bags, reference
from ..kernels.autocast import exact
from .shelf import Held
from .tables import Kind, Shelf, Spot
from .views import LinearView

PAYS = 128  # rows in turn through one adapter are products of their own where there are so many, times the rank

Run = tuple[int, int]  # the first row, how many


@dataclass(frozen=True)
class Bend:
    """Edges whose values are bent together: z[start : start + n * r] of n rows."""

    bend: Method
    edges: slice
    r: int
    bent: tuple[tuple[str, Kind, Tensor], ...]  # (parameter, kind, its row for each of the n)


@dataclass(frozen=True)
class Singles:
    """Rows alone through adapters of one pair of kinds, as `kernels.bags` takes them."""

    A: Kind
    B: Kind
    rows_N: Tensor
    every: bool  # whether these are all rows of the batch, in turn
    rows_E: Tensor
    a_E: Tensor
    b_E: Tensor
    starts_N: Tensor
    s_E: Tensor | float | None  # None: 1
    bends: list[Bend]
    gains: tuple[Tensor, Tensor] | None  # (which of the N rows have one, where it lies in B)


@dataclass(frozen=True)
class Plan:
    """What is done at all sites at which the adapters of a batch lie at these spots."""

    sizes: list[int]  # of the pieces that the T rows are cut into
    runs: list[tuple[int, Run, Spot]]  # (which piece, its rows, where its adapter lies)
    singles: list[Singles]
    order: Tensor | None  # the rows of the runs in turn, where gradients are wanted


class Shelved:
    """Rows of one batch, in runs through adapters of one shelf."""

    def __init__(self, shelf: Shelf, count: int):
        self.shelf, self.count = shelf, count
        self.sites = shelf.tables
        self.adapters: list[Held] = []
        self.alike = True  # whether each adapter lies at one spot at all of its sites, so that one plan is that of all
        self.runs: list[tuple[int, Run]] = []  # (number of the adapter, its rows)
        self._plans: dict[tuple[str, int, bool], Plan] = {}
        self._alike: dict[tuple, Plan] = {}

    def add(self, adapter: Held, rows: Sequence[int]) -> None:
        k = len(self.adapters)
        self.adapters.append(adapter)
        self.alike = self.alike and adapter.alike
        start = before = rows[0]
        for row in [*rows[1:], -1]:
            if row != before + 1:
                self.runs.append((k, (start, before + 1 - start)))
                start = row
            before = row

    def drops(self, path: str) -> bool:
        return any(a.spots[path].drops for a in self.adapters)

    def changed(self, path: str, x_TI: Tensor, y_TO: Tensor, times: int, layer: LinearView) -> Tensor:
        """y, the frozen layer's output for x, with what these adapters change of it at one site.  Each row of the
        batch has `times` of the T tokens.  Without gradients y is written into."""
        tables, bias = self.shelf.tables[path], layer.bias
        grad = torch.is_grad_enabled()
        plan = self._plans.get((path, times, grad)) or self._plan(path, times, grad, x_TI.device)
        changes: list[Tensor] = []
        with exact(x_TI.device):
            xs, ys = (x_TI.split(plan.sizes), y_TO.split(plan.sizes)) if plan.runs else ((), ())
            for at, _, spot in plan.runs:
                x_NI, y_NO = xs[at], ys[at]
                z_NR, B_RO = _down(x_NI, tables, spot), tables[spot.B].narrow(0, spot.b, spot.r)
                if not grad and not spot.gain and B_RO.dtype == y_TO.dtype:
                    y_NO.addmm_(z_NR, B_RO, alpha=spot.s)
                    continue
                c_NO = (z_NR * spot.s) @ B_RO
                if spot.gain:
                    c_NO = _gained(c_NO, tables[spot.B][spot.b + spot.r], y_NO, bias)
                if grad:
                    changes.append(c_NO)
                else:
                    y_NO.add_(c_NO)
            for part in plan.singles:
                _add_singles(part, tables, x_TI, y_TO, bias)
        return y_TO if plan.order is None else _added(y_TO, changes, plan.order)

    def _plan(self, path: str, times: int, grad: bool, device: torch.device) -> Plan:
        """The plan of a site, which is that of all sites at which the adapters lie at equal spots."""
        key = times, grad, device, *(() if self.alike else (id(a.spots[path]) for a in self.adapters))
        if key not in self._alike:
            spots = [a.spots[path] for a in self.adapters]
            with torch.inference_mode(False):  # a later forward of the batch may want gradients
                self._alike[key] = _planned(self.runs, spots, self.count, times, grad, device)
        self._plans[path, times, grad] = self._alike[key]
        return self._alike[key]


def _planned(
    found: list[tuple[int, Run]], spots: list[Spot], count: int, times: int, grad: bool, device: torch.device
) -> Plan:
    sizes: list[int] = []
    runs: list[tuple[int, Run, Spot]] = []
    single: dict[tuple[Kind, Kind], list[tuple[int, Spot]]] = {}
    for k, (first, rows) in sorted(found, key=lambda each: each[1]):
        spot, start, n = spots[k], first * times, rows * times
        if grad or (n > 1 and n * spot.r >= PAYS):
            sizes += [start - sum(sizes), n]
            runs.append((len(sizes) - 1, (start, n), spot))
        else:
            single.setdefault((spot.A, spot.B), []).extend((row, spot) for row in range(start, start + n))
    sizes.append(count * times - sum(sizes))
    singles = [_singles(part, kinds, count * times, device) for kinds, part in single.items()]
    order = [row for _, (start, n), _ in runs for row in range(start, start + n)]
    return Plan(sizes, runs, singles, torch.tensor(order, device=device) if grad and runs else None)


def _singles(part: list[tuple[int, Spot]], kinds: tuple[Kind, Kind], T: int, device: torch.device) -> Singles:
    def whole(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    alike: dict[tuple, list[tuple[int, Spot]]] = {}  # those of one bend stand together
    for row, spot in part:
        alike.setdefault((spot.r, spot.bend, tuple(kind for _, kind, _ in spot.bent)), []).append((row, spot))
    if len(alike) > 1 or any(bend is not None for _, bend, _ in alike):
        part = [each for group in alike.values() for each in group]
    starts = [0]
    for _, spot in part:
        starts.append(starts[-1] + spot.r)
    bends, at = [], 0
    for (r, bend, _), group in alike.items():
        if bend is not None:
            names = [(name, kind) for name, kind, _ in group[0][1].bent]
            bent = tuple(
                (name, kind, whole([spot.bent[i][2] for _, spot in group])) for i, (name, kind) in enumerate(names)
            )
            bends.append(Bend(bend, slice(starts[at], starts[at + len(group)]), r, bent))
        at += len(group)
    scales = [spot.s for _, spot in part for _ in range(spot.r)]
    s_E: Tensor | float | None = scales[0] if scales and len(set(scales)) == 1 else None
    if len(set(scales)) > 1:
        s_E = torch.tensor(scales, device=device, dtype=kinds[0].dtype)
    elif s_E == 1.0:
        s_E = None
    gains = [(i, spot.b + spot.r) for i, (_, spot) in enumerate(part) if spot.gain]
    rows = [row for row, _ in part]
    return Singles(
        *kinds,
        rows_N=whole(rows),
        every=rows == list(range(T)),
        rows_E=whole([row for row, spot in part for _ in range(spot.r)]),
        a_E=whole([c for _, spot in part for c in range(spot.a, spot.a + spot.r)]),
        b_E=whole([c for _, spot in part for c in range(spot.b, spot.b + spot.r)]),
        starts_N=whole(starts[:-1]),
        s_E=s_E,
        bends=bends,
        gains=(whole([i for i, _ in gains]), whole([b for _, b in gains])) if gains else None,
    )


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to`, which takes microseconds to do nothing."""
    return t if t.dtype == dtype else t.to(dtype)


def _down(x_NI: Tensor, tables: dict[Kind, Tensor], spot: Spot) -> Tensor:
    """bend(A x) of rows through one adapter."""
    A_RI = tables[spot.A].narrow(0, spot.a, spot.r)
    z_NR = F.linear(_as(x_NI, A_RI.dtype), A_RI)
    if spot.bend is not None:
        z_NR = spot.bend.bent(z_NR, {name: tables[kind][row].view(kind.shape) for name, kind, row in spot.bent})
    return _as(z_NR, tables[spot.B].dtype)


def _gained(c_NO: Tensor, gain: Tensor, y_NO: Tensor, bias: Tensor | None) -> Tensor:
    """g (y - b + c) + b, as what it adds to y."""
    y_NO = y_NO if bias is None else y_NO - bias
    return (gain * c_NO + (gain - 1) * y_NO).to(c_NO.dtype)


def _add_singles(part: Singles, tables: dict[Kind, Tensor], x_TI: Tensor, y_TO: Tensor, bias: Tensor | None) -> None:
    A_CI, B_CO = tables[part.A], tables[part.B]
    z_E = bags.down(_as(x_TI, A_CI.dtype), A_CI, part.a_E, part.rows_E)
    for b in part.bends:
        parameters = {name: tables[kind][rows].view(-1, *kind.shape) for name, kind, rows in b.bent}
        z_N1R = z_E[b.edges].view(-1, 1, b.r)
        z_E[b.edges] = torch.vmap(b.bend.bent)(z_N1R, parameters).flatten()
    if part.s_E is not None:
        z_E.mul_(part.s_E)
    c_NO = bags.up(_as(z_E, B_CO.dtype), B_CO, part.b_E, part.starts_N)
    if part.gains is not None:
        which, cells = part.gains
        y_NO = y_TO[part.rows_N[which]]
        c_NO[which] = _gained(c_NO[which], B_CO[cells], y_NO, bias)
    if part.every:
        y_TO.add_(c_NO)
    elif c_NO.dtype == y_TO.dtype:
        y_TO.index_add_(0, part.rows_N, c_NO)
    else:
        y_TO.index_copy_(0, part.rows_N, reference.added(y_TO[part.rows_N], c_NO))


def _added(y_TO: Tensor, changes: list[Tensor], order: Tensor) -> Tensor:
    """y with the rows `order` changed, differentiably."""
    change = torch.cat(changes)
    if change.dtype == y_TO.dtype:
        return y_TO.index_add(0, order, change)
    return y_TO.index_copy(0, order, reference.added(y_TO[order], change))
