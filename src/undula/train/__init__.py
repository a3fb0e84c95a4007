"""Training on `transformers.Trainer`: `undula.train(Run(...))` does it, `undula.train.Run` and the rest live here."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .causal_lm import CausalLM, Chat, Format, Plain
from .classification import Classification, Regression
from .fit import Interrupted, Prepared, prepare
from .fit import train as _train
from .image_classification import ImageClassification
from .recipe import Recipe
from .restored import Restored, dense, evaluate, restored
from .run import Run
from .task import Examples, Task

__all__ = [
    "CausalLM",
    "Chat",
    "Classification",
    "Examples",
    "Format",
    "ImageClassification",
    "Interrupted",
    "Plain",
    "Prepared",
    "Recipe",
    "Regression",
    "Restored",
    "Run",
    "Task",
    "dense",
    "evaluate",
    "prepare",
    "restored",
]


_dense, _evaluate, _prepare, _restored = dense, evaluate, prepare, restored


class _Train(types.ModuleType):
    """This package is also the verb: `undula.train(run)`."""

    if TYPE_CHECKING:  # what a checker, for which `undula.train` is an object of this class, finds on it
        from .causal_lm import CausalLM, Chat, Format, Plain
        from .classification import Classification, Regression
        from .fit import Interrupted, Prepared
        from .image_classification import ImageClassification
        from .recipe import Recipe
        from .restored import Restored
        from .run import Run
        from .task import Examples, Task

        dense = staticmethod(_dense)
        evaluate = staticmethod(_evaluate)
        prepare = staticmethod(_prepare)
        restored = staticmethod(_restored)

    def __call__(self, run: Run, *, resume: bool = False, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
        return _train(run, resume=resume, callbacks=callbacks)


_Train.__call__.__doc__ = _train.__doc__
sys.modules[__name__].__class__ = _Train
