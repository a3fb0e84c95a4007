"""What takes the steps of a training: an optimiser of torch or transformers, with its constants.

Learning rate and weight decay are no part of it: those are settings of the training, the same for every optimiser.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..core.choice import Choice
from ..core.ranges import (
    Count,
    Inside,
    Natural,
    NotNegative,
    PartShare,
    Positive,
    Share,
    SomeShare,
)

PASSES = "acts on the model's forward passes, which jobs share"
MOVED = "computes the gradient at other factors than it has, where rows are not heard"


class Optimiser(Choice):
    """Constants, and the class that they are for."""

    entrywise: ClassVar[bool] = True  # whether what it remembers of a parameter has an entry for each of its entries
    paired: ClassVar[bool] = False  # whether it sees the factors of layers: its class takes the model too (`adapted`)
    by_pairs: ClassVar[bool] = True  # where it does, whether they have to be pairs A and B, or are any method's
    clips: ClassVar[bool] = False  # whether it clips gradients itself, after it has changed them (`max_norm`)
    follows: ClassVar[bool] = True  # whether what it remembers can follow an allocator's changes
    groups: ClassVar[bool] = True  # whether A and B may have rates of their own
    alone: ClassVar[bool] = False  # whether it follows the loss's gradients alone, none that a penalty adds
    at_once: ClassVar[bool] = False  # whether it needs all rows of a step in one batch
    carries: ClassVar[bool] = False  # whether a training leaves something for the one that goes on from it (`bases`)
    apart: ClassVar[str] = ""  # why jobs that share their forward passes cannot each have one
    private: ClassVar[str] = ""  # why it cannot be used under differential privacy
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

    paired = clips = True
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
    full: bool = False  # moments of the size of W, as full fine-tuning's, and AdamW's rule whatever the base
    base: Optimiser = AdamW()

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return not self.full

    @property
    def alone(self) -> bool:  # type: ignore[override]
        return self.full

    @property
    def apart(self) -> str:  # type: ignore[override]
        return "remembers two numbers for each of the base's, which is not counted there" if self.full else ""

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from . import lorapro, lorapro_full

        return lorapro_full.LoRAProFull if self.full else lorapro.LoRAPro, self.over(damping=self.damping)


@Optimiser.register
@dataclass(frozen=True)
class ALLoRA(_Paired):
    """Huang and Balestriero 2024, arXiv:2410.09692: a rate for each row, 1 / sqrt(|row| + 1 / eta^2)."""

    eta: Positive = 3.0  # of a row that is zero
    gradient: bool = False  # scale gradients, not what a step moves
    products: bool = False  # rows of B A, not of A and of B
    base: Optimiser = AdamW()

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from . import allora

        kind = allora.ALLoRAGradient if self.gradient else allora.ALLoRA
        return kind, self.over(eta=self.eta, rows=allora.of_products if self.products else allora.of_factors)


@Optimiser.register
@dataclass(frozen=True)
class LoRAMGPO(_Paired):
    """EMNLP Findings 2025, arXiv:2502.14538v2: factors moved along their momentum while the gradient is found."""

    apart = PASSES
    private = MOVED
    remembers = 4

    rho: NotNegative = 0.05
    mu: PartShare = 0.9
    beta: PartShare = 0.9
    ascent: bool = True  # along the momentum, as in the paper; False: against it, as in the authors' code
    base: Optimiser = AdamW()

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from .mgpo import LoRAMGPO

        return LoRAMGPO, self.over(rho=self.rho, mu=self.mu, beta=self.beta, sign=1 if self.ascent else -1)


@Optimiser.register
@dataclass(frozen=True)
class LoRAGGPO(_Paired):
    """arXiv:2502.14538v1, before LoRAMGPO: noise on the adapted weights, by the size of their rows and gradients."""

    apart = PASSES
    private = MOVED

    sigma: NotNegative = 0.03  # of a row's length
    beta: NotNegative = 0.01  # of its gradient's square
    rank: Count = 4  # of the noise
    base: Optimiser = AdamW()

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from .ggpo import LoRAGGPO

        return LoRAGGPO, self.over(sigma=self.sigma, beta=self.beta, rank=self.rank)


@Optimiser.register
@dataclass(frozen=True)
class GORP(_Paired):
    """Wang et al. 2025, arXiv:2507.02503: orthogonal to what the trainings before (--from) have used."""

    carries = True
    private = "leaves what the training after needs, which rounds do not keep"
    apart = "leaves what the training after needs, which jobs do not keep"

    energy: SomeShare = 0.95  # share of what a task has used that is protected
    project: Natural = 0  # rank at which matrices that train in full are followed; 0: by the base
    every: Count = 10  # steps between their new directions
    base: Optimiser = AdamW()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not getattr(self.base, "momentum", True) or getattr(self.base, "beta1", True) is None:
            raise ValueError(f"GORP reads what a task has used from a first moment, and {self.base!r} has none")

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from .gorp import GORP

        return GORP, self.over(energy=self.energy, project=self.project, every=self.every)


@Optimiser.register
@dataclass(frozen=True)
class LoRSum(_Paired):
    """Almansoori et al. 2026, arXiv:2602.16456: full fine-tuning's step cut to the rank; rates as of plain descent."""

    apart = PASSES
    private = "reads the inputs and gradients of all rows at the layers, which are neither clipped nor noised"
    alone = True
    clips = follows = groups = False
    remembers = 6

    rounds: Natural = 1  # of alternating least squares; 0: scaled gradient descent
    fraction: Share = 0.5  # of the diagonal metric; 0: none
    damping: NotNegative = 1e-2  # rho = max(lr damping, 1e-5)
    momentum: PartShare = 0.9
    average: PartShare = 0.99  # of the metric
    base: Optimiser = AdamW()  # of what is no pair

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from .lorsum import LoRSum

        kind, own = self.base.made()
        constants = {f: getattr(self, f) for f in ("rounds", "fraction", "damping", "average")}
        return LoRSum, {**own, **constants, "pull": self.momentum, "base": kind}


