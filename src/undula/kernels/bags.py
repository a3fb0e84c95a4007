"""Rows of a batch that each go through a few rows of large tables: what decoding with many adapters takes.

    z_e = <x_n, A_c>  for every edge e: row n of the batch, row c of the table A
    y_n = sum over the edges e of n of z_e B_c'

Each is one pass of a kernel that torch has for bags of embeddings: nothing is gathered, padded or copied, every row of
the batch reads the ranks of its own adapter alone, and adapters of any ranks mix.  (The products of Punica, Chen et al.
2023, arXiv:2310.18547, and S-LoRA, Sheng et al. 2023, arXiv:2311.03285, for single tokens.)  Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUM = 0  # embedding_bag's mode
_dots = torch.ops.aten._embedding_bag_per_sample_weights_backward.default  # a bag's gradient to its members' weights


def down(x_NI: Tensor, A_CI: Tensor, cells_E: Tensor, rows_E: Tensor) -> Tensor:
    """z (E): the product of row rows_E[e] of x with row cells_E[e] of A."""
    return _dots(x_NI, A_CI, cells_E, cells_E, rows_E, SUM)


def up(z_E: Tensor, B_CO: Tensor, cells_E: Tensor, starts_N: Tensor) -> Tensor:
    """y (N, O): of the edges from starts_N[n] up to starts_N[n + 1], the sum of z_E[e] times row cells_E[e] of B."""
    return torch.embedding_bag(B_CO, cells_E, starts_N, False, SUM, False, z_E)[0]
