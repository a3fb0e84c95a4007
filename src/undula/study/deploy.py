"""What an adapter is worth in the forms in which it is shipped: merged, or collapsed to a plain LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ..compress import LeastSquares, Substitute, collapse
from ..compress.approximation import Approximation
from ..core.method import Method, Reweight
from ..host.host import attach, detach, select
from ..host.merging import merge, unmerge
from ..host.state import host_of
from ..observe import listen, padding
from ..train.prepared import Prepared
from ..train.tasks.task import Examples

CALIBRATION = 8  # batches of training rows that a collapse is fitted on
MEASURED = 4  # batches of test rows that the outputs are compared on
BARE_RANK = 8  # of what stands in for a method that has no rank itself


def deployed(ready: Prepared, test: Examples) -> tuple[dict[str, float], dict[str, float]]:
    """({form: test metric}, {form: |logits' - logits| / |logits|}) of a trained adapter.

    `merged` where the method merges; otherwise `least squares` (see `LeastSquares`), and where the method has a static
    form (AuroRA) also `substituted` by it.  Nothing for a head alone or a full fine-tuning.
    """
    if not ready.adapter.methods:
        return {}, {}
    forms: dict[str, float] = {}
    errors: dict[str, float] = {}
    compared = _batches(test, ready, MEASURED)
    own = _outputs(ready, compared)
    for form in _forms(ready):
        forms[form] = ready.run.task.choose(ready.model, test, ready.run.batch)
        errors[form] = float((_outputs(ready, compared) - own).norm() / own.norm())
    return forms, errors


def _forms(ready: Prepared) -> Iterator[str]:
    """The names of the forms; while one is out, the model is in it."""
    model = ready.model
    if issubclass(ready.adapter.rung, Reweight):
        merge(model)
        yield "merged"
        unmerge(model)
        return
    calibration = _batches(ready.train, ready, CALIBRATION)
    ways: dict[str, Approximation] = {"least squares": LeastSquares(_rank(ready.adapter.method), calibration)}
    factors = ready.adapter.factors
    if all(m.static_pair(factors[s]) is not None for s, m in ready.adapter.methods.items()):
        ways["substituted"] = Substitute()
    own = host_of(model).selected
    for form, way in ways.items():
        attach(model, collapse(model, way, held_out=calibration[:1]).adapter, name=form)
        yield form
        select(model, own)
        detach(model, form)


def _rank(method: Method) -> int:
    """The method's own rank, or that of the method inside it."""
    values = [getattr(method, f.name) for f in dataclasses.fields(method)]  # type: ignore[arg-type]
    own = getattr(method, "r", None)
    return own if isinstance(own, int) else next((_rank(v) for v in values if isinstance(v, Method)), BARE_RANK)


def _batches(examples: Examples, ready: Prepared, most: int) -> list[dict[str, torch.Tensor]]:
    """The first batches of examples as the model's inputs, without labels."""
    collate, size = examples.task.collator(examples.processor), ready.run.batch
    starts = range(0, min(len(examples), most * size), size)
    made = [collate([examples[i] for i in range(s, min(s + size, len(examples)))]) for s in starts]
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in made]


@torch.no_grad()
def _outputs(ready: Prepared, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The logits of these batches, padding left out, one after another."""
    training = ready.model.training
    ready.model.eval()
    outputs = ((batch, listen.run(ready.model, batch)) for batch in batches)
    kept = [padding.kept(y, padding.of_outputs(ready.model, batch, y)).flatten() for batch, y in outputs]
    ready.model.train(training)
    return torch.cat(kept).float()