@Optimiser.register
@dataclass(frozen=True)
class SAMReference(_Paired):
    """After GLAD, arXiv:2507.13089: the gradient with a sharpness-aware one beside it; two passes a step."""

    by_pairs = False
    apart = PASSES
    private = "goes through the rows twice, and where it goes from their gradients without noise is not covered"
    at_once = True

    rho: NotNegative = 0.05
    lam: Share = 0.5  # share of the sharpness-aware one
    conflict: bool = False  # instead: take out what goes against it
    base: Optimiser = AdamW()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conflict and self.lam != type(self).lam:
            raise ValueError(f"SAMReference.lam has no part in it with conflict, found {self.lam:g}: leave one out")

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from . import sam

        return sam.SAMReference, self.over(
            rho=self.rho, steer=sam.without_conflict if self.conflict else sam.mixed(self.lam)
        )


@Optimiser.register
@dataclass(frozen=True)
class Riemannian(_Paired):
    """Zhang and Pilanci 2024, arXiv:2402.02347 (ScaledAdam): PEFT's."""

    reg: Positive = 1e-2
    base: Optimiser = AdamW()

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from .by_peft import Riemannian

        return Riemannian, self.over(reg=self.reg)


@Optimiser.register
@dataclass(frozen=True)
class LoRAFA(Optimiser):
    """Zhang et al. 2023, arXiv:2308.03303: A stays as it is, B by AdamW along dL/dB (A A')^-1 / s^2; PEFT's."""

    paired = True
    apart = "freezes A for good, on a model that jobs share"
    follows = groups = entrywise = False

    beta1: PartShare = 0.9
    beta2: PartShare = 0.999
    eps: Positive = 1e-6

    def made(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        from .by_peft import LoRAFA

        return LoRAFA, {"betas": (self.beta1, self.beta2), "eps": self.eps}  # type: ignore[return-value]
