"""The ladder of laws: what a method can name decides what it gets for free.

    Method       forward(x, layer, f)   train, save, load, route rows
      Reweight   weight(W, f) -> W'     + exact merge and unmerge, export of the merged model
        Additive delta(f) -> dW         + combine, subtract, collapse by truncation
          LowRank pair(f) -> (B, A)     + batched serving, exact truncation, export as a plain PEFT LoRA

A method is a frozen dataclass: it *is* its configuration.  It stands on the highest rung that it can honestly name,
and the rung is the only place that says what can be merged, combined or exported.

Shape suffixes: O = d_out, I = d_in, R = rank, T = tokens.
"""

from __future__ import annotations

import abc
import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from ..kernels import reference
from ..kernels.bottleneck import bottleneck, rounded
from .bend import Bend
from .choice import Choice, plain
from .layer import Layer
from .site import Site

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settled:
    """A law over a layer whose weight stays: y' = g (y - b + B bend(A x)) + b, of the frozen layer's output y and its
    bias b.  A (R, I), B (O, R); `gain` g (O), or None for 1; `bent` are the factors of the bend, which `Method.bent`
    takes, none where it is straight."""

    B: Tensor
    A: Tensor
    gain: Tensor | None = None
    bent: Factors = field(default_factory=dict)


class Product(NamedTuple):
    """A term scale B diag(gate) A of an update, of factors as they are: B (O, R), A (R, I), gate (R) or None for 1."""

    scale: float
    B: Tensor
    A: Tensor
    gate: Tensor | None = None


