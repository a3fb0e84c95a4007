"""The adapter of a checkpoint, back on the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core.adapter import Adapter
from ..host.host import attach, detach, selected
from ..integrations.callback import STATE
from ..io import files
from ..ranks.surgery import adopt
from .run import Run


@torch.no_grad()
def restore(live: Adapter, saved: Adapter) -> None:
    """Copies the numbers of `saved` into `live`, whose tensors stay the objects that the optimiser knows.

    Raises ValueError when the two are adapters of different methods, sites or parameters.
    """
    if live.methods != saved.methods or set(live.full) != set(saved.full):
        raise ValueError(
            f"the checkpoint holds {saved.method!r} at {len(saved.methods)} sites and {len(saved.full)} full "
            f"parameters; the run has {live.method!r} at {len(live.methods)} sites and {len(live.full)}"
        )
    for site, name, t in live.tensors():
        t.copy_(saved.factors[site][name])
    for name, t in live.full.items():
        t.copy_(saved.full[name])


@torch.no_grad()
def as_left(run: Run, model: Any, checkpoint: Path, quality: Callable[[], float] | None) -> Adapter:
    """Puts the adapter of a checkpoint at the end of a training on the model."""
    saved = Adapter.load(checkpoint)
    how = run.procedure
    if how is None:
        restore(selected(model), saved)
        return selected(model)
    values, tensors = files.read_state(checkpoint, STATE)
    if values.get("finished"):
        detach(model)
        return attach(model, saved)
    adopt(model, saved)
    course = how.start(model, torch.optim.AdamW(selected(model).parameters()), values["step"], quality)
    course.restore(tensors, values)
    course.finish()
    return selected(model)
