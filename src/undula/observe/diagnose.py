"""What an adapter really is: ranks and spectra of its updates, how nonlinear it is, and what should worry its owner.

    rows = undula.diagnose(model, data)     one dictionary per site, and a summary (site "all") at the end

Keys (None where a number does not exist for a method, or would need the model or `data`):

    site, method, rung, shape (O, I), parameters, rank (the method's r)
    norm             ||dW||_F;  relative_norm: ||dW||_F / ||W||_F
    effective_rank   exp of the entropy of s_i / sum s (Roy, Vetterli 2007);  stable_rank: ||dW||_F^2 / s_1^2
    spectrum         the first singular values of dW
    nonlinearity     LoRAN: |f(X) - X| / |X|, X = B A; for activations that are not u and a little more (Sine-LoRA):
                     |f(X) - c X| / |f(X)| for the best c.  AuroRA: the share of sigma's variation on `data` that no
                     affine map of z = A x gives; AuroRAStatic: the same on the columns of A
    bf16_changed     the share of entries of X, held in bfloat16, that f takes to another number than its linear part
    stability        max a w |u| of Sinter; training is stable up to about 0.5
    outside          AuroRA: the share of z outside its spline's range
    warnings         plain words, each "headline: detail"
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.bend import Bend, Bottleneck, Elementwise
from ..core.method import (
    Additive,
    Factors,
    Layer,
    LowRank,
    Method,
    Reweight,
)
from ..host.host import layer_at
from ..host.update import update
from ..host.where import inner
from ..kernels import reference, svd
from .listen import Batch, batches, evaluating, listening, live
from .padding import kept

SHOWN = 16  # singular values in a row
STABLE = 0.5  # a w |u|
Row = dict[str, Any]
COLUMNS: tuple[str, ...] = ("site", "rank", "norm", "relative_norm", "effective_rank", "stable_rank")
COLUMNS += ("nonlinearity", "bf16_changed", "stability", "outside")


class Found(list[Row]):
    """The rows of `diagnose`: a list, shown as a table."""

    def __repr__(self) -> str:
        head, *lines = self._lines()
        widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]
        rows = [
            "  ".join(text.ljust(n) for text, n in zip(row, widths, strict=True)).rstrip() for row in (head, *lines)
        ]
        return "\n".join([*rows, *(self[-1].get("warnings", []) if self else [])])

    def _repr_html_(self) -> str:
        head, *lines = self._lines()
        told = [*("<br>" + html.escape(text) for text in (self[-1].get("warnings", []) if self else []))]
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(t)}</td>" for t in line) + "</tr>" for line in lines)
        return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{rows}</table>{''.join(told)}"

    def _lines(self) -> list[list[str]]:
        """A header and a line per row: the columns that have a number anywhere."""
        names = [name for name in COLUMNS if any(row.get(name) is not None for row in self)]
        return [names, *([_shown(row.get(name)) for name in names] for row in self)]


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@torch.no_grad()
def diagnose(what: nn.Module | Adapter, data: Iterable[Batch] | None = None) -> list[Row]:
    """One row per site of the adapter (of the selected one of a model), and a summary: see this module.

    `data` are batches that go through the model once, for AuroRA's numbers.  Nothing is changed.  Spectra of LowRank
    updates come from their factors; of others from dW, above 2048 x 2048 by their first 64 singular values and a flat
    tail of the right energy (effective_rank is then an upper estimate, by which no rank is called idle).
    """
    model, adapter = (None, what) if isinstance(what, Adapter) else (inner(what), live(what, "diagnosing"))
    if data is not None and model is None:
        raise TypeError("data go through the model: give the model with the adapter selected, not the adapter")
    seen = {} if data is None or model is None else _observed(model, adapter, data)
    rows = [_row(site, adapter, model, seen.get(site)) for site in adapter.factors]
    return Found([*rows, _summary(adapter, rows)])


def _row(site: str, adapter: Adapter, model: nn.Module | None, seen: Seen | None) -> Row:
    m, f = adapter.methods[site], adapter.factors[site]
    row: Row = {
        "site": site,
        "method": repr(m),
        "rung": m.rung(),
        "shape": list(adapter.shapes[site]),
        "parameters": sum(t.numel() for t in f.values() if t.requires_grad),
        "rank": getattr(m.unwrapped(), "r", None),
        **dict.fromkeys(("norm", "relative_norm", "effective_rank", "stable_rank", "spectrum")),
        **dict.fromkeys(("nonlinearity", "bf16_changed", "stability", "outside")),
    }
    if not all(torch.isfinite(t).all() for t in f.values() if t.is_floating_point()):
        return {**row, "warnings": ["factors hold NaN or infinity: training diverged, nothing else is computed"]}
    bend = m.bend(f)
    row |= _spectrum(site, m, f, model) | _bent(bend, seen)
    return {**row, "warnings": _warnings(row, bend, f)}


# Ranks and spectra


def _spectrum(site: str, m: Method, f: Factors, model: nn.Module | None) -> Row:
    """Of dW: from the factors on the LowRank rung, from the matrix above; of W' - W where the model is there."""
    if isinstance(m, LowRank):
        s = svd.factored_values(*m.pair(f))
    elif isinstance(m, Additive) or (isinstance(m, Reweight) and model is not None):
        s = svd.values(update(site, m, f, model).float())
    else:
        return {}
    norm = float(s.norm())
    row: Row = {"norm": norm, "spectrum": s[:SHOWN].tolist()}
    if norm > 0:
        row |= {"effective_rank": effective_rank(s), "stable_rank": float((s / s[0]).square().sum())}
    if model is not None:
        layer = layer_at(model, site)
        row["relative_norm"] = norm / float(layer.weight.float().norm())
    return row


