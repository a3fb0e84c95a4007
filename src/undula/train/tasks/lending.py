"""What a model is put into while it answers: evaluation mode, and another generation_config.  Several threads may ask
one model at once: the first to begin changes it, the last to end puts back what was there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Undo = Callable[[], Any]
LOCK = threading.RLock()  # a garbage collection may end what is under way, in the thread that holds it
BUSY: WeakKeyDictionary[nn.Module, dict[str, tuple[int, Undo]]] = WeakKeyDictionary()


@contextlib.contextmanager
def _lent(model: nn.Module, what: str, change: Callable[[], Undo]) -> Iterator[None]:
    """`change` is called by the first who enters, and what it returns by the last who leaves."""
    with LOCK:
        held = BUSY.setdefault(model, {})
        count, undo = held[what] if what in held else (0, change())
        held[what] = count + 1, undo
    try:
        yield
    finally:
        with LOCK:
            count, undo = held[what]
            if count > 1:
                held[what] = count - 1, undo
            else:
                del held[what]
                undo()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode."""

    def change() -> Undo:
        training = model.training
        model.eval()
        return lambda: model.train(training)

    with _lent(model, "mode", change):
        yield


@contextlib.contextmanager
def generating(model: PreTrainedModel, made: Callable[[Any], Any]) -> Iterator[None]:
    """In evaluation mode, its generation_config what `made` makes of its own."""

    def change() -> Undo:
        own = model.generation_config
        model.generation_config = made(own)
        return lambda: setattr(model, "generation_config", own)

    with evaluating(model), _lent(model, "generation", change):
        yield


def still_statistics(modules: Iterable[nn.Module]) -> None:
    """Puts those that keep running statistics (BatchNorm) into evaluation mode.

    The statistics are neither parameters nor part of an adapter: where training moved them, the base would no longer
    be the base, and the saved adapter would stand on another one than it was trained on.
    """
    for module in modules:
        if getattr(module, "running_mean", None) is not None:
            module.eval()
