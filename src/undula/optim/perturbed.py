"""Optimisers that move weights for the time of a forward and backward pass, and put them back bit for bit.

They listen at the adapted layers.  The first of them that computes in training mode, with gradients, has the weights
moved; each factor is put back, from a copy, as soon as its gradient is there, the rest by the next step or the next
pass in evaluation mode.  So between steps the adapter is the adapter, whoever measures or saves it, and an update of
several batches moves the weights alike for each of them.
"""

from __future__ import annotations

import abc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..host.state import host_of
from .paired import UNSEEN, Paired, Params, computes_in


class Perturbed(Paired):
    """`strength` says whether anything is moved at all."""

    def __init__(self, params: Params, adapted: nn.Module, **options: Any):
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # moved weights and their copies
        self.whole = 0  # of how many there were
        self.passes = 0  # since the last step
        super().__init__(params, adapted, **options)
        host, me = host_of(adapted), weakref.ref(self)  # a model outlives its optimisers
        computes = computes_in(adapted)

        def before(module: nn.Module, _: Any) -> None:
            if (optimizer := me()) is not None and computes():  # what the base answers beside it disturbs nothing
                optimizer.listens(module)

        self.hooks = [host.slots[site].layer.owner.register_forward_pre_hook(before) for site in self.adapter.methods]

        def after(p: Tensor) -> None:
            if (optimizer := me()) is not None:
                optimizer.put_back(p)

        self.hooks += [t.register_post_accumulate_grad_hook(after) for p in self.pairs() for t in (p.A, p.B)]
        for hook in self.hooks:
            weakref.finalize(self, hook.remove)

    @property
    @abc.abstractmethod
    def strength(self) -> float:
        """0: nothing is moved."""

    @abc.abstractmethod
    def put_out(self) -> None:
        """Moves weights, each after `keep`."""

    @torch.compiler.disable
    def listens(self, module: nn.Module) -> None:
        """A layer is about to compute."""
        if not self.strength or torch._C._current_graph_task_id() != -1:  # activations that a backward computes again
            return
        if not (module.training and torch.is_grad_enabled()):
            self.restore()
        elif not self.kept or len(self.kept) < self.whole:
            with torch.no_grad():
                self.restore()
                try:
                    self.put_out()
                except ValueError:  # of a move that the numbers lose
                    self.restore()
                    raise
                self.whole = len(self.kept)
                self.passes += 1

    def keep(self, those: list[Tensor]) -> None:
        """Notes what these are, before they are moved."""
        copies = [torch.empty_like(t) for t in those]
        torch._foreach_copy_(copies, [t.detach() for t in those])
        self.kept |= {id(t): (t, copy) for t, copy in zip(those, copies, strict=True)}

    @torch.no_grad()
    def put_back(self, p: Tensor) -> None:
        """Makes p what it was."""
        if (found := self.kept.pop(id(p), None)) is not None:
            p.copy_(found[1])

    @torch.no_grad()
    def restore(self) -> None:
        """Makes all that is moved what it was."""
        for p, _ in list(self.kept.values()):
            self.put_back(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.restore()
        if self.strength and not self.passes:
            raise RuntimeError(
                f"{self.called} moves the weights while the adapted layers compute, in training mode, and none of "
                f"them was called since the last step: {UNSEEN}"
            )
        self.passes = 0
        found = super().step()
        return found if closure is None else loss
