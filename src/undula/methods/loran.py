"""LoRAN (Li, Song, Hou 2024, Findings of EMNLP, pp. 3134-3143; Deng, Liu, Wu, Li, Song 2025, arXiv:2509.21870).

    W' = W + s f(B A),   f elementwise,   Sinter: f(u) = u + a u sin(w u),   s = alpha / r

The nonlinearity acts in weight space, so LoRAN merges exactly, on a matrix of any shape.  At the published constants
(a = 5e-5, w = 1e4) it changes the update by 4e-5 of itself: `undula show` says how nonlinear an adapter really is.
The sine is computed in float32 or wider whatever the model's type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.bend import Bend, Elementwise
from ..core.method import Additive, Factors, Layer, Method, Site
from ..core.ranges import Positive, Rank
from ..kernels import reference
from ..kernels.autocast import exact, hand_written, wide
from ..kernels.bottleneck import fusible
from ..kernels.elementwise import bent, elementwise
from ..starts import Kaiming, Start
from .activations import Activation, Sine, Sinter, gain_at_zero
from .lora import Classic, Scaling


def learnable_start(activation: Activation, start: Start) -> None:
    """Refuses the trap f'(0) = 0 with B = 0: no gradient would ever reach B or A."""
    if gain_at_zero(activation) == 0 and start.at_base:
        raise ValueError(
            f"{activation!r} has derivative 0 at 0, and B = 0 at the start: the adapter could never learn. "
            "Start elsewhere: Centred(LoRAN(...), start=Gaussian())"
        )


@dataclass(frozen=True)
class LoRAN(Additive):
    """W' = W + s f(B A).  `learn` names constants of the activation that train, one number per site (`a,w`)."""

    formula = "W' = W + s f(B A), f(u) = u + a u sin(w u)"
    parameters = "r*(O + I) + len(learn)"
    source = "Li, Song, Hou 2024 (EMNLP Findings); Deng et al. 2025, arXiv:2509.21870"

    r: Rank = 8
    alpha: Positive = 16.0
    activation: Activation = Sinter()
    learn: tuple[str, ...] = ()
    scaling: Scaling = Classic()

    def __post_init__(self) -> None:
        unknown = set(self.learn) - set(self.activation.trainable)
        if unknown:
            has = ", ".join(self.activation.trainable) or "none"
            raise ValueError(
                f"{self.activation!r} has no constant {', '.join(sorted(unknown))} to learn; it has: {has}"
            )

    def init(self, site: Site, start: Start = Kaiming()) -> dict[str, Tensor]:
        learnable_start(self.activation, start)
        B_OR, A_RI = start(site, self.r)
        values = self.activation.constants()
        trained = {c: torch.full((1,), values[c], dtype=site.dtype, device=site.device) for c in self.learn}
        return {k: t.requires_grad_() for k, t in {"A": A_RI, "B": B_OR, **trained}.items()}

    def scale(self, I: int) -> float:
        """s, for a matrix of I columns."""
        return self.scaling(self.r, self.alpha)

    def constants(self, f: Factors) -> dict[str, Tensor]:
        """The trained constants of the activation."""
        return {c: f[c] for c in self.learn}

    def delta(self, f: Factors) -> Tensor:
        return bent(self.activation, self.scale(f["A"].shape[1]), f["B"], f["A"], self.constants(f))

    def rows(self, f: Factors, some: slice) -> Tensor:
        return self.delta({**f, "B": f["B"][some]})

    def bend(self, f: Factors) -> Bend:
        constants, dtype = {c: f[c].detach() for c in self.learn}, wide(f["A"].dtype)

        def function(u: Tensor) -> Tensor:
            return self.activation(u, {c: t.to(u.dtype) for c, t in constants.items()})

        u_OI = f["B"].to(dtype) @ f["A"].to(dtype)
        swing = self.activation.swing(float(u_OI.abs().max()), {**self.activation.constants(), **constants})
        told = self.activation.about_u, swing, self.activation.swing_of, self.activation.advice
        return Elementwise(function, u_OI, None, *told)

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        A_RI, B_OR = f["A"], f["B"]
        if layer.channel != -1 or not x.is_floating_point() or not hand_written():
            return super().forward(x, layer, f)
        dtype, scale = wide(A_RI.dtype), self.scale(A_RI.shape[1])
        if A_RI.dtype == dtype and fusible(x, layer, A_RI, B_OR):
            law = (A_RI, B_OR, self.activation, scale, self.constants(f))
            return elementwise(x, layer.weight, layer.bias, *law)
        y = layer(x)
        constants = {c: t.to(dtype) for c, t in self.constants(f).items()}
        with exact(x.device):
            law = (A_RI.to(dtype), B_OR.to(dtype), self.activation, scale, constants)
            return reference.added(y, elementwise(x.to(dtype), None, None, *law))


@dataclass(frozen=True)
class SineLoRA(LoRAN):
    """Sine-LoRA (Ji, Saratchandran, et al. 2024, arXiv:2403.19243): W' = W + s sin(w B A) / g, g = sqrt(I).

    The same law as LoRAN with f(u) = sin(w u) and the gain g in the scale.  w is not given in the authors' code: 200
    is this project's choice.
    """

    formula = "W' = W + s sin(w B A) / sqrt(I)"
    source = "Ji et al. 2024, arXiv:2403.19243"

    activation: Activation = Sine()

    def scale(self, I: int) -> float:
        return super().scale(I) / I**0.5


@dataclass(frozen=True)
class LoRANActivation(Method):
    """The activation-space reading of LoRAN: y = W x + s f(B A x), as another library has it.

    Not the authors' LoRAN, and no weight equals it: it stands on the Method rung and does not merge.
    """

    formula = "y = W x + s f(B A x)"
    parameters = "r*(O + I)"
    source = "the reading of He et al. 2026, arXiv:2601.22708"
    grade = "interpretation"

    r: Rank = 8
    alpha: Positive = 16.0
    activation: Activation = Sinter()
    scaling: Scaling = Classic()

    def init(self, site: Site, start: Start = Kaiming()) -> dict[str, Tensor]:
        learnable_start(self.activation, start)
        B_OR, A_RI = start(site, self.r)
        return {"A": A_RI.requires_grad_(), "B": B_OR.requires_grad_()}

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        dtype = wide(f["A"].dtype)  # in bf16 the sine of w u would be noise
        with exact(f["A"].device):
            u_TO = torch.nn.functional.linear(reference.project(x, layer, f["A"].to(dtype)), f["B"].to(dtype))
            change = self.scaling(self.r, self.alpha) * self.activation(u_TO)
        return reference.added(layer(x), reference.restore(change, layer))
