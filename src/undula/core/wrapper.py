"""Methods around methods: what they do not change of the method inside, they pass on."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

from .bend import Bend
from .method import RUNGS, Factors, Method, Site


class Around(Method):
    """A method around one other, `inner`."""

    inner: Method

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        return self.inner.rebuilt(site)

    def check(self, site: Site, f: Factors) -> None:
        self.inner.check(site, f)

    def bend(self, f: Factors) -> Bend | None:
        return self.inner.bend(f)

    @property
    def bottleneck(self) -> bool:
        return self.inner.bottleneck

    @property
    def linear_in(self) -> str | None:
        return self.inner.linear_in

    @property
    def drops(self) -> bool:
        return self.inner.drops

    def unwrapped(self) -> Method:
        return self.inner.unwrapped()


class Wrapper(Method):
    """A method around methods.  It stands where they stand: `Dropout(LoRA())` is LowRank, `Dropout(DoRA())` Reweight.

    A public wrapper chooses its variant in `__new__` by `on_rung`; copies and files name the public class alone.
    """

    @classmethod
    def public(cls) -> type:
        """The wrapper that this class is a variant of, or is."""
        return cls.__mro__[1].public() if cls.__name__.startswith("_") else super().public()  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return self.public(), tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        return f"{self.public().__name__}({shown})"


def on_rung(wrapper: type[Method], inner: Method) -> type[Method]:
    """The variant of `wrapper` for the rung of `inner`: the one of its subclasses that stands there."""
    variants = {variant.rung(): variant for variant in wrapper.__subclasses__()}
    for rung in RUNGS:
        if isinstance(inner, rung) and rung.__name__ in variants:
            return variants[rung.__name__]
    raise TypeError(
        f"{wrapper.__name__} takes methods on the rungs {', '.join(variants)}; {inner!r} stands on {inner.rung()}"
    )
