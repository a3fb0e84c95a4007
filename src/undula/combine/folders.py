"""Adapter directories as one, layer by layer: neither the base nor a whole adapter is in memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..core.adapter import Adapter
from ..io.sites import Opened, Writer
from .combiner import Combiner, SameBase, bases, equal_names
from .weighted import agreed, averaged, mixed


@dataclass(frozen=True)
class Combined:
    """What a combination has become: its outline (factors on the meta device), and of each layer how much of what it
    stands for the kept rank misses, |miss| / |dW|; None where nothing is missed, or the way to combine has no other
    result than what it keeps (LEGO)."""

    outline: Adapter
    errors: dict[str, float | None]
    error: float | None  # over all layers together

    @property
    def ranks(self) -> dict[str, int | None]:
        """The rank at each layer; None of a method without."""
        return {site: getattr(m, "r", None) for site, m in self.outline.methods.items()}


def combine_directories(
    combiner: Combiner,
    paths: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    *,
    drop_full: bool = False,
    same_base: SameBase = equal_names,
    seen: Callable[[str], object] = lambda site: None,
) -> Combined:
    """Combines the adapters in `paths` into the directory `out`, in the memory of one layer of each; `seen(site)` is
    called after each layer.  `drop_full` leaves out what they train in full (heads, norms), which else is averaged.

    Whenever this ends early, `out` holds what it held.  Raises what the combiner raises, and `Adapter.load` and `save`.
    """
    with contextlib.ExitStack() as stack, torch.no_grad():
        opened = [stack.enter_context(Opened(path)) for path in paths]
        weights = combiner.weights(weights, len(opened))
        outlines = [o.outline for o in opened]
        shares = combiner.shares(weights)
        named = {} if drop_full else averaged(list(zip(shares, outlines, strict=True)))
        weight = math.fsum(shares) if named else 1.0
        replace(outlines[0], full=named, weight=weight).check_usable()  # before anything is computed
        writer = stack.enter_context(Writer(out))
        squares: dict[str, tuple[float, float]] = {}
        for made in combiner.steps(opened, weights, same_base):
            writer.add(made.part)
            (site,) = made.part.methods
            squares[site] = made.missed, made.whole
            seen(site)
        full = {
            name: mixed((share, o.parameter(name)) for share, o in zip(shares, opened, strict=True)) for name in named
        }
        about = agreed(outlines)
        base = next((base for _, base in bases(opened)), None)
        outline = writer.finish(full, about | ({"base_model_name_or_path": base} if base else {}), weight)
    errors = {site: math.sqrt(missed / whole) if whole else None for site, (missed, whole) in squares.items()}
    total = math.fsum(whole for _, whole in squares.values())
    error = math.sqrt(math.fsum(missed for missed, _ in squares.values()) / total) if total else None
    return Combined(replace(outline, full=full), errors, error)