def effective_rank(s: Tensor) -> float:
    """exp(-sum p log p), p = s / sum s: the rank of a flat spectrum of the same entropy."""
    p = s[s > 0].to(torch.float64)
    p = p / p.sum()
    return float((-(p * p.log()).sum()).exp())


# How nonlinear


def _elementwise(bend: Elementwise) -> Row:
    """What the weights alone tell of a nonlinearity in weight space."""
    u, held = bend.u_OI, bend.u_OI.bfloat16().to(bend.u_OI.dtype)  # as a model in bfloat16 would hold it
    y, bent = bend.f(u), bend.f(held)
    if bend.start is not None:  # the update is what has changed since the start
        f0, u0 = bend.start
        held0 = u0.bfloat16().to(u0.dtype)
        u, y, held, bent = u - u0, y - f0(u0), held - held0, bent - f0(held0)
    size = u.norm() if bend.about_u else y.norm()
    if size == 0:
        return {}
    slope = 1.0 if bend.about_u else float((u * y).sum() / u.square().sum())
    changed = bent.bfloat16() != (slope * held).bfloat16()
    row: Row = {"nonlinearity": float((y - slope * u).norm() / size), "bf16_changed": float(changed.float().mean())}
    return row if bend.swing is None else row | {"stability": bend.swing}


class Seen:
    """How far the sigma of a bottleneck is from affine on the z that it is given; sums only."""

    def __init__(self, bend: Bottleneck):
        self.bend, self.r = bend, 0
        self.total = self.product = torch.zeros((), dtype=torch.float64, device="cpu")
        self.count = self.outside = 0

    def add(self, z_TR: Tensor) -> None:
        self.r = z_TR.shape[-1]
        joint = torch.cat([z_TR, self.bend.sigma(z_TR)], -1).to(torch.float64)
        self.count += len(joint)
        self.outside += int(((z_TR < self.bend.low) | (z_TR > self.bend.high)).sum())
        self.total, self.product = self.total + joint.sum(0), self.product + joint.T @ joint

    def numbers(self) -> Row:
        """sqrt(1 - R^2) of the best affine map from z to sigma(z), and the share of z outside the interval."""
        r = self.r
        if self.count < 4 * (r + 1):  # a few points always lie on some affine map
            return {}
        mean = self.total / self.count
        C = self.product / self.count - torch.outer(mean, mean)
        zz, hz, hh = C[:r, :r], C[r:, :r], C[r:, r:].trace()
        explained = (hz @ torch.linalg.pinv(zz, hermitian=True) * hz).sum()
        left = float(((hh - explained) / hh).clamp_min(0).sqrt()) if hh > 0 else 0.0
        return {"nonlinearity": left, "outside": self.outside / (self.count * r)}


def _bent(bend: Bend | None, seen: Seen | None) -> Row:
    if isinstance(bend, Elementwise):
        return _elementwise(bend)
    if isinstance(bend, Bottleneck) and bend.z_TR is not None:
        seen = Seen(bend)
        seen.add(bend.z_TR)
    return {} if seen is None else seen.numbers()


def needs_data(adapter: Adapter) -> bool:
    """Whether there is a nonlinearity that only the layers' inputs tell of."""
    return bool(_dynamic(adapter))


