"""A learning rate without a sweep: a short range test, and how large a step the curvature bears.

Range test (Smith 2017, arXiv:1506.01186): the run's own steps at rates that rise from one to the next; after each the
loss of the same rows.  The rate where that is lowest is near the largest that holds for a step or two.

Curvature: of descent with the preconditioner P and a momentum that is averaged with beta, as Adam's is, rates stay only

    below 2 (1 + beta) / ((1 - beta) lambda),  lambda = largest eigenvalue of P^-1 H  (SGD: 2 (1 + momentum) / lambda)

with H the loss's Hessian (Cohen et al. 2022, arXiv:2207.14484).  P = sqrt(v) + eps is Adam's after the first steps of
the test: before any step a factor that stands on B = 0 has no gradient, and its v is 0.  Of each tensor the mean of v
stands for its entries, of which a few steps say little.

    lr = sqrt(BELOW lowest * ABOVE edge)

Short trainings go well beyond the edge of a small batch's curvature, and not as far as a single step does: both factors
were chosen on twelve arms of stored sweeps (docs/tune.md says what that is worth, bench/tune.py measures it).  That
LoRA's best rate follows lambda is said in arXiv:2602.04998; how it is used here is an interpretation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.extras import needs
from ..core.turns import turn
from ..observe.curvature import differences, top_eigenvalue
from ..optim.optimisers import SGD, AdamW, Optimiser
from . import processes
from .prepared import Prepared, prepare
from .recipe import Recipe
from .rows import LOG
from .run import Run, read_run
from .stages import stage

if TYPE_CHECKING:
    from .trying import Batches, Walk

    Look = Callable[[Walk, Batches], float]

LOWEST, HIGHEST = 1e-5, 1e2  # rates that are tried, where nothing ends the test before
FACTOR = 10**0.25  # between one and the next
BELOW = 0.3  # of the rate where the loss was lowest
ABOVE = 10.0  # of the edge
AHEAD = 2  # batches whose loss is looked at
WORSE = 1.5  # times the largest loss up to WARM: there the test ends
STALE, ABOVE_IT = 6, 1.05  # so many steps after the lowest loss, all so many times the first: there too
FLAT = 0.01  # of the loss at the beginning: changes below it are none
WARM = 1e-4  # the first rate after which the curvature is looked at
PRODUCTS = 6  # with the Hessian of one batch
MOVE = 0.02  # times the cube root of the type's rounding: root mean square of what parameters are moved by for one


@dataclass(frozen=True)
class Tuned:
    """The rate that was found, and by what.

    before: the loss of some rows; curve: (rate, their loss after a step at it), in the order of the steps; lowest: the
    rate where it was lowest; curvature: lambda, edge: the rate that it bounds, None where they were not looked at;
    gradients, losses: how many batches went forwards and backwards, and forwards alone.
    """

    lr: float
    how: str
    before: float
    curve: tuple[tuple[float, float], ...]
    lowest: float
    curvature: float | None
    edge: float | None
    seed: int
    gradients: int
    losses: int
    seconds: float
    notes: tuple[str, ...] = ()

    def encode(self) -> dict[str, Any]:
        """As JSON values; a loss that is not finite is None."""
        curve = [[rate, loss if math.isfinite(loss) else None] for rate, loss in self.curve]
        return asdict(self) | {"curve": curve, "notes": list(self.notes)}


@needs("train")
@turn()
def tune(run: Recipe) -> Tuned:
    """A learning rate for a run that has not begun: see this module.  It opens data and model and writes nothing; the
    same recipe gives the same rate.

    Raises what `train` raises for bad input; ValueError where the loss is not finite at first, or never changes.
    """
    placed = run if isinstance(run, Run) else Run.of(run, Path())
    return tuned(prepare(placed))


def tuned(ready: Prepared) -> Tuned:
    """The same for a run that is in memory, which is left as it was, to the bit."""
    from .trying import trying  # transformers comes with it

    begun, run = time.perf_counter(), ready.run
    if not any(p.requires_grad for p in ready.model.parameters()):
        raise ValueError("nothing trains here, so there is no rate to find")
    look = curvature_of(run.optimiser)
    with stage("finding a learning rate"), trying(ready) as walk:
        ahead = walk.some(AHEAD)
        before = walk.loss(ahead)
        if not math.isfinite(before):
            raise ValueError(f"the loss is {before} before any step, and no rate would mend that: look at the data")
        curve, value = _test(walk, ahead, before, look)
        gradients, losses = walk.gradients, walk.losses
    if all(abs(loss - before) <= FLAT * abs(before) for _, loss in curve):
        raise ValueError(
            f"the loss of {AHEAD} batches is {before:.4g} before any step and after steps at rates of {curve[0][0]:g} "
            f"to {curve[-1][0]:g} alike: what trains does not change it, so no rate can be found. Look at the data ("
            "one class, no label that counts?), or name a rate (lr=...)"
        )
    lowest = _lowest(curve, before)
    value = value if value is not None and math.isfinite(value) else None
    edge = None if value is None or value <= 0 else bound(run.optimiser) / value
    how = f"the loss of {AHEAD} batches was lowest at {lowest:.2g} in a range test of {len(curve)} steps"
    how += "" if edge is None else f", the curvature bears about {ABOVE * edge:.2g}"
    lr = BELOW * lowest if edge is None else math.sqrt(BELOW * lowest * ABOVE * edge)
    return Tuned(
        float(f"{lr:.2g}"), how, before, tuple(curve), lowest, value, edge, run.seed, gradients, losses,
        round(time.perf_counter() - begun, 3), tuple(_notes(ready, curve, before, lowest, edge)),
    )  # fmt: skip


def with_rate(ready: Prepared, resume: bool) -> tuple[Prepared, dict[str, Any] | None]:
    """The run with its rate, and how that was found, where it is to be found; one that goes on has the rate with which
    it began."""
    if ready.run.lr is not None:
        return ready, None
    if processes.count() > 1 and not resume:
        raise ValueError(
            "lr is auto, which one process finds: find it by `undula tune` with the same options (undula.tune in "
            "Python), and name it here (lr=...)"
        )
    if resume:
        lr, found = read_run(ready.run.out)["run"]["lr"], None
    else:
        found = tuned(ready).encode()
        lr = found["lr"]
        for note in found["notes"]:
            LOG.warning(note)
    return dataclasses.replace(ready, run=dataclasses.replace(ready.run, lr=lr)), found


def _test(
    walk: Walk, ahead: Batches, before: float, look: Look | None
) -> tuple[list[tuple[float, float]], float | None]:
    """(the curve, the curvature after the step at `WARM`)."""
    curve: list[tuple[float, float]] = []
    value = None
    for i in itertools.count():
        rate = LOWEST * FACTOR**i
        if rate > HIGHEST:
            break
        walk.step(rate)
        curve.append((rate, walk.loss(ahead)))
        if look is not None and value is None and rate >= WARM * 0.999:
            value = look(walk, ahead[:1])
        if _ended([loss for _, loss in curve], [before, *(loss for r, loss in curve if r <= WARM * 1.001)]):
            break
    return curve, value


def _ended(losses: list[float], early: list[float]) -> bool:
    """Whether the losses after the steps so far say that higher rates do harm; early: those of rates that hardly do."""
    if not losses[-1] <= WORSE * max(early):
        return True
    since = losses[losses.index(min(losses)) + 1 :]
    return len(since) >= STALE and min(since[-STALE:]) > ABOVE_IT * early[0]


def _lowest(curve: list[tuple[float, float]], before: float) -> float:
    """The largest rate whose loss is the lowest, but for a change that is none.  Raises ValueError where no loss is
    finite."""
    least = min((loss for _, loss in curve if math.isfinite(loss)), default=math.inf)
    if least == math.inf:
        raise ValueError(
            f"the loss is not finite after a step at {curve[0][0]:g}, the lowest rate that is tried: look at the data "
            "and the model, or name a rate (lr=...)"
        )
    return max(rate for rate, loss in curve if loss <= least + FLAT * before)


def _notes(
    ready: Prepared, curve: list[tuple[float, float]], before: float, lowest: float, edge: float | None
) -> Iterator[str]:
    run = ready.run
    if beside := [*([run.allocator] if run.allocator is not None else []), *(p for p in run.penalty if p.active)]:
        yield f"the rate was found without {', '.join(map(repr, beside))}"
    if edge is None:
        why = f"of {run.optimiser!r} no preconditioner is known here"
        why = "it bounds no rate there" if curvature_of(run.optimiser) else why
        yield f"the rate was found by the range test alone, not by the curvature: {why}"
    if min(loss for _, loss in curve if math.isfinite(loss)) > before * (1 - FLAT):
        yield "a step at no rate lowered the loss: the rate is where that begins to rise, and may be off"
    if lowest == curve[0][0]:
        yield f"the loss was lowest at the first rate that was tried, {lowest:g}: a lower one may be better"
    if lowest == curve[-1][0]:
        yield f"the loss was lowest at the last rate that was tried, {lowest:g}: a higher one may be better"
    if len(ready.train) <= run.batch * AHEAD:
        yield f"the rate was found by the loss of rows that it trains on ({len(ready.train)} in all): it may be high"


# Curvature


def bound(optimiser: Optimiser) -> float:
    """What rate times lambda stays below: see this module."""
    if isinstance(optimiser, AdamW):
        return 2 * (1 + optimiser.beta1) / (1 - optimiser.beta1)
    assert isinstance(optimiser, SGD)
    return 2 * (1 + optimiser.momentum)


def curvature_of(optimiser: Optimiser) -> Look | None:
    """What finds lambda in steps of this optimiser; None for one whose preconditioner is not known."""
    if isinstance(optimiser, AdamW):
        return lambda walk, batches: _curvature(walk, batches, lambda p: _adams(walk.optimiser.state[p], optimiser))
    return (lambda walk, batches: _curvature(walk, batches, lambda p: 1.0)) if isinstance(optimiser, SGD) else None


def _adams(state: dict[str, Any], how: AdamW) -> float:
    """sqrt(v) + eps, by the mean of v."""
    v = state["exp_avg_sq"].mean(dtype=torch.float64) / (1 - how.beta2 ** float(state["step"]))
    return float(v.sqrt()) + how.eps


def _curvature(walk: Walk, batches: Batches, preconditioner: Callable[[Tensor], float]) -> float:
    followed = [(p, rate) for p, rate in walk.followed if p in walk.optimiser.state]
    parameters = [p for p, _ in followed]
    scale = [torch.full_like(p, math.sqrt(rate / preconditioner(p))) for p, rate in followed]
    size = MOVE * torch.finfo(walk.model.dtype).eps ** (1 / 3)
    product = differences(lambda: walk.gradient(batches, parameters), parameters, scale, size)
    return top_eigenvalue(product, parameters, PRODUCTS, torch.Generator().manual_seed(walk.run.seed))
