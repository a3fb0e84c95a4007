"""An adapter at a glance, for a notebook: a small table, and how much it does at each layer as bars."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import torch

from .method import Factors, LowRank, Method

MOST = 160  # bars: of more layers every second, third ... is drawn
WIDTH, HEIGHT, LEAST = 480, 60, 1.0  # pixels; the least height of a bar
ENTRIES = 1 << 26  # numbers that are read for it at most


def page(methods: Mapping[str, Method], factors: Mapping[str, Factors], told: Mapping[str, str]) -> str:
    """The table, and below it the bars where there is something to draw."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in told.items())
    sizes = norms(methods, factors)
    what = "|B A|" if all(isinstance(m, LowRank) for m in methods.values()) else "norm of what trains"
    drawn = "" if len(sizes) < 2 else _bars(sizes, what)
    return f"<table>{rows}</table>{drawn}"


@torch.no_grad()
def norms(methods: Mapping[str, Method], factors: Mapping[str, Factors]) -> dict[str, float]:
    """{layer: Frobenius norm} of the update B A where all methods are LowRank, from the factors' Gram matrices,
    |B A|^2 = <B^T B, A A^T>; of any other the norm of the factors that train.  Of every nth layer, where there are
    many; empty for one without numbers, or with so many that it would take its time."""
    sites = list(methods)
    sites = sites[:: -(-len(sites) // MOST)] if sites else []
    tensors = [t for site in sites for t in factors[site].values()]
    if sum(t.numel() for t in tensors) > ENTRIES or any(t.is_meta for t in tensors):
        return {}
    plain = all(isinstance(m, LowRank) for m in methods.values())
    found = {}
    for site in sites:
        method, f = methods[site], factors[site]
        if plain and isinstance(method, LowRank):
            B_OR, A_RI = (t.float() for t in method.pair(f))
            square = ((B_OR.mT @ B_OR) * (A_RI @ A_RI.mT)).sum()
        else:
            parts = [t.float().square().sum() for t in f.values() if t.requires_grad and t.is_floating_point()]
            square = torch.stack(parts).sum() if parts else torch.zeros((), device="cpu")
        found[site] = float(square.clamp_min(0).sqrt())
    return found


def _bars(sizes: Mapping[str, float], what: str) -> str:
    """A picture of a few kilobytes; a bar says its layer and number under the mouse."""
    names: Sequence[str] = list(sizes)
    largest = max(sizes.values()) or 1.0
    step = WIDTH / len(names)
    drawn = []
    for i, name in enumerate(names):
        high = max(LEAST, HEIGHT * sizes[name] / largest)
        place = f'x="{i * step:.1f}" y="{HEIGHT - high:.1f}" width="{max(step - 1, 0.5):.1f}" height="{high:.1f}"'
        drawn.append(f"<rect {place}><title>{html.escape(name)}: {sizes[name]:.3g}</title></rect>")
    title = f"{what} by layer, {names[0]} ... {names[-1]}; the largest is {largest:.3g}"
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" fill="#4c72b0" role="img"><title>{html.escape(title)}</title>'
        f"{''.join(drawn)}</svg><div><small>{html.escape(title)}</small></div>"
    )
