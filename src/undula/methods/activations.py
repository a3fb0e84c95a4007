"""Elementwise activations of LoRAN and its ablation (Li, Song, Hou 2024, EMNLP Findings, pp. 3134-3143).

Each is the published function minus its value at 0, so that B = 0 leaves the base unchanged: `centred` in the formula
marks where that changes anything.  `constants` are numbers that a method may train.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.ranges import Finite, NotZero
from ..kernels import in_c

Constants = Mapping[str, "float | Tensor"]


class Activation(Choice):
    """f(u), elementwise, with f(0) = 0."""

    formula: ClassVar[str] = ""
    trainable: ClassVar[tuple[str, ...]] = ()
    about_u: ClassVar[bool] = False  # whether f(u) is u and a bend beside it
    swing_of: ClassVar[str] = ""  # of `swing`, in the constants
    advice: ClassVar[str] = ""  # how to make the bend visible to narrow types

    @abc.abstractmethod
    def value(self, u: Tensor, c: Constants) -> Tensor:
        """f(u) with the constants c."""

    def __call__(self, u: Tensor, c: Constants | None = None) -> Tensor:
        """f(u); c replaces trained constants."""
        return self.value(u, {**self.constants(), **(c or {})})

    def bend(self, u: Tensor, c: Constants, spare: Tensor) -> Tensor:
        """f(u); `u` and `spare`, of its shape, may be overwritten: a form in place saves the time that fresh memory
        costs."""
        return self(u, c)

    def pull(self, u: Tensor, g: Tensor, c: Constants, spare: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(f(u), g f'(u), gradients of sum(g f(u)) for the trained constants in c), by autograd on this one block.
        `u`, `g` and two `spare` tensors of their shape may be overwritten.  A closed form here is worth its lines
        where an activation is used at scale."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            trained = {k: t.detach().requires_grad_() for k, t in c.items() if isinstance(t, Tensor)}
            value = self(u, {**c, **trained})
        du, *dc = torch.autograd.grad(value, [u, *trained.values()], g)
        return value.detach(), du, dc

    def wave(self) -> tuple[float, float, float, float] | None:
        """(p, q, v, w) where f(u) = p u + (q u + v) sin(w u); None of any other form."""
        return None

    def constants(self) -> dict[str, float]:
        """The published numbers in the formula that can be trained."""
        return {name: getattr(self, name) for name in self.trainable}

    def swing(self, reach: float, c: Constants) -> float | None:
        """How far the slope swings at |u| = reach; None where it is bounded whatever u."""
        return None

    def slope_at_zero(self) -> float:
        """f'(0), as autograd sees it: what B = 0 learns through."""
        with torch.inference_mode(False), torch.enable_grad():  # whoever attaches or loads computes without, maybe
            u = torch.zeros((), dtype=torch.float64, device="cpu", requires_grad=True)
            return float(torch.autograd.grad(self(u), u)[0])


