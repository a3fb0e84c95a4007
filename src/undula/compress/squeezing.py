"""squeeze: an adapter of less rank with the same update as nearly as can be (LoRA-Squeeze).

    dW = B A,  B = Q_B R_B,  A' = Q_A R_A,  R_B R_A' = U S V'   ->   B_k = Q_B U_k sqrt(S_k),  A_k = sqrt(S_k) V_k' Q_A'

Of all matrices of rank k this one is nearest (Eckart and Young 1936) and misses sqrt(sum_{i > k} s_i^2), which is known
before anything is written.  Source: Vulic, Grycner, de Laroussilhe, Pfeiffer 2026, arXiv:2602.10993 (Post-Squeeze),
there by a decomposition of the whole matrix.

Open in the paper and settled here: every scale (alpha / r, rsLoRA's) is taken into the update before it is cut, and the
result has alpha = r, so that its factors are the update and no reader's scale can change it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Additive, Factors, Method
from ..host import views
from ..host.sharded import check_whole
from ..io import files
from ..io.diffusers import WEIGHTS
from ..io.native import bytes_of
from ..io.sites import Opened, Writer
from ..kernels import svd
from ..kernels.solver import Randomised, Solver
from ..methods.lora import LoRA
from .spectrum import Spectrum
from .targets import EachSite, Target
from .updates import Update, inside, update_of

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


def squeeze(adapter: Adapter, target: Target, *, solver: Solver = Randomised(), seen: Seen | None = None) -> Squeezed:
    """The adapter at the ranks that `target` asks for; see `undula.compress.squeeze`."""
    adapter.check_usable()
    check_whole(adapter.parameters(), "squeezing")
    made = dict(_cuts(_Source(adapter, lambda site: adapter.factors[site], solver), target, seen))
    full = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in adapter.full.items()}
    squeezed = replace(_assembled(adapter, {s: cut for s, cut in made.items() if cut.f is not None}), full=full)
    return _told(squeezed, made, (bytes_of(adapter), bytes_of(squeezed)))


def squeeze_directory(
    path: str | Path, out: str | Path, target: Target, *, solver: Solver = Randomised(), seen: Seen | None = None
) -> Squeezed:
    """`squeeze` of the adapter in a directory into another one, in the memory of a layer: each is read, cut and written
    before the next (twice read, where the target is one for all layers).  What comes back holds the outline of the new
    adapter, without numbers.  Raises what `squeeze` and `Adapter.load` raise; then `out` is what it was."""
    with Opened(path) as opened, Writer(out) as writer:
        outline = opened.outline
        outline.check_usable()
        made: dict[str, _Cut] = {}
        for site, cut in _cuts(_Source(outline, lambda site: opened.site(site).factors[site], solver), target, seen):
            if cut.f is not None:
                writer.add(replace(_assembled(outline, {site: cut}), full={}))
            made[site] = replace(cut, f=None)
        squeezed = writer.finish(InFull(opened), outline.about, outline.weight)
    return _told(squeezed, made, (files_of(path), files_of(out)))


def files_of(path: str | Path) -> int:
    """The bytes of an adapter's own files, or of the one that it is."""
    if Path(path).is_file():
        return Path(path).stat().st_size
    names = (files.CONFIG, files.TENSORS, WEIGHTS, "README.md")
    return sum(file.stat().st_size for name in names if (file := Path(path) / name).is_file())


class InFull(Mapping[str, Tensor]):
    """What a directory holds in full, read when it is asked for."""

    def __init__(self, opened: Opened):
        self.opened = opened

    def __getitem__(self, name: str) -> Tensor:
        return self.opened.parameter(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.opened.outline.full)

    def __len__(self) -> int:
        return len(self.opened.outline.full)


def _told(squeezed: Adapter, made: Mapping[str, _Cut], bytes: tuple[int, int]) -> Squeezed:
    errors = {s: relative(c.missed, c.whole) for s, c in made.items()}
    error = relative(sum(c.missed for c in made.values()), sum(c.whole for c in made.values()))
    return Squeezed(squeezed, errors, error, {s: c.rank for s, c in made.items()}, bytes)


@dataclass(frozen=True, eq=False)
class _Cut:
    """What has become of a site; no factors, where it was left out."""

    method: Method
    f: Factors | None
    rank: int
    missed: float
    whole: float


@dataclass(frozen=True)
class _Source:
    """An adapter whose factors are read site by site; `outline` tells all but their numbers."""

    outline: Adapter
    factors: Callable[[str], Factors]
    solver: Solver

    def firsts(self) -> dict[str, str]:
        """{site: the first one that shares its method and all of its factors}: these go on sharing them."""
        found: dict[Any, str] = {}
        first: dict[str, str] = {}
        of = self.outline
        for site, f in of.factors.items():
            key = of.methods[site], of.shapes[site], of.kernels.get(site), tuple(id(t) for t in f.values())
            first[site] = found.setdefault(key, site)
        return first

    def update(self, site: str) -> tuple[Update, Factors]:
        of, f = self.outline, self.factors(site)
        return update_of(site, of.methods[site], f, of.shapes[site], padding_of(of, site), self.solver), f


