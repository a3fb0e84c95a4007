"""ALLoRA (Huang, Balestriero 2024, arXiv:2410.09692): a rate of its own for each row, which falls as the row grows.

    c_i = 1 / sqrt(|w_i| + 1 / eta^2),   w_i row i;   at w_i = 0: c_i = eta

So rows leave zero quickly and none runs away, without dropout and without alpha (take alpha = r, and no Dropout).

Interpretation: of the paper the abstract was at hand.  What a row is, is chosen: `of_factors`, the rows of A and of B
each by themselves, as published optimisers have it (these keep the norm of the start, and so eta for B for ever; here
it is that of now), or `of_products`, the rows of s B A, which scale B's rows alone.  `ALLoRA` scales what the base's
step has moved; `ALLoRAGradient` scales the gradients, which adaptive bases such as Adam divide out again, but for what
changes in time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .paired import Paired, Params, gradients
from .pairs import Pair, Stacked, alike

Rows = Callable[[Stacked], tuple[Tensor, Tensor]]  # norms of (A's rows (N, R, 1), B's rows (N, O, 1))


def of_factors(pair: Stacked) -> tuple[Tensor, Tensor]:
    """|rows of A|, |rows of B|."""
    return pair.right.norm(dim=2, keepdim=True), pair.left.norm(dim=2, keepdim=True)


def of_products(pair: Stacked) -> tuple[Tensor, Tensor]:
    """NaN for A, whose rows are none of the product's, and |rows of s B A|, by A A' alone."""
    gram = pair.right @ pair.right.mT
    squared = ((pair.left @ gram) * pair.left).sum(2, keepdim=True).clamp_min(0)
    return torch.full_like(pair.right[:, :, :1], torch.nan), pair.scale.abs() * squared.sqrt()


class ALLoRA(Paired):
    """See the module.  eta: the factor of a row that is zero; rows: whose norms count."""

    def __init__(self, params: Params, adapted: nn.Module, *, eta: float, rows: Rows = of_factors, **options: Any):
        if not eta > 0:
            raise ValueError(f"{type(self).__mro__[1].__name__}.eta is above 0, found {eta}")
        self.eta, self.rows = eta, rows
        self.before: list[tuple[list[Pair], Tensor, Tensor]] = []
        super().__init__(params, adapted, **options)

    def factors(self, those: list[Pair]) -> tuple[Tensor, Tensor]:
        """c for the rows of A (N, R, 1) and of B (N, O, 1)."""
        A, B = ((norm + self.eta**-2).rsqrt() for norm in self.rows(Stacked.of(those)))
        return A.nan_to_num(nan=1.0), B

    def adjust(self) -> None:
        self.before = [(those, *self.factors(those)) for those in alike(self.following())]
        self.kept = [[t.detach().clone() for p in those for t in (p.A, p.B)] for those, _, _ in self.before]

    def moved(self) -> None:
        for (those, c_A, c_B), kept in zip(self.before, self.kept, strict=True):
            for i, pair in enumerate(those):
                for was, t, c in ((kept[2 * i], pair.A, c_A[i]), (kept[2 * i + 1], pair.B, c_B[i])):
                    t.copy_(torch.lerp(was, t, c.to(t.dtype).expand_as(t)))
        self.before, self.kept = [], []


class ALLoRAGradient(ALLoRA):
    """ALLoRA on the gradients that the base is given."""

    def adjust(self) -> None:
        for those in alike(self.following()):
            (g_A, g_B), (c_A, c_B) = gradients(those), self.factors(those)
            self.follow([p.A for p in those], c_A * g_A)
            self.follow([p.B for p in those], c_B * g_B)

    def moved(self) -> None:
        pass