@Activation.register
@dataclass(frozen=True)
class Sinter(Activation):
    """LoRAN's own: u + a u sin(w u).  a is a relative amplitude, |f(u) - u| <= a |u|; keep a w |u| <= 0.5, beyond
    that f' swings so far that training becomes unstable.  Published: a = 5e-5, w = 1e4 (invisible in bf16)."""

    formula = "u + a u sin(w u)"
    trainable = ("a", "w")
    about_u = True
    swing_of = "a*w*|u|"
    advice = "with Sinter choose a >= 4e-3"
    a: Finite = 5e-5
    w: Finite = 1e4

    def swing(self, reach: float, c: Constants) -> float | None:
        return abs(float(c["a"]) * float(c["w"])) * reach

    def wave(self) -> tuple[float, float, float, float]:
        return 1.0, self.a, 0.0, self.w

    def value(self, u: Tensor, c: Constants) -> Tensor:
        a, wave = c["a"], torch.sin(c["w"] * u)
        return u + a * u * wave if isinstance(a, Tensor) else torch.addcmul(u, u, wave, value=a)

    def bend(self, u: Tensor, c: Constants, spare: Tensor) -> Tensor:
        if c:  # constants that train
            return self(u, c)
        if in_c.applies(u):
            return in_c.bend("sinter", u, self.w, self.a)
        return u.addcmul_(u, torch.mul(u, self.w, out=spare).sin_(), value=self.a)

    def pull(self, u: Tensor, g: Tensor, c: Constants, spare: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        if c:
            return super().pull(u, g, c, spare)
        if in_c.applies(u) and in_c.applies(g):
            return *in_c.pull("sinter", u, g, self.w, self.a), []
        cos, sin = spare
        torch.sin(torch.mul(u, self.w, out=cos), out=sin)
        slope = torch.addcmul(sin, u, cos.cos_(), value=self.w, out=cos)  # f' = 1 + a slope
        return u.addcmul_(u, sin, value=self.a), g.addcmul_(g, slope, value=self.a), []


@Activation.register
@dataclass(frozen=True)
class Sine(Activation):
    """Sine-LoRA's (Ji et al. 2024, arXiv:2403.19243): sin(w u)."""

    formula = "sin(w u)"
    trainable = ("w",)
    w: NotZero = 200.0

    def wave(self) -> tuple[float, float, float, float]:
        return 0.0, 0.0, 1.0, self.w

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return torch.sin(c["w"] * u)

    def bend(self, u: Tensor, c: Constants, spare: Tensor) -> Tensor:
        if not c and in_c.applies(u):
            return in_c.bend("sine", u, self.w)
        return self(u, c) if c else u.mul_(self.w).sin_()

    def pull(self, u: Tensor, g: Tensor, c: Constants, spare: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        if c:
            return super().pull(u, g, c, spare)
        if in_c.applies(u) and in_c.applies(g):
            return *in_c.pull("sine", u, g, self.w), []
        slope = torch.cos(u.mul_(self.w), out=spare[0]).mul_(self.w)
        return u.sin_(), g.mul_(slope), []


@Activation.register
@dataclass(frozen=True)
class Identity(Activation):
    """u: plain LoRA."""

    formula = "u"
    about_u = True

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return u


@Activation.register
@dataclass(frozen=True)
class Sigmoid(Activation):
    """1/(1 + exp(-u)) - 1/2 (centred)."""

    formula = "1/(1+exp(-u)) - 1/2"

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return torch.sigmoid(u) - 0.5


@Activation.register
@dataclass(frozen=True)
class Tanh(Activation):
    """tanh(u)."""

    formula = "tanh(u)"

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return torch.tanh(u)


@Activation.register
@dataclass(frozen=True)
class ReLU(Activation):
    """max(u, 0).  Its derivative at 0 is 0: from B = 0 nothing ever learns."""

    formula = "max(u, 0)"

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return torch.relu(u)


@Activation.register
@dataclass(frozen=True)
class LeakyReLU(Activation):
    """max(u, 0) + slope min(u, 0)."""

    formula = "max(u, 0) + slope min(u, 0)"
    slope: Finite = 0.01

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return torch.nn.functional.leaky_relu(u, self.slope)


@Activation.register
@dataclass(frozen=True)
class SiLU(Activation):
    """u / (1 + exp(-u))."""

    formula = "u/(1+exp(-u))"

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return torch.nn.functional.silu(u)


@Activation.register
@dataclass(frozen=True)
class Swish(Activation):
    """u / (1 + exp(-beta u)), beta = 25 in the ablation."""

    formula = "u/(1+exp(-beta u))"
    beta: Finite = 25.0

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return u * torch.sigmoid(self.beta * u)


@Activation.register
@dataclass(frozen=True)
class Cos(Activation):
    """u cos(w u) + u."""

    formula = "u cos(w u) + u"
    trainable = ("w",)
    w: Finite = 1e4

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return u * torch.cos(c["w"] * u) + u


@Activation.register
@dataclass(frozen=True)
class GaussianBump(Activation):
    """u exp(-u^2) / 2: the ablation's "Gaussian"."""

    formula = "u exp(-u^2)/2"

    def value(self, u: Tensor, c: Constants) -> Tensor:
        return 0.5 * u * torch.exp(-u * u)


def gain_at_zero(activation: Activation) -> float:
    """|f'(0)|; raises ValueError where f(0) != 0 (a third party's activation), which would damage the base."""
    at_zero = float(activation(torch.zeros((), dtype=torch.float64, device="cpu")))
    if not math.isclose(at_zero, 0.0, abs_tol=1e-12):
        raise ValueError(f"{activation!r} is {at_zero:g} at 0: B = 0 would shift every weight. Subtract its value at 0")
    return abs(activation.slope_at_zero())
