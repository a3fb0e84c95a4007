"""From weights to the space of texts: trained so that each adapter's sketch is nearest to its own description.

    E(z) = norm( W_2 gelu( W_1 (z - m) / s ) )                          z (N, WIDTH) -> (N, d)
    L = (CE(E(z) T' / tau, Y) + CE(T E(z)' / tau, Y')) / 2               T (N, d) the descriptions, of length 1

CE is cross entropy over the library (CLIP, Radford et al. 2021, arXiv:2103.00020; the retriever of AutoLoRA 2025,
arXiv:2508.02107, is trained so, with a transformer in the place of E).  Y is one-hot, but that equal descriptions share
their row.  m and s are the mean and deviation of the library's sketches.  While it trains, a share of z is dropped: a
library has dozens of adapters and a sketch a thousand numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io import tensorfile
from ..io.draft import filled
from ..io.files import check_finite
from ..io.strict import door, parsed
from .places import written
from .sketching import SEED, WIDTH

LEAST = 8  # descriptions that are not alike
KEY, VERSION = "undula_encoder", 1


class Encoder(nn.Module):
    """`base` is the model whose adapters it has seen: those of another live in another space."""

    mean: Tensor
    scale: Tensor

    def __init__(self, d: int, hidden: int = 128, base: str = "", model: str = ""):
        super().__init__()
        self.base, self.model = base, model
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("scale", torch.ones(WIDTH))
        self.down, self.up = nn.Linear(WIDTH, hidden), nn.Linear(hidden, d)
        self.drop = nn.Dropout(0.5)

    def forward(self, z_NW: Tensor) -> Tensor:
        x = self.drop((z_NW - self.mean) / self.scale)
        return F.normalize(self.up(F.gelu(self.down(x))), dim=-1)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all.  Raises what `check_place` raises."""
        path = Path(path)
        check_place(path)
        told = {"version": VERSION, "seed": SEED, "base": self.base, "model": self.model}
        path.parent.mkdir(parents=True, exist_ok=True)
        filled(path, lambda file: tensorfile.write(file, self.state_dict(), {KEY: json.dumps(told)}))

    @staticmethod
    def load(path: str | Path) -> Encoder:
        """What `save` wrote.  Raises FileNotFoundError, ValueError for anything else."""
        with door(str(path)), open(path, "rb") as file:
            found, metadata = tensorfile.entries(file, str(path))
            told: dict[str, Any] = parsed(metadata.get(KEY, "{}"), str(path))
            if {k: told.get(k) for k in ("version", "seed")} != {"version": VERSION, "seed": SEED}:
                raise ValueError(f"{path} is no encoder of weights of this version of undula: --learn makes one")
            held = tensorfile.read(file, found, str(path))
            if not {"up.weight", "down.weight"} <= held.keys() or held["up.weight"].ndim != 2:
                raise ValueError(f"{path} is no encoder of weights: it holds {', '.join(held)}")
            check_finite(held, str(path))
            d, hidden = held["up.weight"].shape
            with torch.device("meta"):
                made = Encoder(d, hidden, str(told.get("base", "")), str(told.get("model", "")))
            try:
                made.load_state_dict(held, assign=True)
            except RuntimeError as error:
                raise ValueError(f"{path} is no encoder of weights: {error}") from None
        return made.eval()


def check_place(path: str | Path) -> None:
    """Raises FileExistsError where something lies there that is no encoder: that is not written over."""
    path = Path(path)
    if path.exists() and not written(path):
        raise FileExistsError(f"{path} is no encoder of weights, and is not written over: name another file")


def learn(
    z_NW: Tensor,
    texts_ND: Tensor,
    *,
    steps: int = 300,
    lr: float = 1e-3,
    tau: float = 0.1,
    hidden: int = 128,
    seed: int = 0,
    base: str = "",
    model: str = "",
) -> Encoder:
    """The encoder of a library of N adapters, by their sketches and the vectors of their descriptions.  AdamW, the
    whole library in each step; the global random state is as it was.  Raises ValueError for fewer than LEAST
    descriptions that are not alike."""
    same = texts_ND @ texts_ND.T > 1 - 1e-5
    kinds = round(float((1 / same.sum(1)).sum()))
    if kinds < LEAST:
        raise ValueError(
            f"an encoder of weights learns by contrast: it takes {LEAST} adapters of one base with descriptions that "
            f"are not alike, found {kinds} among {len(texts_ND)}"
        )
    wanted = same.to(texts_ND.dtype) / same.sum(1, keepdim=True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        made = Encoder(texts_ND.shape[1], hidden, base, model).to(z_NW.dtype)
        made.mean.copy_(z_NW.mean(0))
        made.scale.copy_(z_NW.std(0, correction=0).clamp_min(1e-3 / math.sqrt(WIDTH)))
        optimiser = torch.optim.AdamW(made.parameters(), lr, weight_decay=0.1)
        for _ in range(steps):
            scores = made(z_NW) @ texts_ND.T / tau
            loss = (F.cross_entropy(scores, wanted) + F.cross_entropy(scores.T, wanted)) / 2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return made.eval()
