"""What an adapter's weights do, as one vector that no gauge changes.

At site s the update is dW_s = B_s A_s = (B_s G^-1)(G A_s) for any invertible G (R, R): permuted, scaled or rotated
ranks are the same update.  All that is taken here is a function of dW_s:

    L_s = P_O dW_s,  n_s = |L_s|       P_d (32, d): numbers of mean 0 and variance 1/32 that d alone determines
    direct  = sum_s S_s * (L_s P_I') / n_s
    outputs = sum_s T_s * upper(L_s L_s') / n_s^2       which columns of outputs it moves, whatever rows it reads
    z = (direct / |direct|, outputs / |outputs|, log sum_s n_s^2)

S_s and T_s are signs that the site's name determines, so that sites add without mixing: the inner product of two
directs is about the mean cosine of their updates at the sites that both have (Johnson and Lindenstrauss), whatever
their ranks, methods and other sites are.  An interpretation of the retriever of AutoLoRA (2025, arXiv:2508.02107),
which pushes trained inputs through A B and has a transformer over the layers: with numbers that a seed rebuilds the
sketch can be stored, and what trains (`undula.retrieve.Encoder`) reads sketches alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Additive, Factors, LowRank, Method
from ..io.sites import Opened
from ..kernels import frozen, svd

P = 32  # probes to each side
DIRECT, OUTPUTS = P * P, P * (P + 1) // 2
WIDTH = DIRECT + OUTPUTS + 1
SEED = 1  # of probes and signs: another one makes another space, and another index
BLOCK = 1 << 22  # numbers of an update that are held at once, where it comes in rows


class Sketch(NamedTuple):
    """`z` (WIDTH) in float64, and what it was made of: layers with an update that is not zero, and methods without one
    {method: layers}."""

    z: Tensor
    layers: int
    without: dict[str, int]


@torch.no_grad()
def sketch(adapter: Adapter | Opened) -> Sketch:
    """The sketch of an adapter, layer by layer: an opened directory is never in memory as a whole.

    Raises TypeError where no layer has an update dW (AuroRA, DoRA: `undula.collapse` fits a LoRA to them), ValueError
    where all updates are zero, or one is not finite.
    """
    direct = torch.zeros(P, P, dtype=torch.float64)
    outputs = torch.zeros(OUTPUTS, dtype=torch.float64)
    total, layers, without = 0.0, 0, dict[str, int]()
    for site, method, shape, f in _parts(adapter):
        if not isinstance(method, Additive):
            name = type(method).public().__name__
            without[name] = without.get(name, 0) + 1
            continue
        L_PI = _left(method, f, shape)
        square = float(L_PI.square().sum())
        total += square
        if not math.isfinite(square):
            raise ValueError(
                f"{site}: its update holds numbers that are not finite; the adapter is damaged or diverged"
            )
        if not square:
            continue
        layers += 1
        direct += _signs("direct", site, DIRECT).view(P, P) * (L_PI @ _probes(shape[1]).T) / square**0.5
        outputs += _signs("outputs", site, OUTPUTS) * (L_PI @ L_PI.T)[_upper()] / square
    if not layers and without:
        told = ", ".join(f"{name} at {n} layers" for name, n in without.items())
        raise TypeError(f"it has no update dW ({told}): `undula collapse` makes a plain LoRA of it")
    if not layers:
        raise ValueError("its update is zero at every layer: it was not trained")
    parts = direct.flatten() / direct.norm(), outputs / outputs.norm(), torch.tensor([total], dtype=torch.float64).log()
    return Sketch(torch.cat(parts), layers, without)


def likeness(z_NW: Tensor, other_W: Tensor) -> Tensor:
    """About the mean cosine of updates, layer by layer, of N sketches with another one (N)."""
    return z_NW[:, :DIRECT] @ other_W[:DIRECT]


def _parts(adapter: Adapter | Opened) -> Iterator[tuple[str, Method, tuple[int, int], Factors]]:
    """(site, method, shape, factors in float64), those without an update unread."""
    about = adapter.outline if isinstance(adapter, Opened) else adapter
    for site, method in about.methods.items():
        f: Factors = {}
        if isinstance(method, Additive):
            f = adapter.site(site).factors[site]
        yield site, method, about.shapes[site], {k: _wide(t) for k, t in f.items()}


def _wide(t: Tensor) -> Tensor:
    return t.detach().cpu().double() if t.is_floating_point() else t.detach().cpu()


def _left(method: Additive, f: Factors, shape: tuple[int, int]) -> Tensor:
    """P_O dW (32, I), from the factors where there are some; else a block of rows at a time."""
    P_O = _probes(shape[0])
    if isinstance(method, LowRank):
        B_OR, A_RI = method.pair(f)
        return (P_O @ B_OR) @ A_RI
    alone = type(method).rows is not Additive.rows
    step = max(1, BLOCK // shape[1]) if alone else shape[0]
    rows = svd.Blocks(shape, lambda some: method.rows(f, some), step, torch.device("cpu"))
    return rows.back(P_O.T).T


@functools.lru_cache(64)
def _probes(width: int) -> Tensor:
    """P_d (32, d)."""
    scale = (3 / P) ** 0.5  # numbers uniform in [-1, 1) have the variance 1/3
    return frozen.uniform(SEED, ("probes", width), (P, width)).double() * scale


@functools.lru_cache(4096)
def _signs(what: str, site: str, n: int) -> Tensor:
    """Ones and minus ones (n)."""
    return torch.where(frozen.bits(SEED, (what, site), 0, n) < 0, -1.0, 1.0).double()


@functools.cache
def _upper() -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(P, P)
    return i, j
