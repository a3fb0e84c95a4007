"""Where a method acts: one matrix of a model, what makes numbers for it, and what data tell about it.

Shape suffixes: O = d_out, I = d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels import frozen
from .layer import Layer, Outline


class Evidence(Protocol):
    """What the model and data tell about a site, for starts that want to know (see `undula.Probe`)."""

    def gradient(self, name: str) -> Tensor:
        """dL/dW (O, I), averaged over the batches."""

    def moments(self, name: str) -> tuple[Tensor, Tensor, int]:
        """(sum of x x' (I, I), sum of x (I), count) of the layer's inputs."""


class Evident(Protocol):
    """What gives `Evidence` of a model's layers: `undula.Probe`."""

    def on(self, model: Any, layers: Mapping[str, Any]) -> Evidence:
        """The evidence of these layers."""


@dataclass(frozen=True)
class Site:
    """Where: one matrix of the model.

    `shared` is one dictionary per attach, for tied tensors and frozen bases.  `peers` has the shapes (O, I) of all
    sites of this attach that have the same method, in the model's order; the values that a method makes may depend on
    them, their shapes may not.
    """

    name: str
    layer: Layer
    shape: tuple[int, int]  # (O, I)
    dtype: torch.dtype  # of the factors: float32, or float64 over a float64 base
    device: torch.device
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    peers: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)
    evidence: Evidence | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.peers:
            object.__setattr__(self, "peers", {self.name: self.shape})

    @property
    def looks_up(self) -> bool:
        """Whether the layer is an embedding: its input is a one-hot vector."""
        kernel = getattr(self.layer, "kernel", None)
        return kernel is not None and len(kernel) < 2  # (i,): row i is padding

    @property
    def W(self) -> Tensor:
        """The frozen matrix (O, I), detached and dense, in the factors' type."""
        return self.layer.weight.detach().to(self.dtype)

    def outline(self) -> Site:
        """The same site without numbers (on the meta device): `init` on it tells names and shapes of factors."""
        return replace(self, layer=Outline(self.shape, self.dtype), device=torch.device("meta"), shared={})

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """The tensor that all sites of one attach share under `key`; `make` is called for the first of them."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def frozen(self, seed: int, *key: frozen.Key, shape: tuple[int, ...], bound: float = 1.0) -> Tensor:
        """Numbers uniform within `bound` that (seed, key, shape, bound) alone determine, bit for bit on any machine."""
        if self.device.type == "meta":  # arithmetic there would import torch's compiler, for seconds
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return (frozen.uniform(seed, key, shape, self.device) * bound).to(self.dtype)

    def gradient(self) -> Tensor:
        """dL/dW (O, I) at this matrix, averaged over the batches of the probe.  Raises RuntimeError without one."""
        if self.device.type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self._evidence("gradients").gradient(self.name).to(self.device, self.dtype)

    def moments(self) -> tuple[Tensor, Tensor, int]:
        """(sum of x x' (I, I), sum of x (I), count) of the layer's inputs over the batches of the probe, float64."""
        if self.device.type == "meta":
            I = self.shape[1]
            return *(torch.empty(s, dtype=torch.float64, device="meta") for s in ((I, I), (I,))), 1  # type: ignore[return-value]
        xx_II, x_I, n = self._evidence("activations").moments(self.name)
        return xx_II.to(self.device, torch.float64), x_I.to(self.device, torch.float64), n

    def _evidence(self, what: str) -> Evidence:
        if self.evidence is None:
            raise NoEvidence(
                f"this method starts from {what} ({self.name} asks for them): give it data, as in "
                "attach(model, method, probe=undula.Probe(batches)). `undula train` does so by itself"
            )
        return self.evidence

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def uniform(self, *shape: int, bound: float) -> Tensor:
        made = torch.empty(*shape, dtype=self.dtype, device=self.device)
        return made if made.is_meta else made.uniform_(-bound, bound)  # as in `frozen`

    def normal(self, *shape: int, std: float) -> Tensor:
        made = torch.empty(*shape, dtype=self.dtype, device=self.device)
        return made if made.is_meta else made.normal_(0.0, std)  # as in `frozen`


class NoEvidence(RuntimeError):
    """A start asks for data that nobody gave."""
