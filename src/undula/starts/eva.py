"""EVA (Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter 2024, arXiv:2410.07170, NeurIPS 2025).

    A = the r directions in which the layer's inputs x vary most (orthonormal rows),   B = 0

They are the first eigenvectors of the covariance of x, with its mean taken out, as the authors' own code in PEFT does.
That code finds them by an incremental decomposition over minibatches, which drops all but the first directions after
each; here they come from the exact second moments, at I x I numbers of memory per layer.

The paper also gives layers with more variance to explain more rank: `explained` says how much each direction explains.
PEFT's `whiten` (off by default there) is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Site
from .start import Start, check_fits


def explained(site: Site, r: int) -> Tensor:
    """(r): the fraction of the variance of the layer's inputs in each of its first r directions, falling."""
    variances, _ = _principal(site)
    return variances[:r] / variances.sum()


def _principal(site: Site) -> tuple[Tensor, Tensor]:
    """(variances (I) falling, directions (I, I) as columns) of the layer's inputs, in float64."""
    xx_II, x_I, n = site.moments()
    mean_I = x_I / n
    values, vectors = torch.linalg.eigh(xx_II / n - torch.outer(mean_I, mean_I))
    return values.flip(0).clamp_min(0), vectors.flip(1)


@Start.register
@dataclass(frozen=True)
class EVA(Start):
    """The first r principal directions of the layer's inputs, B = 0; asks the probe for the inputs' moments."""

    at_base = True

    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        O, I = site.shape
        check_fits(self, site, r, needs=r, has=I)
        variances, directions = _principal(site)
        self._check_rank(site, r, variances)
        return site.zeros(O, r), directions[:, :r].T.to(site.dtype).contiguous()

    def _check_rank(self, site: Site, r: int, variances: Tensor) -> None:
        if variances.device.type == "meta":
            return
        # what rounding leaves: of the inputs in the site's type, and of the decomposition
        noise = variances[0] * (torch.finfo(site.dtype).eps ** 2 + len(variances) * torch.finfo(torch.float64).eps)
        varied = int((variances > noise).sum())
        if varied < r:
            raise ValueError(
                f"{self!r} at rank {r} needs inputs that vary in {r} directions; those of {site.name} vary in {varied} "
                "over the probe's batches. Give the probe more of them, or this layer a smaller rank"
            )