class Method(Choice):
    """A law of one adapted layer: y = forward(x, layer, f)."""

    formula: ClassVar[str] = ""
    parameters: ClassVar[str] = ""  # per site, in O, I and the fields: an expression that the tests evaluate
    source: ClassVar[str] = ""  # authors, year, arXiv number
    grade: ClassVar[str] = "exact"  # or "interpretation": what the sources leave open is said in the docstring
    size: ClassVar[str] = "r"  # the field that the number of parameters follows: what an equal-parameter budget changes
    beside: ClassVar[tuple[str, ...]] = ("alpha",)  # fields that stay in proportion to it
    starts_at_base: ClassVar[bool] = True  # whether the layer is unchanged until training moves it
    takes_start: ClassVar[bool] = False  # whether `init` takes a `start`, as its signature says: `Centred` chooses it
    gate: ClassVar[str | None] = None  # the factor (R) that switches the ranks of a LowRank method on and off

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.takes_start = "start" in inspect.signature(cls.init).parameters
        if cls.__module__.rpartition(".")[0] != __package__ and not cls.__name__.startswith(
            "_"
        ):  # neither a rung nor a helper
            Method.register(cls)

    @abc.abstractmethod
    def init(self, site: Site) -> dict[str, Tensor]:
        """Factors at which the layer is unchanged (see `starts_at_base`); `requires_grad` marks what trains."""

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        """Those of the frozen factors that this configuration and the site's name, shape and peers determine, bit for
        bit (see `Site.frozen`).  `init` returns them too; files hold their checksums only."""
        return {}

    def check(self, site: Site, f: Factors) -> None:
        """Raises ValueError where integer factors, which a file may hold, cannot be: an index outside the layer.
        Names, shapes, types and finiteness are checked already."""

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        """Factors of a second adapter beside `f`, a live one of this method at this site: what trains stands at a
        start, what is frozen is f's."""
        return {k: t if t.requires_grad else f[k] for k, t in self.init(site).items()}

    @abc.abstractmethod
    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        """The adapted layer's output for x."""

    # What a method may tell or do beside: all of it is asked of the method, and nothing else names methods for it.

    def bend(self, f: Factors) -> Bend | None:
        """How it is nonlinear, for `diagnose`; None of a method that has no nonlinearity, or tells of none."""
        return None

    def static_pair(self, f: Factors) -> tuple[Tensor, Tensor] | None:
        """(B (O, R), A (R, I)) that its source deploys in its place, another function (`Substitute`); None: nothing."""
        return None

    def at_rank(self, f: Factors, b: int) -> tuple[Method, Factors] | None:
        """The method and factors of its first b ranks, where it was trained to be cut at any; None where it was not."""
        return None

    def reads(self, f: Factors) -> Tensor | None:
        """Which of the layer's inputs it reads (I), ones and zeros; None: all of them."""
        return None

    def unmasked(self, f: Factors) -> tuple[Method, Factors]:
        """The method and factors without that mask."""
        return self, f

    def settled(self, layer: Layer, f: Factors) -> Settled | None:
        """How it computes where neither `f` nor the layer's weight changes any more, for batches of many adapters; None
        of a method that has no such form."""
        return None

    def bent(self, z_TR: Tensor, f: Factors) -> Tensor:
        """What stands between A and B of `settled`, by these of its factors."""
        return z_TR

    def products(self, f: Factors) -> list[Product] | None:
        """The products of two factors whose sum is the update that it trains, but for what is frozen; None of a method
        whose update is no such sum.  See `undula.optim.pairs`."""
        return None

    @property
    def linear_in(self) -> str | None:
        """The factor that `forward` is affine in while all others stay, so that a mean of it is the mean of what layers
        compute; of several the one that reaches most.  None where there is none."""
        return None

    @property
    def bottleneck(self) -> bool:
        """Whether `forward` takes a product A x of the inputs alone, which no convolution in groups has."""
        return True

    @property
    def drops(self) -> bool:
        """Whether there is dropout in it."""
        return False

    def unwrapped(self) -> Method:
        """The method inside everything that is around it."""
        return self

    def undropped(self) -> Method:
        """The same function outside training: the method inside dropout, which has no factors of its own."""
        return self

    def inside(self) -> Method:
        """The method whose update can be exchanged for another with the same thing around it (dropout, DoRA's
        magnitudes); itself where nothing of that kind is around it."""
        return self

    def around(self, other: Method) -> Method:
        """`other` in the place of the method inside."""
        return other

    def most(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """The largest value of the field `size` that makes sense over sites of these shapes (O, I)."""
        return max(min(shape) for shape in shapes.values())

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """The method called `name`, those of other installed packages included.  Raises LookupError."""
        if plain(name) not in cls.registry:
            load_installed()
        return super().named(name)

    @classmethod
    def rung(cls) -> str:
        """The name of the highest rung that this method stands on."""
        return next(r.__name__ for r in (LowRank, Additive, Reweight, Method) if issubclass(cls, r))


@functools.cache
def load_installed() -> None:
    """Imports the methods of other installed packages, which registers them: the entry points in the group
    `undula.methods`.  One that cannot be imported is left out, with a warning."""
    for point in importlib.metadata.entry_points(group="undula.methods"):
        try:
            point.load()
        except Exception as error:  # another package's code: whatever it raises, the others still load
            where = f"{point.name} = {point.value}"
            warnings.warn(f"the method {where} of another package did not load: {error!r}", stacklevel=2)


class Reweight(Method):
    """W' = weight(W, f): merges exactly."""

    @property
    def bottleneck(self) -> bool:
        return False

    @abc.abstractmethod
    def weight(self, W_OI: Tensor, f: Factors) -> Tensor:
        """The adapted weight (O, I)."""

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        return reference.reweighted(x, layer, self.weight(layer.weight, f))


class Additive(Reweight):
    """W' = W + delta(f): adapters of this rung can be added and subtracted."""

    @abc.abstractmethod
    def delta(self, f: Factors) -> Tensor:
        """The update dW (O, I)."""

    def rows(self, f: Factors, some: slice) -> Tensor:
        """Those rows of dW, for what goes through a large one block by block: a method whose rows can be computed
        alone says how."""
        return self.delta(f)[some]

    def weight(self, W_OI: Tensor, f: Factors) -> Tensor:
        return W_OI + self.delta(f)

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        return reference.additive(x, layer, self.delta(f))


class LowRank(Additive):
    """W' = W + B A, every scale folded in: leaves as a plain LoRA."""

    @property
    def bottleneck(self) -> bool:
        return True

    @abc.abstractmethod
    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        """(B (O, R), A (R, I))."""

    def plain(self) -> tuple[float, str, str] | None:
        """(s, B, A) where the pair is (s f[B], f[A]), two factors as they are; None of any other."""
        return None

    def products(self, f: Factors) -> list[Product] | None:
        plain = self.plain()
        return None if plain is None else [Product(plain[0], f[plain[1]], f[plain[2]])]

    def settled(self, layer: Layer, f: Factors) -> Settled | None:
        return Settled(*self.pair(f))

    def delta(self, f: Factors) -> Tensor:
        B_OR, A_RI = self.pair(f)
        return B_OR @ A_RI

    def rows(self, f: Factors, some: slice) -> Tensor:
        B_OR, A_RI = self.pair(f)
        return B_OR[some] @ A_RI

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        B_OR, A_RI = self.pair(f)
        # what is computed with, and not trained, is as exact as ever
        law = rounded if layer.training and self.plain() is not None else bottleneck
        return law(x, layer, A_RI, B_OR)


def check_within(what: str, t: Tensor, least: int, most: int) -> None:
    """Raises ValueError where integers lie outside least .. most."""
    if t.numel() and not (least <= int(t.min()) and int(t.max()) <= most):
        raise ValueError(f"{what} has numbers from {int(t.min())} to {int(t.max())}; they lie in {least} .. {most}")


RUNGS: tuple[type[Method], ...] = (LowRank, Additive, Reweight, Method)
