"""The two networks of ICM-LoRA: q(z | X, t) and the decoder, of vectors X (B, N) with a condition t (B, H)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fitting import drawn, kl


class Net(nn.Module):
    """What both have: the loss."""

    def encode(self, X: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) (B, Z)."""
        raise NotImplementedError

    def decode(self, z: Tensor, t: Tensor) -> Tensor:
        """(B, N)."""
        raise NotImplementedError

    def loss(self, X: Tensor, t: Tensor, beta: float, draw: torch.Generator | None) -> Tensor:
        """The mean over the rows of MSE + beta KL; without `draw` z is the posterior's mean."""
        mu, log = self.encode(X, t)
        error = F.mse_loss(self.decode(drawn(mu, log, draw), t), X)
        return error + beta * kl(mu, log, torch.zeros_like(mu), torch.zeros_like(log)).mean()


class Dense(Net):
    """Two layers each, of coordinates (B, P)."""

    def __init__(self, P: int, H: int, hidden: int, latent: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(P + H, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent + H, hidden), nn.ReLU(), nn.Linear(hidden, P))

    def encode(self, X: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mu, log = self.encoder(torch.cat([X, t], -1)).chunk(2, -1)
        return mu, log

    def decode(self, z: Tensor, t: Tensor) -> Tensor:
        made: Tensor = self.decoder(torch.cat([z, t], -1))
        return made


class Convolutional(Net):
    """The published one, of all numbers (B, D), padded to a multiple of 2^layers: convolutions of stride 2 and kernel 7
    (LeakyReLU), a linear layer, t beside it; the decoder is the mirror (ELU).  GroupNorm where the authors have
    BatchNorm, which in batches of 2 would mix tasks."""

    def __init__(self, D: int, H: int, channels: Sequence[int], hidden: int, latent: int):
        super().__init__()
        whole = 2 ** len(channels)
        self.D, self.padded = D, -(-D // whole) * whole
        ends = (1, *channels)
        self.inner = channels[-1], self.padded // whole
        flat = self.inner[0] * self.inner[1]
        self.encoder = nn.Sequential(*[
            nn.Sequential(nn.Conv1d(a, b, 7, 2, 3), nn.GroupNorm(1, b), nn.LeakyReLU())
            for a, b in itertools.pairwise(ends)
        ])  # fmt: skip
        self.squeeze, self.posterior = nn.Linear(flat, hidden), nn.Linear(hidden + H, 2 * latent)
        self.spread = nn.Linear(latent + H, flat)
        self.decoder = nn.Sequential(*[
            nn.Sequential(nn.ELU(), nn.ConvTranspose1d(a, b, 7, 2, 3, 1)) for a, b in itertools.pairwise(ends[::-1])
        ])  # fmt: skip

    def encode(self, X: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        read = self.encoder(F.pad(X, (0, self.padded - self.D))[:, None]).flatten(1)
        mu, log = self.posterior(torch.cat([self.squeeze(read), t], -1)).chunk(2, -1)
        return mu, log

    def decode(self, z: Tensor, t: Tensor) -> Tensor:
        inner = self.spread(torch.cat([z, t], -1)).unflatten(1, self.inner)
        made: Tensor = self.decoder(inner)[:, 0, : self.D]
        return made
