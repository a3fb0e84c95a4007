"""What would keep a job from beginning, seen before any begins: its data, and its layers by an outline of the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..host.build import assigned, chosen_parameters
from ..host.checks import check_acts
from ..host.where import choose
from ..train.base import config_of, quiet
from ..train.begun import with_method
from ..train.rows import rows_of
from ..train.run import REPORT, Run
from .checks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = (LookupError, ValueError, TypeError, OSError, RuntimeError)
Fault = tuple[tuple[str, ...], str]  # the settings that it is about, and why


def told(error: Exception) -> str:
    """What an error says."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


class Beforehand:
    """Looks at runs one after the other; what several share is looked at, and told, once."""

    def __init__(self, resume: bool = False) -> None:
        self._resume = resume
        self._seen: set[str] = set()
        self._lost: set[str] = set()  # models that cannot be opened
        self._outlines: dict[tuple[str, str], PreTrainedModel | None] = {}

    def at(self, run: Run) -> Iterator[Fault]:
        """What is wrong with a run whose values are right; nothing with one that is finished, where it is resumed."""
        if self._resume and (run.out / REPORT).is_file():
            return
        if self._new("model", run.model):
            lost = list(_faults(("model",), lambda: config_of(run.model)))
            self._lost |= {run.model} if lost else set()
            yield from lost
        if run.model in self._lost:  # which the rest would say again
            return
        if self._new("data", run.data, run.task, run.skip_faulty, run.encoding, run.by_chance):
            yield from _faults(("data", "task"), lambda: rows_of(run))
        begun = run.begin_from is not None
        if begun:  # its methods and layers are those of the adapter there
            faults = list(_faults(("begin_from", "method"), lambda: with_method(run)))
            yield from faults
            if faults:
                return
        elif run.method is None and not run.full and not run.task.has_head:
            yield ("method",), "without a method only a head trains, and this task has none: choose a method"
        model = self._outline(run)
        if model is not None:
            yield from _layers(run, model, begun)

    def _new(self, *what: Any) -> bool:
        key = repr(what)
        found = key not in self._seen
        self._seen.add(key)
        return found

    def _outline(self, run: Run) -> PreTrainedModel | None:
        """The model of a run without its numbers; None where it cannot be had so, which is told where it is opened."""
        key = run.model, type(run.task).__name__
        if key not in self._outlines:
            self._outlines[key] = None
            if type(run.task) not in TASKS:
                return None
            with contextlib.suppress(Exception), quiet(), torch.device("meta"):
                config = config_of(run.model)
                self._outlines[key] = run.task.outline(config) or _auto(run).from_config(config)
        return self._outlines[key]


def _auto(run: Run) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if run.task.has_head else AutoModelForCausalLM


def _layers(run: Run, model: PreTrainedModel, begun: bool) -> Iterator[Fault]:
    """What is wrong with the layers that are asked for."""
    if run.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        yield ("gradient_checkpointing",), f"{type(model).__name__} cannot compute activations again; leave it out"
    if run.full:
        yield from _faults(("full",), lambda: chosen_parameters(model, run.full))
    if run.method is None or begun:
        return
    wrong = list(_faults(("where",), lambda: choose(model, run.where)))
    wrong += list(_faults(("exclude",), lambda: choose(model, run.where, run.exclude))) if run.exclude else []
    wrong = wrong or list(_faults(("overrides",), lambda: _assigned(run, model)))
    wrong = wrong or list(_faults(("method",), lambda: _acts(run, model)))
    yield from wrong[:1]


def _assigned(run: Run, model: PreTrainedModel) -> Any:
    layers = choose(model, run.where, run.exclude)
    return layers, assigned(layers, run.method, run.overrides)  # type: ignore[arg-type]


def _acts(run: Run, model: PreTrainedModel) -> None:
    layers, methods = _assigned(run, model)
    for path, layer in layers.items():
        check_acts(path, layer, methods[path])


def _faults(settings: tuple[str, ...], look: Callable[[], Any]) -> Iterator[Fault]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is left out is said where the job begins
            look()
    except KINDS as error:
        yield settings, told(error)