def _dynamic(adapter: Adapter) -> dict[str, Bottleneck]:
    bends = {s: m.bend(adapter.factors[s]) for s, m in adapter.methods.items()}
    return {s: b for s, b in bends.items() if isinstance(b, Bottleneck) and b.A_RI is not None}


def _observed(model: nn.Module, adapter: Adapter, data: Iterable[Batch]) -> dict[str, Seen]:
    """The sums over `data` of the sites whose inputs tell of their nonlinearity."""
    A = {s: bend.A_RI for s, bend in _dynamic(adapter).items()}
    found = {s: Seen(bend) for s, bend in _dynamic(adapter).items()}

    def hear(site: str, layer: Layer, x: Tensor, u: Tensor, mask: Tensor | None) -> None:
        found[site].add(kept(reference.project(x, layer, A[site]), mask))  # type: ignore[arg-type]

    if found:
        with evaluating(model), listening(model, adapter, found, hear) as go:
            for batch in batches(data, "diagnosis"):
                go(batch)
    return found


# Plain words


def _warnings(row: Row, bend: Bend | None, f: Factors) -> list[str]:
    if (row["norm"] is not None and row["norm"] < 1e-12) or ("B" in f and not f["B"].any()):
        return ["not trained: the adapter changes nothing"]
    rank, used = row["rank"], row["effective_rank"]
    found = [*_on_bend(row, bend)]
    if isinstance(rank, int) and used is not None and used < rank / 4:
        found.append(f"ranks lie idle: the update uses {used:.1f} of {rank}")
    return found


def _on_bend(row: Row, bend: Bend | None) -> Iterator[str]:
    if isinstance(bend, Elementwise):
        yield from _on_elementwise(row, bend)
    elif isinstance(bend, Bottleneck):
        yield from _on_bottleneck(row, bend)


def _on_elementwise(row: Row, bend: Elementwise) -> Iterator[str]:
    meant = bend.advice or not bend.about_u  # with the identity it is meant to be a plain LoRA
    if meant and row["bf16_changed"] is not None and row["bf16_changed"] < 0.01:
        yield (
            f"the nonlinearity is invisible in bfloat16: it changes the update by {row['nonlinearity']:.1e} of itself, "
            f"which bfloat16 cannot tell; there this is a plain LoRA{bend.advice and f' ({bend.advice})'}"
        )
    if row["stability"] is not None and row["stability"] > STABLE:
        yield (
            f"unstable: {bend.swing_of} reaches {row['stability']:.1f}, so far does the slope of f swing; keep it "
            f"<= {STABLE}"
        )


def _on_bottleneck(row: Row, bend: Bottleneck) -> Iterator[str]:
    if row["nonlinearity"] is None:
        return
    if row["nonlinearity"] < 0.01:
        yield f"sigma is affine: to {row['nonlinearity']:.1e} on what it sees; a plain LoRA does the same"
    if row["outside"] > 0.1:
        yield f"the spline fades: {row['outside']:.0%} of its inputs lie outside [{bend.low:g}, {bend.high:g}]"


def _summary(adapter: Adapter, rows: list[Row]) -> Row:
    """Totals of parameters, means of ranks, the largest nonlinearity, stability and outside, all entries' bf16_changed;
    each kind of warning once."""

    def over(key: str) -> list[float]:
        return [row[key] for row in rows if row[key] is not None]

    def mean(key: str) -> float | None:
        return sum(over(key)) / len(over(key)) if over(key) else None

    norms, sizes = over("norm"), [r["shape"][0] * r["shape"][1] for r in rows if r["bf16_changed"] is not None]
    changed = sum(n * c for n, c in zip(sizes, over("bf16_changed"), strict=True))
    counts = Counter(text.split(":")[0] for row in rows for text in row["warnings"])
    return {
        "site": "all",
        "method": repr(adapter.method) if rows else None,
        "rung": adapter.rung.__name__,
        "shape": None,
        "parameters": adapter.num_parameters(),
        "rank": None,
        "norm": sum(n * n for n in norms) ** 0.5 if norms else None,
        "relative_norm": None,
        "effective_rank": mean("effective_rank"),
        "stable_rank": mean("stable_rank"),
        "spectrum": None,
        **{k: max(over(k), default=None) for k in ("nonlinearity", "stability", "outside")},
        "bf16_changed": changed / sum(sizes) if sizes else None,
        "warnings": [f"{headline}: {n} of {len(rows)} sites" for headline, n in counts.items()],
    }


def plot(rows: list[Row], path: str | Path) -> None:
    """Draws the rows of `diagnose`: spectra, effective ranks and, where there is any, nonlinearity, site by site."""
    from .figure import draw

    draw(rows, path)
