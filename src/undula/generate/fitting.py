"""What the generators have in common: standardised vectors, a Gaussian's divergence, a training loop, their files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..io import files
from ..train.stages import advanced, stage
from .library import Library
from .mixture import total
from .pack import digest

GENERATOR = "generator"
FLOOR = 1e-3  # of the typical deviation: of numbers that hardly move, which division would make noise of


@dataclass(frozen=True, eq=False)
class Standard:
    """x -> (x - mean) / deviation, number by number (D,), by the checkpoints of a library's experts.  A target has no
    part in it: where its own statistics were stored with a generator, they would tell the answer."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, library: Library) -> Standard:
        number = len(library.experts)
        equal = torch.full((number,), 1 / number, dtype=torch.float64)
        mean, variance = total(equal, library.means, library.variances)
        deviation = variance.double().sqrt()
        floor = FLOOR * deviation.square().mean().sqrt().clamp(min=1e-12)
        return cls(mean, deviation.clamp(min=float(floor)).to(mean.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation

    def back(self, x: Tensor) -> Tensor:
        return x * self.deviation + self.mean


@dataclass(frozen=True, eq=False)
class Basis:
    """y = V (x - mean) / deviation / unit, (P,): coordinates along the principal components V (P, D) of a library's
    standardised checkpoints, unit such that E |y|^2 is at most P.  P is `components`, or as many as there are.

    D is some ten thousand and experts are dozens: a network that writes all of D learns to write these few directions
    first.  Here they are given, and what is learned is where along them.
    """

    standard: Standard
    V: Tensor
    unit: float

    @classmethod
    def of(cls, library: Library, components: int) -> Basis:
        standard = Standard.of(library)
        X = torch.cat([standard(e.checkpoints) for e in library.experts]).double()
        values, vectors = torch.linalg.eigh(X @ X.T)  # of rows, which are fewer than numbers
        there = int((values > 1e-10 * values[-1]).sum())
        top = slice(len(values) - min(components, there), None)
        if values[-1] <= 0:
            raise ValueError(
                f"the experts of {library.path} are all the same numbers: nothing is to be learned of them"
            )
        V = vectors[:, top].T @ X / values[top].sqrt()[:, None]
        return cls.along(library, V.flip(0).to(standard.mean.dtype))

    @classmethod
    def along(cls, library: Library, V: Tensor) -> Basis:
        """Along components that are known: their signs are a matter of the machine, so a generator keeps its own."""
        return cls(Standard.of(library), V, math.sqrt(V.shape[1] / len(V)))

    @property
    def size(self) -> int:
        """P."""
        return len(self.V)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., P) of (..., D)."""
        return self.standard(x) @ self.V.T / self.unit

    def back(self, y: Tensor) -> Tensor:
        """(..., D): the numbers at these coordinates."""
        return self.standard.back(y @ self.V * self.unit)

    def spread(self, variance: Tensor) -> Tensor:
        """(P,): the variance of the coordinates of numbers with these variances (D,), each by itself."""
        return (variance / self.standard.deviation.square()) @ self.V.square().T / self.unit**2


def kl(mu_q: Tensor, log_q: Tensor, mu_p: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) (B,) of diagonal Gaussians with means and log variances (B, Z): 0 where they are equal, else above."""
    each = log_p - log_q + (log_q.exp() + (mu_q - mu_p).square()) / log_p.exp() - 1
    return 0.5 * each.sum(-1)


def drawn(mu: Tensor, log: Tensor, draw: torch.Generator | None) -> Tensor:
    """mu + sigma e, e ~ N(0, I); mu itself without a generator."""
    if draw is None:
        return mu
    return mu + (0.5 * log).exp() * torch.randn(mu.shape, generator=draw, dtype=mu.dtype)


def checkpoints(library: Library, experts: Tensor, draw: torch.Generator) -> Tensor:
    """(B, D): of each of these experts, by their numbers (B,), a checkpoint that is drawn."""
    every = [library.experts[i].checkpoints for i in experts.tolist()]
    return torch.stack([rows[int(torch.randint(len(rows), (), generator=draw))] for rows in every])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(module: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, what: str) -> list[float]:
    """Adam on `loss`, called once a step; the losses.  Raises ValueError where one is not finite."""
    optimiser = torch.optim.Adam(module.parameters(), lr=lr)
    found = []
    module.train()
    with stage(what, steps, "steps"):
        for step in range(steps):
            value = loss()
            if not value.isfinite():
                raise ValueError(f"{what}: the loss at step {step + 1} is {float(value)}: lower the rate (lr={lr:g})")
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            found.append(float(value.detach()))
            advanced(1)
    module.eval()
    return found


def keep(folder: Path, kind: str, options: Mapping[str, Any], library: Library, tensors: Mapping[str, Tensor]) -> None:
    """Writes a generator: its kind and options, of which library it is, its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"version": 1, "is": kind, "options": dict(options), "start": digest(library.start),
              "experts": _experts(library)}  # fmt: skip
    files.write_state(folder, GENERATOR, values, {k: t.detach().contiguous() for k, t in tensors.items()})


def _experts(library: Library) -> dict[str, str]:
    """{name: digest of its checkpoints and embedding}, of what a generator has learned."""
    parts = {e.name: (e.checkpoints.flatten(), e.embedding.to(e.checkpoints.dtype)) for e in library.experts}
    return {name: digest(torch.cat(both)) for name, both in parts.items()}


def kept(folder: Path, kind: str, library: Library) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) of a generator that was trained on this library.  Raises FileNotFoundError; ValueError for
    another kind, or another library."""
    if not (folder / f"{GENERATOR}.json").is_file():
        raise FileNotFoundError(f"{folder} holds no generator: {GENERATOR}.json is missing")
    values, tensors = files.read_state(folder, GENERATOR)
    with files.door(str(folder / GENERATOR)):
        if values.get("is") != kind or values.get("version") != 1:
            raise ValueError(f"is {values.get('is')!r} of version {values.get('version')!r}, and {kind} is asked for")
        if values["start"] != digest(library.start) or values["experts"] != _experts(library):
            raise ValueError(
                f"was trained on other experts than those of {library.path}: delete it to train it on these"
            )
        return values["options"], tensors
