"""collapse: a LowRank adapter in place of any other, and what that costs, always measured."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Factors, Layer, Method
from ..host.host import attach, detach, layer_at, select
from ..host.state import host_of
from ..host.where import inner
from ..kernels import reference
from ..methods.lora import LoRA
from ..observe.listen import (
    Batch,
    batches,
    evaluating,
    listening,
    live,
    run,
    wide,
    widened,
)
from ..observe.padding import kept, of_outputs
from .approximation import Approximation, Fit

ROOM = "undula.collapse."  # names of adapters that are attached while measuring


@dataclass(frozen=True)
class Collapsed:
    """A plain LoRA adapter (alpha = r, so its factors are the update) and how far it is from the original.

    errors[site] = |u_new - u| / |u|, u the change that the original makes at the site; `error` the same for the whole
    model's outputs on held-out data, without such data for all sites together.  `measured_on` says what the errors were
    measured on.  `metric` = (before, after), where an evaluation was given.
    """

    adapter: Adapter
    errors: dict[str, float]
    error: float
    metric: tuple[float, float] | None
    measured_on: str


def collapse(
    what: nn.Module | Adapter,
    how: Approximation,
    *,
    held_out: Iterable[Batch] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> Collapsed:
    """Stands a plain LowRank adapter in for the selected adapter of a model (or for an Adapter, where `how` needs no
    data), by `Truncate(r)`, `Substitute()` or `LeastSquares(r, calibration)`.

    Errors are measured on the `held_out` batches; without them on what `how` knows (`Truncate`: the norm of dW,
    `LeastSquares`: its own calibration data).  `evaluate(model)` is called with the original and with the result.  The
    model and its adapter are left as they were: `attach` the result to use it.  Raises ValueError where nothing is
    there to measure the error by, TypeError or ValueError, naming the site, where `how` cannot serve a site.
    """
    model, adapter = (None, what) if isinstance(what, Adapter) else (inner(what), live(what, "collapsing"))
    adapter.check_usable()
    if model is None and (held_out is not None or evaluate is not None):
        raise TypeError("held_out and evaluate need a model: give the model with the adapter selected, not the adapter")
    if model is not None:
        _check_groups(model, adapter)
    with torch.no_grad():
        fits = how.fit(adapter, model)
    made = _assembled(adapter, fits, model)
    known = all(f.missed is not None for f in fits.values())
    if held_out is None and not known:
        raise ValueError(f"{how!r} cannot tell its own error: give held_out=[batches] to measure it on")
    metric = None if evaluate is None or model is None else _metric(model, made, evaluate)
    if held_out is None or model is None:
        return Collapsed(made, *_by_fits(fits), metric, how.known)
    return Collapsed(made, *_measured(model, adapter, made, fits, held_out), metric, "held-out data")


def _check_groups(model: nn.Module, adapter: Adapter) -> None:
    """A LoRA on a grouped convolution would have no common bottleneck."""
    for site in adapter.factors:
        groups = getattr(layer_at(model, site).module, "groups", 1)
        if groups > 1:
            raise TypeError(
                f"{site} is a convolution in {groups} groups, which see different inputs: no LowRank adapter "
                "stands on it. Merge the adapter, or leave that layer out"
            )


def _assembled(adapter: Adapter, fits: dict[str, Fit], model: nn.Module | None) -> Adapter:
    """The fits as a LoRA adapter; shifts are added to the layers' biases, in `full`."""
    methods: dict[str, Method] = {}
    factors: dict[str, Factors] = {}
    full = dict(adapter.copy().full)
    for site, fit in fits.items():
        r = fit.A_RI.shape[0]
        methods[site] = LoRA(r=r, alpha=float(r))
        dtype = next(t.dtype for t in adapter.factors[site].values() if t.is_floating_point())
        pair = {"A": fit.A_RI, "B": fit.B_OR}
        factors[site] = {k: t.detach().to(dtype).clone().requires_grad_() for k, t in pair.items()}
        if fit.shift_O is not None:
            assert model is not None
            bias = model.get_submodule(site).bias
            assert isinstance(bias, Tensor)
            shifted = (bias.to(fit.shift_O.dtype) + fit.shift_O).to(bias.dtype)
            full[f"{site}.bias" if site else "bias"] = shifted.detach().requires_grad_()
    return Adapter(methods, factors, dict(adapter.shapes), full, adapter.kernels, adapter.about, adapter.apart)


