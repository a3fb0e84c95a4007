"""The base of an adapted model for a while, as the reference that a training compares with."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import nn

from .host import select
from .state import host_of


@contextlib.contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Within, the base computes without the adapter; a model without one is left as it is."""
    name = host_of(model).selected
    if name is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that processes would have to agree: they do, in each step
        select(model, None)
        try:
            yield
        finally:
            select(model, name)
