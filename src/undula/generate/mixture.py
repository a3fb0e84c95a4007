"""Experts chosen by description, and what their mixture is: the training-free half of SG-LoRA.

alpha = softmax(cos(d*, d_k) / tau) over the K experts whose descriptions are nearest
mu*   = sum_k alpha_k mu_k                                                        (D,)
s*^2  = sum_k alpha_k s_k^2 + sum_k alpha_k (mu_k - mu*)^2                        (D,): the law of total variance
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .library import Library

K, TAU = 4, 0.05  # SG-LoRA's own tau was not found; this one is settled here


@dataclass(frozen=True, eq=False)
class Mixture:
    """names, weights (K,): whose it is, the nearest first; mean, variance (D,)."""

    names: tuple[str, ...]
    weights: Tensor
    mean: Tensor
    variance: Tensor


def chosen(query: Tensor, embeddings: Tensor, k: int = K, tau: float = TAU) -> tuple[Tensor, Tensor]:
    """(numbers (k,), weights (k,) that sum to 1) of the embeddings (N, E) nearest to `query` (E,) by cosine.  All of
    them where there are fewer than k.  Raises ValueError."""
    if k < 1 or not tau > 0:
        raise ValueError(f"k is how many experts, 1 or more, and tau is above 0; found k={k}, tau={tau:g}")
    near = torch.nn.functional.cosine_similarity(query[None].double(), embeddings.double(), dim=1)
    values, numbers = near.topk(min(k, len(near)))
    return numbers, (values / tau).softmax(0)


def total(weights: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), variance (D,)) of a mixture with these weights (K,), of parts with these means and variances (K, D).
    Computed in float64."""
    a, mu = weights.double()[:, None], means.double()
    mean = (a * mu).sum(0)
    variance = (a * variances.double()).sum(0) + (a * (mu - mean).square()).sum(0)
    return mean.to(means.dtype), variance.to(means.dtype)


def mixture(library: Library, description: str | Tensor, k: int = K, tau: float = TAU) -> Mixture:
    """Of the experts nearest to a description, a text or its embedding (E,).  k=1 is the nearest expert itself."""
    query = library.embed([description])[0] if isinstance(description, str) else description
    numbers, weights = chosen(query, library.embeddings, k, tau)
    names = tuple(library.experts[i].name for i in numbers.tolist())
    return Mixture(names, weights, *total(weights, library.means[numbers], library.variances[numbers]))
