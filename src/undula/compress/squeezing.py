"""squeeze: an adapter of less rank with the same update as nearly as can be (LoRA-Squeeze).

    dW = B A,  B = Q_B R_B,  A' = Q_A R_A,  R_B R_A' = U S V'   ->   B_k = Q_B U_k sqrt(S_k),  A_k = sqrt(S_k) V_k' Q_A'

Of all matrices of rank k this one is nearest (Eckart and Young 1936) and misses sqrt(sum_{i > k} s_i^2), which is known
before anything is written.  Source: Vulic, Grycner, de Laroussilhe, Pfeiffer 2026, arXiv:2602.10993 (Post-Squeeze),
there by a decomposition of the whole matrix.

Open in the paper and settled here: every scale (alpha / r, rsLoRA's) is taken into the update before it is cut, and the
result has alpha = r, so that its factors are the update and no reader's scale can change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Factors, Method
from ..host.sharded import check_whole
from ..io.native import bytes_of
from ..kernels import svd
from ..kernels.solver import Randomised, Solver
from ..methods.lora import LoRA
from .spectrum import Spectrum
from .targets import EachSite, Target
from .updates import Update, around, beside, inside, update_of

Seen = Callable[[str], object]


@dataclass(frozen=True)
class Squeezed:
    """A squeezed adapter and what that cost.

    errors[site] = ||dW - dW_k|| / ||dW||, from the singular values; `error` the same over all sites together.  Stored
    in 16 bits, what rounding adds is in it.  Of DoRA it is the error of the update inside.  ranks[site] is its new
    rank, 0 where the site was left out; `bytes` what `Adapter.save` writes, before and after.
    """

    adapter: Adapter
    errors: dict[str, float]
    error: float
    ranks: dict[str, int]
    bytes: tuple[int, int]


@torch.no_grad()
def squeeze(adapter: Adapter, target: Target, *, solver: Solver = Randomised(), seen: Seen | None = None) -> Squeezed:
    """The adapter at the ranks that `target` asks for; see `undula.compress.squeeze`."""
    adapter.check_usable()
    check_whole(adapter.parameters(), "squeezing")
    for site, method in adapter.methods.items():
        inside(site, method)  # what cannot be squeezed is told before anything is computed
    units = _units(adapter)
    tell = seen or (lambda _: None)

    def update(site: str) -> Update:
        return _update(adapter, site, solver)

    made: dict[str, _Cut] = {}
    if isinstance(target, EachSite):
        for unit in units:
            found = update(unit[0])
            k = target.at(found.spectrum(_bytes(adapter, unit[0])))
            made |= dict.fromkeys(unit, _cut(adapter, unit[0], found, k))
            tell(unit[0])
    else:
        ranks = _shared_out(adapter, target, units, update)
        for unit in units:
            made |= dict.fromkeys(unit, _cut(adapter, unit[0], update(unit[0]), ranks[unit[0]]))
            tell(unit[0])
    made = {site: made[site] for site in adapter.methods}
    squeezed = _assembled(adapter, {s: cut for s, cut in made.items() if cut.f is not None})
    error = relative(sum(c.missed for c in made.values()), sum(c.whole for c in made.values()))
    return Squeezed(
        squeezed,
        {s: relative(c.missed, c.whole) for s, c in made.items()},
        error,
        {s: c.rank for s, c in made.items()},
        (bytes_of(adapter), bytes_of(squeezed)),
    )


@dataclass(frozen=True, eq=False)
class _Cut:
    """What has become of a site."""

    method: Method
    f: Factors | None
    rank: int
    missed: float
    whole: float


def _units(adapter: Adapter) -> list[tuple[str, ...]]:
    """The sites, those together that share one method and all of their factors: they go on sharing them."""
    found: dict[Any, list[str]] = {}
    for site, f in adapter.factors.items():
        key = adapter.methods[site], adapter.shapes[site], adapter.kernels.get(site), tuple(id(t) for t in f.values())
        found.setdefault(key, []).append(site)
    return [tuple(sites) for sites in found.values()]


def padding_of(adapter: Adapter, site: str) -> int | None:
    """The column of an embedding's update that stays zero."""
    kernel = adapter.kernels.get(site)
    return kernel[0] if kernel is not None and len(kernel) == 1 else None