@torch.no_grad()
def _cuts(source: _Source, target: Target, seen: Seen | None) -> Iterator[tuple[str, _Cut]]:
    """Every site, in order, as the target has it.  One is held at a time, and those that others share."""
    outline, first = source.outline, source.firsts()
    if not isinstance(target, Target):
        raise TypeError(
            f"target says to what an adapter is squeezed, such as ByRank(8) or ByEnergy(0.99); found {target!r}"
        )
    if not outline.methods:
        raise ValueError("this adapter adapts no layer (it holds parameters in full alone): it has no rank to lose")
    for site, method in outline.methods.items():
        inside(site, method)  # what cannot be squeezed is told before anything is computed
    ranks = None if isinstance(target, EachSite) else _shared_out(source, target, first)
    shared = {s for s, n in Counter(first.values()).items() if n > 1}
    kept: dict[str, _Cut] = {}
    for site, of in first.items():
        if of in kept:
            yield site, kept[of]
            continue
        update, f = source.update(site)
        k = target.at(update.spectrum(_bytes(outline, site))) if isinstance(target, EachSite) else (ranks or {})[site]
        cut = _cut(outline, site, f, update, k)
        if site in shared:
            kept[site] = cut
        yield site, cut
        if seen is not None:
            seen(site)


def padding_of(adapter: Adapter, site: str) -> int | None:
    """The column of an embedding's update that stays zero; none under DoRA, whose norms have it in them."""
    kernel = adapter.kernels.get(site)
    added = isinstance(adapter.methods[site].undropped(), Additive)
    return kernel[0] if added and kernel is not None and len(kernel) == 1 else None


def dtype_of(f: Factors) -> torch.dtype:
    """The type in which a site's numbers are stored."""
    return next((t.dtype for t in f.values() if t.is_floating_point()), torch.float32)


def _bytes(adapter: Adapter, site: str) -> int:
    """What a rank takes on disk."""
    return sum(adapter.shapes[site]) * dtype_of(adapter.factors[site]).itemsize


def _shared_out(source: _Source, target: Target, first: Mapping[str, str]) -> dict[str, int]:
    """The ranks of all sites from one target for the whole.  Of each site its singular values alone are kept."""
    outline = source.outline
    spectra: dict[str, Spectrum] = {}
    for site in dict.fromkeys(first.values()):
        found, _ = source.update(site)
        known = found.known if len(found.known) else found.leading(64)[1]
        again = lambda k, site=site: source.update(site)[0].leading(k)[1]  # noqa: E731
        spectra[site] = Spectrum(known, found.whole, found.most, _bytes(outline, site), again)
    ranks = target.ranks(spectra, lambda ranks: _size(outline, ranks, first))
    return {site: ranks[of] for site, of in first.items()}


def _size(outline: Adapter, ranks: Mapping[str, int], first: Mapping[str, str]) -> int:
    """What the adapter with these ranks takes on disk."""
    once: dict[str, _Cut] = {}
    for site, k in ranks.items():
        (O, I), dtype = outline.shapes[site], dtype_of(outline.factors[site])
        B, A = torch.empty(O, k, dtype=dtype, device="meta"), torch.empty(k, I, dtype=dtype, device="meta")
        if k:
            once[site] = _placed(outline, site, outline.factors[site], B, A, 0.0, 0.0)
    made = _assembled(outline, {site: once[of] for site, of in first.items() if of in once})
    return bytes_of(replace(made, full=outline.full))


def _cut(outline: Adapter, site: str, f: Factors, update: Update, k: int) -> _Cut:
    """The site at rank k."""
    if k == 0:
        return _Cut(outline.methods[site], None, 0, update.whole, update.whole)
    triple = update.leading(k)
    B, A = (t.to(dtype_of(f)) for t in svd.halves(*triple))
    if not (B.isfinite().all() and A.isfinite().all()):
        raise ValueError(
            f"{site}: the update is too large for factors of {str(B.dtype).removeprefix('torch.')}: bring the adapter "
            "into float32 first (adapter.map)"
        )
    if update.whole == 0:  # B = 0 alone: with A = 0 too no training could leave that
        A = triple[2].T.to(A.dtype).contiguous()
    return _placed(outline, site, f, B, A, update.missed(triple, B, A), update.whole)


def _placed(outline: Adapter, site: str, f: Factors, B: Tensor, A: Tensor, missed: float, whole: float) -> _Cut:
    """The pair as what stands at the site: with DoRA's magnitudes, where there are some."""
    k = A.shape[0]
    method = outline.methods[site].around(LoRA(r=k, alpha=float(k)))
    names = set(method.init(views.outline(site, outline.shapes[site]))) - {"A", "B"}
    kept = {n: f[n].detach().clone().requires_grad_(f[n].requires_grad) for n in sorted(names)}
    return _Cut(method, {"A": A.requires_grad_(), "B": B.requires_grad_(), **kept}, k, missed, whole)


def _assembled(outline: Adapter, made: Mapping[str, _Cut]) -> Adapter:
    """The sites that are made, with all that the adapter says beside; `full` is another's to add."""
    return replace(
        outline,
        methods={s: c.method for s, c in made.items()},
        factors={s: c.f or {} for s, c in made.items()},
        shapes={s: outline.shapes[s] for s in made},
        full={},
        kernels={s: k for s, k in outline.kernels.items() if s in made},
        apart={s: why for s, why in outline.apart.items() if s in made},
    )


def relative(missed: float, whole: float) -> float:
    """sqrt(missed / whole); 0 for nothing missed."""
    return (missed / whole) ** 0.5 if whole > 0 else 0.0
