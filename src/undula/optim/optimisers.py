"""What takes the steps of a training: an optimiser of torch or transformers, with its constants.

Learning rate and weight decay are no part of it: those are settings of the training, the same for every optimiser.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..core.choice import Choice
from ..core.ranges import Inside, NotNegative, PartShare, Positive


class Optimiser(Choice):
    """Constants, and the class that they are for."""

    entrywise: ClassVar[bool] = True  # whether what it remembers of a parameter has an entry for each of its entries
    paired: ClassVar[bool] = False  # whether its class is a `paired.Paired`: it takes the model too, and clips itself
    beside: ClassVar[bool] = True  # whether jobs that share their forward passes can each have their own
    remembers: ClassVar[int] = 2  # numbers of each that trains, at most

    @abc.abstractmethod
    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """(class, its options beside the learning rate and the weight decay), as `transformers.Trainer` takes them."""


@Optimiser.register
@dataclass(frozen=True)
class AdamW(Optimiser):
    """Loshchilov and Hutter 2019, arXiv:1711.05101: `torch.optim.AdamW`."""

    beta1: PartShare = 0.9
    beta2: PartShare = 0.999
    eps: Positive = 1e-8

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return torch.optim.AdamW, {"betas": (self.beta1, self.beta2), "eps": self.eps, "fused": True}


@Optimiser.register
@dataclass(frozen=True)
class SGD(Optimiser):
    """Gradient descent with momentum: `torch.optim.SGD`.  Weight decay goes through the gradient, as an L2 penalty
    does.  Its steps are as large as the gradients, so its learning rates are other ones than AdamW's."""

    momentum: PartShare = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("SGD.nesterov looks ahead along the momentum: give momentum > 0, found 0")

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return torch.optim.SGD, {"momentum": self.momentum, "nesterov": self.nesterov}


@Optimiser.register
@dataclass(frozen=True)
class Adafactor(Optimiser):
    """Shazeer and Stern 2018, arXiv:1804.04235: `transformers.Adafactor`, of a matrix of O x I it remembers O + I
    numbers.

    The learning rate is the run's, as it is: neither relative to the step nor scaled by the size of the parameter,
    which is 0 for a factor that begins there (algorithm 4 without alpha_t = max(eps_2, RMS(X)) rho_t)."""

    entrywise = False

    decay: Inside = 0.8  # of the second moment: 1 - t^-decay
    clip: Positive = 1.0  # the root mean square of an update at most
    beta1: Inside | None = None  # of a first moment; None: there is none

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from transformers.optimization import Adafactor

        constants = {"decay_rate": -self.decay, "clip_threshold": self.clip, "beta1": self.beta1}
        return Adafactor, {**constants, "scale_parameter": False, "relative_step": False}


class _Paired(Optimiser):
    """One that sees the pairs of the adapter, over another, `base`; see `undula.optim.paired`."""

    paired = True
    base: Optimiser

    def __post_init__(self) -> None:
        if self.base.paired:
            raise ValueError(f"{type(self).__name__} goes over AdamW, SGD and their like, not over {self.base!r}")

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return self.base.entrywise

    def over(self, **constants: Any) -> dict[str, Any]:
        """These constants, and the base with its own."""
        kind, own = self.base.made()
        return {**own, **constants, "base": kind}


@Optimiser.register
@dataclass(frozen=True)
class LoRAPro(_Paired):
    """Wang et al. 2024, arXiv:2407.18242: gradients as near to full fine-tuning's as a pair can come."""

    damping: NotNegative = 1e-6  # of B'B and A A', relative
    base: Optimiser = AdamW()

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from .lorapro import LoRAPro

        return LoRAPro, self.over(damping=self.damping)