def _update(adapter: Adapter, site: str, solver: Solver) -> Update:
    return update_of(
        site, adapter.methods[site], adapter.factors[site], adapter.shapes[site], padding_of(adapter, site), solver
    )


def dtype_of(f: Factors) -> torch.dtype:
    """The type in which a site's numbers are stored."""
    return next((t.dtype for t in f.values() if t.is_floating_point()), torch.float32)


def _bytes(adapter: Adapter, site: str) -> int:
    """What a rank takes on disk."""
    return sum(adapter.shapes[site]) * dtype_of(adapter.factors[site]).itemsize


def _shared_out(
    adapter: Adapter, target: Target, units: list[tuple[str, ...]], update: Callable[[str], Update]
) -> dict[str, int]:
    """The ranks of all sites from one target for the whole.  Of each site its singular values alone are kept."""
    spectra: dict[str, Spectrum] = {}
    for unit in units:
        found = update(unit[0])
        known, size = found.known, _bytes(adapter, unit[0])
        again = lambda k, site=unit[0]: update(site).leading(k)[1]  # noqa: E731
        spectra[unit[0]] = Spectrum(known, found.whole, found.most, size, again)
        if not len(known):
            spectra[unit[0]].values = found.leading(64)[1]
    of = {site: unit[0] for unit in units for site in unit}
    ranks = target.ranks(spectra, lambda ranks: _size(adapter, {s: ranks[of[s]] for s in adapter.methods}, units))
    return {site: ranks[first] for site, first in of.items()}


def _size(adapter: Adapter, ranks: Mapping[str, int], units: list[tuple[str, ...]]) -> int:
    """What the adapter with these ranks takes on disk."""
    made: dict[str, _Cut] = {}
    for unit in units:
        site, k = unit[0], ranks[unit[0]]
        (O, I), dtype = adapter.shapes[site], dtype_of(adapter.factors[site])
        B, A = torch.empty(O, k, dtype=dtype, device="meta"), torch.empty(k, I, dtype=dtype, device="meta")
        made |= dict.fromkeys(unit, _placed(adapter, site, B, A, 0.0, 0.0)) if k else {}
    return bytes_of(_assembled(adapter, made))


def _cut(adapter: Adapter, site: str, update: Update, k: int) -> _Cut:
    """The site at rank k."""
    if k == 0:
        return _Cut(adapter.methods[site], None, 0, update.whole, update.whole)
    triple = update.leading(k)
    dtype = dtype_of(adapter.factors[site])
    B, A = (t.to(dtype) for t in svd.halves(*triple))
    if update.whole == 0:  # B = 0 alone: with A = 0 too no training could leave that
        A = triple[2].T.to(dtype).contiguous()
    return _placed(adapter, site, B, A, update.missed(triple, B, A), update.whole)


def _placed(adapter: Adapter, site: str, B: Tensor, A: Tensor, missed: float, whole: float) -> _Cut:
    """The pair as what stands at the site: with DoRA's magnitudes, where there are some."""
    method, k = adapter.methods[site], A.shape[0]
    kept = {n: adapter.factors[site][n].detach().clone() for n in beside(method)}
    f = {"A": A, "B": B, **kept}
    return _Cut(
        around(method, LoRA(r=k, alpha=float(k))), {n: t.requires_grad_() for n, t in f.items()}, k, missed, whole
    )


def _assembled(adapter: Adapter, made: Mapping[str, _Cut]) -> Adapter:
    return replace(
        adapter,
        methods={s: c.method for s, c in made.items()},
        factors={s: c.f or {} for s, c in made.items()},
        shapes={s: adapter.shapes[s] for s in made},
        full={n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in adapter.full.items()},
        kernels={s: k for s, k in adapter.kernels.items() if s in made},
        apart={s: why for s, why in adapter.apart.items() if s in made},
    )


def relative(missed: float, whole: float) -> float:
    """sqrt(missed / whole); 0 for nothing missed."""
    return (missed / whole) ** 0.5 if whole > 0 else 0.0
