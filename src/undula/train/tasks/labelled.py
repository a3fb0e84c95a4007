"""The head of a language model on those positions alone whose label counts.

Of prompts and padding nothing is learned, and a vocabulary is wide: their logits are most of what a step computes and
holds in vain.  `logits_to_keep` says to a model of transformers which positions its head is for, and the model's own
code makes their logits, soft caps and scales included.  What a model takes is seen by a few short rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels import cross_entropy
from .lending import evaluating
from .shown import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLOSE, HALF_CLOSE = 1e-3, 5e-2  # of the size of what is compared, in whole and in half precision
LOSS = 1e-5  # of a loss: a balance of experts may add no more than 1e-4 of it
NOT_TAKEN = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError, NotImplementedError)


def labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(which positions (B, S) predict a label that counts, those labels (K,) in the same order), K at least 1: of
    labels none of which counts the first position has the label that is none."""
    there = torch.zeros_like(labels, dtype=torch.bool)
    there[:, :-1] = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][there[:, :-1]]
    if not targets.numel():
        there[0, 0] = True
        targets = labels.new_full((1,), IGNORED)
    return there, targets


def told(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of one row, with which of its positions count and their labels, found before it goes to a device: a step
    need not wait there to know how many they are."""
    there, targets = labelled(batch["labels"])
    return {**batch, "kept": there[0].nonzero()[:, 0], "targets": targets}


@dataclass(frozen=True)
class Keeping:
    """How a model is told which positions (B, S) to keep, and where in its answer those are."""

    said: Callable[[Tensor], Any]
    read: Callable[[Tensor, Tensor], Tensor]  # (the answer, the positions) -> (K, width)


ALL = Keeping(lambda there: None, lambda found, there: found[there])  # what every model does of itself
EXACTLY = Keeping(lambda there: there, lambda found, there: found.reshape(-1, found.shape[-1]))
BY_COLUMN = Keeping(  # those that any row needs, of all rows
    lambda there: there.any(0).nonzero()[:, 0], lambda found, there: found[there[:, there.any(0)]]
)
OF_ONE_ROW = Keeping(lambda kept: kept, lambda found, kept: found[0])  # by their numbers (K,)


@dataclass(frozen=True)
class Head:
    """Losses of a model's labelled positions.  bare: its head, where the logits are what that linear layer returns, and
    nothing is done to them: then they need not be there at once."""

    keeping: Keeping
    bare: nn.Linear | None = None

    def losses(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """-log p of each label that counts (K,), row by row; of none at all one 0.  `model` may be wrapped; `inputs`
        are a batch, or one row of which it is `told`."""
        if "kept" in inputs and self.keeping is not ALL:
            return replace(self, keeping=OF_ONE_ROW)._of(model, inputs, inputs["kept"], inputs["targets"])
        return self._of(model, inputs, *labelled(inputs["labels"]))

    def _of(self, model: Any, inputs: Mapping[str, Any], there: Tensor, targets: Tensor) -> Tensor:
        if self.bare is None or not _plain(self.bare) or torch.is_autocast_enabled(there.device.type):
            return cross_entropy.losses(self.logits(model, inputs, there), targets)
        with _passed(self.bare):
            hidden = self.logits(model, inputs, there)
        return cross_entropy.through(hidden, self.bare.weight, self.bare.bias, targets)

    def logits(self, model: Any, inputs: Mapping[str, Any], there: Tensor) -> Tensor:
        """(K, V) of these positions."""
        given = {name: value for name, value in inputs.items() if name not in ("labels", "kept", "targets")}
        if (asked := self.keeping.said(there)) is not None:
            given["logits_to_keep"] = asked
        return self.keeping.read(model(**given).logits, there)


def _plain(head: nn.Module) -> bool:
    """Whether nothing but its weight and its bias makes what this layer returns, and they do not learn."""
    own = type(head) is nn.Linear and "forward" not in head.__dict__
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return own and not any(hooks) and all(type(p) is nn.Parameter and not p.requires_grad for p in head.parameters())


@contextlib.contextmanager
def _passed(head: nn.Module) -> Iterator[None]:
    """Within, the layer returns what it is given."""
    head.forward = lambda x: x
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def seen(model: PreTrainedModel, batch: Mapping[str, Any]) -> Head | None:
    """How the head of this model is asked for labelled positions alone; None where it takes no such question, or where
    its loss is not the mean over the labels (experts that are to be evenly used are another part of some).

    Seen by comparing both on a batch, a small one, in evaluation mode.
    """
    there, _ = labelled(batch["labels"])
    with evaluating(model):
        try:
            whole = model(**batch)
            wanted = whole.logits[there]
            if not of_labels_alone(whole, batch["labels"]):
                return None
        except NOT_TAKEN:
            return None
        for keeping in (EXACTLY, BY_COLUMN):
            with contextlib.suppress(*NOT_TAKEN):
                found, bare = _asked(model, batch, there, keeping)
                if not _same(found, wanted):
                    continue
                one = told({name: value[:1] for name, value in batch.items()})
                of_one = Head(OF_ONE_ROW).logits(model, one, one["kept"])
                if _same(of_one, wanted[: len(of_one)]):
                    return Head(keeping, bare)
    return None


def of_labels_alone(found: Any, labels: Tensor) -> bool:
    """Whether the loss that a model returned with its logits is the mean over the labels, and nothing else."""
    there, targets = labelled(labels)
    own = cross_entropy.losses(found.logits[there], targets).mean()  # of the same logits: only the sum is rounded
    return getattr(found, "aux_loss", None) is None and bool((own - found.loss).abs() <= LOSS * own.abs())


def _asked(
    model: PreTrainedModel, batch: Mapping[str, Any], there: Tensor, keeping: Keeping
) -> tuple[Tensor, nn.Linear | None]:
    """(what the model answers of these positions, its head where that made the answer alone)."""
    head, made = model.get_output_embeddings(), list[Tensor]()
    if not isinstance(head, nn.Linear) or not _plain(head):
        return Head(keeping).logits(model, batch, there), None
    answer: list[Tensor] = []
    read = Keeping(keeping.said, lambda found, where: answer.append(found) or keeping.read(found, where))  # type: ignore[func-returns-value]
    heard = head.register_forward_hook(lambda module, given, out: made.append(out))
    try:
        found = Head(read).logits(model, batch, there)
    finally:
        heard.remove()
    return found, head if len(made) == 1 and made[0] is answer[0] else None


def _same(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and _alike(found, wanted)


def _alike(found: Tensor, wanted: Tensor) -> bool:
    most = CLOSE if wanted.dtype in (torch.float32, torch.float64) else HALF_CLOSE
    return bool((found - wanted).abs().max() <= most * wanted.abs().max())
