"""S2FT: structured sparse fine-tuning (Yang, Leng, Guo, Zhao, Nakada, Zhang, Yao, Chen 2024, arXiv:2412.06289, NeurIPS
2024).

    rows (q, k, v, up, gate):  W' = W + P' S,   S (k x I)        columns (o, down):  W' = W + S P,   S (O x k)

P (one-hot) selects k channels: the same ones in all layers of an attention or of an MLP, so that the update is a dense
block of whole heads or of the MLP's inner channels.  The paper permutes the coupled matrices until the selection is
contiguous; selecting by index is the same function and moves no weight (`order` is that permutation).  Of x a layer of
the column kind keeps the k selected columns for the backward pass.

Open in the sources and settled here: the share is that of every layer (the authors' code draws from the channels of
all layers at once); the formulas of the scores, and that the largest are kept; the first layer of a block decides for
the others.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Factors, Layer, LowRank, Site
from ..core.ranges import Count, SomeShare
from ..kernels import sparse
from ..starts.channels import ByName, Random, Selection, Side

MANY = 100_000_000  # trained numbers: with AdamW's moments 1.6 GB


@dataclass(frozen=True)
class S2FT(LowRank):
    """W' = W + S on `share` of its rows or columns, in units of `unit` neighbouring channels.

    Heads: `unit` is the head's width.  With grouped queries whole groups go together: `unit` is the head's width for k
    and v, and that times the queries per group for q and o; then all four have as many units and select the same ones.
    """

    formula = "W' = W + P' S (rows) or W + S P (columns), P selects"
    parameters = (
        "unit*max(1, round(share*O/unit))*I if side.rows('') else unit*max(1, round(share*I/unit))*O"  # a lone layer
    )
    source = "Yang et al. 2024, arXiv:2412.06289"

    share: SomeShare = 0.03
    unit: Count = 1  # channels
    side: Side = ByName()
    selection: Selection = Random()

    def init(self, site: Site) -> dict[str, Tensor]:
        O, I = site.shape
        self.tell(site)
        order = self.order(site)
        k = self.channels(len(order))
        block = {"rows": site.zeros(k, I)} if self.side.rows(site.name) else {"columns": site.zeros(O, k)}
        return {**{name: S.requires_grad_() for name, S in block.items()}, "order": order}

    def tell(self, site: Site) -> None:
        """Warns, once an attach, of very many trained numbers: a share grows as O I, a LoRA as O + I."""
        if site.device.type == "meta" or (self, "told") in site.shared:
            return
        site.once((self, "told"), lambda: site.zeros(0))
        sides = ((self.side.rows(name), *shape) for name, shape in site.peers.items())
        total = sum(self.channels(O if rows else I) * (I if rows else O) for rows, O, I in sides)
        if total >= MANY:
            r = 8
            lora = r * sum(sum(shape) for shape in site.peers.values())
            warnings.warn(
                f"{self!r} trains {total:,} numbers over {len(site.peers)} layers, {total / lora:.0f} times as many as "
                f"LoRA(r={r}): as many would be share={self.share * lora / total:.2g}",
                stacklevel=2,
            )

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        """The same selection: it may come from data."""
        return {k: t if k == "order" else site.zeros(*t.shape).requires_grad_() for k, t in f.items()}

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        return {"order": self.order(site)} if self.selection.seeded else {}

    def check(self, site: Site, f: Factors) -> None:
        order = f["order"]
        if not torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device)):
            raise ValueError(f"{site.name}.order is no order of its {len(order)} channels")

    def channels(self, N: int) -> int:
        """How many of N are selected."""
        return self.unit * max(1, round(self.share * N / self.unit))

    def order(self, site: Site) -> Tensor:
        """A permutation of the rows or columns: the selected ones, rising, then the others, rising."""
        rows = self.side.rows(site.name)
        N = site.shape[0 if rows else 1]
        if N % self.unit:
            raise ValueError(f"{site.name} has {N} {'rows' if rows else 'columns'}: no whole units of {self.unit}")
        if site.device.type == "meta":
            return torch.empty(N, dtype=torch.int64, device="meta")
        units = self.selection(site, rows, self.unit)[: self.channels(N) // self.unit]
        others = torch.ones(N // self.unit, dtype=torch.uint8, device=units.device).index_fill(0, units, 0)
        return torch.sort(others.repeat_interleave(self.unit), stable=True).indices

    def block(self, f: Factors) -> tuple[bool, Tensor, Tensor]:
        """(whether of rows, the block S, where its rows or columns are)."""
        rows = "rows" in f
        S = f["rows"] if rows else f["columns"]
        return rows, S, f["order"][: S.shape[0 if rows else 1]]

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        rows, S, index_K = self.block(f)
        P_KN = (index_K[:, None] == torch.arange(len(f["order"]), device=index_K.device)).to(S.dtype)
        return (P_KN.T, S) if rows else (S, P_KN)

    def delta(self, f: Factors) -> Tensor:
        rows, S, _ = self.block(f)
        N = len(f["order"])
        return self.weight(S.new_zeros((N, S.shape[1]) if rows else (S.shape[0], N)), f)

    def weight(self, W_OI: Tensor, f: Factors) -> Tensor:
        rows, S, index_K = self.block(f)
        W = W_OI.to(torch.promote_types(W_OI.dtype, S.dtype))  # no zeros are added: the rest stays to the bit
        return W.index_add(0 if rows else 1, index_K, S.to(W.dtype))

    def entries(self, f: Factors) -> tuple[Tensor, Tensor]:
        """(flat indices, what is added to W there): see `Switch`."""
        rows, S, index_K = self.block(f)
        other = torch.arange(S.shape[1 if rows else 0], device=index_K.device)
        at = index_K[:, None] * len(other) + other if rows else other[:, None] * len(f["order"]) + index_K
        return at.flatten(), S.flatten()

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        if layer.channel != -1 or not x.is_floating_point():  # convolutions, embeddings
            return super().forward(x, layer, f)
        rows, S, index_K = self.block(f)
        return (sparse.rows if rows else sparse.columns)(x, layer, S, index_K)
