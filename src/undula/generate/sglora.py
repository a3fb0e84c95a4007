"""SG-LoRA (arXiv:2509.10535, CVPR 2026): a LoRA for a task that is only described.

    c = (mu*, s*^2)                                        the mixture of the nearest experts, see `mixture`
    L = |X - X^|^2 + lam KL(q(z | X, c) || p(z | c))       q, p: two layers, the decoder three, ReLU between

X (P) is an expert's checkpoint, c (2 P) the mixture of the other experts for its description, so that training meets
what a new task will.  Generate: z ~ p(z | c), decode.  Interpretation, where no text was at hand: tau, the widths, and
that X and c are coordinates in the library's principal components (`fitting.Basis`): as vectors of all D numbers the
same network learned the mean alone in as many steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from .fitting import Basis, checkpoints, drawn, keep, kept, kl, seeded, trained
from .library import Library
from .mixture import TAU, K, Mixture, mixture

KIND = "sg-lora"


class Net(nn.Module):
    """q(z | X, c), p(z | c) and the decoder, of vectors X (B, P) and conditions c (B, 2 P)."""

    def __init__(self, P: int, hidden: int, latent: int):
        super().__init__()
        H, Z = hidden, latent
        self.encoder = nn.Sequential(nn.Linear(3 * P, H), nn.ReLU(), nn.Linear(H, 2 * Z))
        self.prior = nn.Sequential(nn.Linear(2 * P, H), nn.ReLU(), nn.Linear(H, 2 * Z))
        self.decoder = nn.Sequential(
            nn.Linear(Z + 2 * P, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, P)
        )  # fmt: skip

    def posterior(self, X: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) (B, Z)."""
        mu, log = self.encoder(torch.cat([X, c], -1)).chunk(2, -1)
        return mu, log

    def before(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) (B, Z)."""
        mu, log = self.prior(c).chunk(2, -1)
        return mu, log

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        made: Tensor = self.decoder(torch.cat([z, c], -1))
        return made

    def loss(self, X: Tensor, c: Tensor, lam: float, draw: torch.Generator) -> Tensor:
        """The mean over the rows of L."""
        q, p = self.posterior(X, c), self.before(c)
        error = (X - self.decode(drawn(*q, draw), c)).square().sum(-1)
        return (error + lam * kl(*q, *p)).mean()


@dataclass(frozen=True)
class Options:
    """k, tau: of the mixture; components: P; hidden, latent: widths; lam: of the KL; the rest is of the training."""

    k: int = K
    tau: float = TAU
    components: int = 64
    hidden: int = 128
    latent: int = 16
    lam: float = 1.0
    steps: int = 400
    batch: int = 16
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, eq=False)
class SGLoRA:
    """A trained generator over a library.  losses: of its training."""

    library: Library
    options: Options
    basis: Basis
    net: Net
    losses: tuple[float, ...] = ()

    @classmethod
    def fit(cls, library: Library, options: Options = Options()) -> Self:
        """Trains it on the library's checkpoints.  Raises ValueError for fewer than two experts: a condition is made
        of others."""
        if len(library.experts) < 2:
            raise ValueError(f"SG-LoRA learns from experts beside each other; {library.path} has one")
        basis = Basis.of(library, options.components)
        c = torch.stack([_condition(_mixture(library.without([e.name]), e.embedding, options), basis)
                         for e in library.experts])  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            net = Net(basis.size, options.hidden, options.latent).to(c.dtype)
        draw = seeded(options.seed)

        def loss() -> Tensor:
            rows = torch.randint(len(library.experts), (options.batch,), generator=draw)
            X = basis(checkpoints(library, rows, draw))
            return net.loss(X, c[rows], options.lam, draw)

        losses = trained(net, loss, options.steps, options.lr, "training SG-LoRA")
        return cls(library, options, basis, net, tuple(losses))

    @torch.no_grad()
    def vector(self, description: str | Tensor, seed: int | None = None) -> Tensor:
        """The numbers (D,) for a description, a text or its embedding (E,).  seed: of z; None: z is the prior's
        mean."""
        c = _condition(_mixture(self.library, description, self.options), self.basis)[None]
        z = drawn(*self.net.before(c), None if seed is None else seeded(seed))
        return self.basis.back(self.net.decode(z, c)[0])

    def generate(self, description: str | Tensor, seed: int | None = None) -> Adapter:
        """The adapter for a description."""
        return self.library.layout.unpack(self.vector(description, seed))

    def save(self, folder: str | Path) -> None:
        """Writes generator.json and generator.safetensors."""
        tensors = {f"net.{k}": t for k, t in self.net.state_dict().items()}
        keep(Path(folder), KIND, asdict(self.options), self.library, {**tensors, "V": self.basis.V})

    @classmethod
    def load(cls, folder: str | Path, library: Library) -> Self:
        """Raises FileNotFoundError or ValueError, see `fitting.kept`."""
        said, tensors = kept(Path(folder), KIND, library)
        options = Options(**said)
        basis = Basis.along(library, tensors.pop("V"))
        net = Net(basis.size, options.hidden, options.latent).to(library.means.dtype)
        net.load_state_dict({k.removeprefix("net."): t for k, t in tensors.items()})
        return cls(library, options, basis, net.eval())


def _mixture(library: Library, query: str | Tensor, options: Options) -> Mixture:
    return mixture(library, query, options.k, options.tau)


def _condition(found: Mixture, basis: Basis) -> Tensor:
    """(2 P,): mean and variance of a mixture, in coordinates."""
    return torch.cat([basis(found.mean), basis.spread(found.variance)])