def _relative(missed: float, whole: float) -> float:
    """sqrt(missed / whole); 0 for nothing missed, infinite for a miss where there was nothing."""
    return (missed / whole) ** 0.5 if whole > 0 else float("inf") if missed > 0 else 0.0


def _by_fits(fits: dict[str, Fit]) -> tuple[dict[str, float], float]:
    errors = {s: _relative(f.missed or 0.0, f.whole or 0.0) for s, f in fits.items()}
    return errors, _relative(sum(f.missed or 0.0 for f in fits.values()), sum(f.whole or 0.0 for f in fits.values()))


@contextlib.contextmanager
def _guests(model: nn.Module, **guests: Adapter) -> Iterator[None]:
    """Further adapters on the model for a while; the selected one is selected again afterwards."""
    with evaluating(model):
        try:
            for name, adapter in guests.items():
                attach(model, adapter, name=ROOM + name)
            yield
        finally:
            for name in guests:
                if ROOM + name in host_of(model).adapters:
                    detach(model, ROOM + name)


def _metric(model: nn.Module, made: Adapter, evaluate: Callable[[nn.Module], float]) -> tuple[float, float]:
    before = _name(model)
    with _guests(model, made=made):
        select(model, before)
        first = float(evaluate(model))
        select(model, ROOM + "made")
        return first, float(evaluate(model))


def _name(model: nn.Module) -> str:
    name = host_of(model).selected
    assert isinstance(name, str)
    return name


def _measured(
    model: nn.Module, adapter: Adapter, made: Adapter, fits: dict[str, Fit], held_out: Iterable[Batch]
) -> tuple[dict[str, float], float]:
    """Errors at the sites, on the inputs that they see in the original, and of the outputs.  The outputs' change counts
    from the model with the parameters trained in full (a new head) but without the sites.  A model narrower than
    float32 is measured in float32: what an adapter changes would be lost in the rounding of the outputs."""
    sums = {s: torch.zeros(2, dtype=torch.float64, device="cpu") for s in fits}  # |miss|^2, |u|^2
    total, size, name = torch.zeros(2, dtype=torch.float64, device="cpu"), 0.0, _name(model)

    def hear(site: str, layer: Layer, x: Tensor, u: Tensor, mask: Tensor | None) -> None:
        sums[site] += _squares(kept(_change(fits[site], layer, x, u.dtype), mask), kept(u, mask))

    out = None
    with _guests(model, made=made, none=Adapter({}, {}, {}, adapter.full)), wide(model) as widen:
        for batch in batches(held_out, "held-out data"):
            select(model, name)
            given = widened(batch) if widen() else batch
            with listening(model, adapter, fits, hear) as go:
                out = go(given)
            mask, outputs = of_outputs(model, batch, out), [out]
            for guest in ("made", "none"):
                select(model, ROOM + guest)
                widen()
                outputs.append(run(model, given))
            own, new, none = (kept(y, mask) for y in outputs)
            total += _squares(new - none, own - none)
            size += float(own.float().square().sum())
    if out is None:
        raise ValueError("held_out holds no batches: nothing to measure the error on")
    _check_rounding(out.dtype, float(total[1]), size)
    return {s: _relative(*v.tolist()) for s, v in sums.items()}, _relative(*total.tolist())


def _check_rounding(dtype: torch.dtype, change: float, size: float) -> None:
    """Warns where outputs in a narrow type tell more of its rounding than of the adapter."""
    if change > 0 and dtype.itemsize < 4 and torch.finfo(dtype).eps * size**0.5 > 0.1 * change**0.5:
        warnings.warn(
            f"the error of the model's outputs is mostly rounding: they are in {dtype}, with steps as large as what "
            "the adapter changes. Look at the errors of the sites, which are measured in float32",
            stacklevel=4,
        )


def _squares(new: Tensor, u: Tensor) -> Tensor:
    """(|new - u|^2, |u|^2), summed in float64 piece by piece: logits are large."""
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    for n, v in zip(*(t.reshape(-1, t.shape[-1]).split(256) for t in (new, u)), strict=True):
        n, v = n.to(torch.float64), v.to(torch.float64)
        total += torch.stack([(n - v).square().sum(), v.square().sum()]).cpu()
    return total


def _change(fit: Fit, layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """B A x + shift, in the layout of the layer's output."""
    u = reference.restore(F.linear(reference.project(x, layer, fit.A_RI.to(dtype)), fit.B_OR.to(dtype)), layer)
    return u if fit.shift_O is None else u + reference.channels(fit.shift_O.to(dtype), layer)
