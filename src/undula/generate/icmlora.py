"""ICM-LoRA (arXiv:2501.17635, IJCAI 2025): a LoRA for a task of which a few rows are at hand.

    t = mean over rows of the base's last hidden state (the last token's; of an encoder the tokens' mean)       (H,)
    L = MSE(X, X^) + beta KL(q(z | X, t) || N(0, I)),    beta = 0.005

X is a checkpoint, standardised by the library's experts.  (The authors' code stores the statistics of a reference
checkpoint of the target with the generator, which tells a part of the answer.)  Generate: z ~ N(0, I), decode with t.
With `channels` the network is the published one, of convolutions over all D numbers; without, which is the default and
an interpretation, it has two dense layers over coordinates in the library's principal components (`fitting.Basis`):
trained in seconds, where the convolutions had learned the mean alone.  t is standardised too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..train.rows import spaced
from .fitting import FLOOR, Basis, Standard, checkpoints, drawn, keep, kept, seeded, trained
from .icm_nets import Convolutional, Dense, Net
from .library import Library
from .task_vector import ROWS, of_experts, task_vectors

KIND = "icm-lora"
PUBLISHED = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Options:
    """rows: of a task, whose states make t; components: P; channels: of the convolutions, a layer each, as in
    PUBLISHED, () for none; hidden, latent: widths; beta: of the KL; the rest is of the training."""

    rows: int = ROWS
    components: int = 64
    channels: tuple[int, ...] = ()
    hidden: int = 128
    latent: int = 16
    beta: float = 0.005
    steps: int = 400
    batch: int = 16
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, eq=False)
class ICMLoRA:
    """A trained generator over a library.  space: from numbers to what the network sees, and back; tasks (N, H): the
    experts' task vectors; losses: of its training."""

    library: Library
    options: Options
    space: Standard | Basis
    tasks: Tensor
    net: Net
    losses: tuple[float, ...] = ()

    @classmethod
    def fit(cls, library: Library, options: Options = Options(), tasks: Tensor | None = None) -> Self:
        """Trains it on the library's checkpoints.  tasks (N, H): the experts' task vectors, where they are known; else
        they are made of their own training rows.  Raises ValueError for fewer than two experts, or task vectors that
        are all the same: a condition tells one task from another."""
        if len(library.experts) < 2:
            raise ValueError(f"ICM-LoRA learns from experts beside each other; {library.path} has one")
        tasks = of_experts(library, options.rows) if tasks is None else tasks
        if len(tasks) != len(library.experts):
            raise ValueError(f"{len(library.experts)} experts have a task vector each; found {len(tasks)}")
        if torch.equal(tasks, tasks[:1].expand_as(tasks)):
            raise ValueError(
                f"the tasks of {library.path} have one task vector: their rows begin alike, which says nothing"
            )
        space = Standard.of(library) if options.channels else Basis.of(library, options.components)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            made = cls(library, options, space, tasks, _net(library, options, space, tasks))
        t, draw = made.condition(tasks), seeded(options.seed)

        def loss() -> Tensor:
            rows = torch.randint(len(t), (options.batch,), generator=draw)
            X = space(checkpoints(library, rows, draw))
            return made.net.loss(X, t[rows], options.beta, draw)

        losses = trained(made.net, loss, options.steps, options.lr, "training ICM-LoRA")
        return cls(library, options, space, tasks, made.net, tuple(losses))

    def condition(self, tasks: Tensor) -> Tensor:
        """Task vectors (B, H), standardised by those of the experts."""
        deviation = self.tasks.std(0, correction=0)
        deviation = deviation.clamp(min=FLOOR * float(deviation.square().mean().sqrt()))
        return ((tasks - self.tasks.mean(0)) / deviation).to(self.library.means.dtype)

    @torch.no_grad()
    def vector(self, rows: Sequence[str] | Tensor, seed: int | None = None) -> Tensor:
        """The numbers (D,) for a task of which these are rows, texts, or the task vector (H,) of them.  seed: of z;
        None: z = 0, the middle of N(0, I)."""
        if isinstance(rows, Tensor):
            task = rows
        else:
            some = [rows[i] for i in spaced(len(rows), self.options.rows)]
            task = task_vectors(self.library.model, [some])[0]
        t = self.condition(task[None])
        zero = torch.zeros(1, self.options.latent, dtype=t.dtype)
        z = drawn(zero, zero, None if seed is None else seeded(seed))
        return self.space.back(self.net.decode(z, t)[0])

    def generate(self, rows: Sequence[str] | Tensor, seed: int | None = None) -> Adapter:
        """The adapter for a task of which these are rows."""
        return self.library.layout.unpack(self.vector(rows, seed))

    def save(self, folder: str | Path) -> None:
        """Writes generator.json and generator.safetensors."""
        tensors = {f"net.{k}": t for k, t in self.net.state_dict().items()} | {"tasks": self.tasks}
        tensors |= {"V": self.space.V} if isinstance(self.space, Basis) else {}
        keep(Path(folder), KIND, asdict(self.options), self.library, tensors)

    @classmethod
    def load(cls, folder: str | Path, library: Library) -> Self:
        """Raises FileNotFoundError or ValueError, see `fitting.kept`."""
        said, tensors = kept(Path(folder), KIND, library)
        options, tasks = Options(**{**said, "channels": tuple(said["channels"])}), tensors.pop("tasks")
        space = Standard.of(library) if options.channels else Basis.along(library, tensors.pop("V"))
        net = _net(library, options, space, tasks)
        net.load_state_dict({k.removeprefix("net."): t for k, t in tensors.items()})
        return cls(library, options, space, tasks, net.eval())


def _net(library: Library, options: Options, space: Standard | Basis, tasks: Tensor) -> Net:
    widths = options.hidden, options.latent
    if isinstance(space, Basis):
        net: Net = Dense(space.size, tasks.shape[1], *widths)
    else:
        net = Convolutional(library.layout.size, tasks.shape[1], options.channels, *widths)
    return net.to(library.means.dtype)
