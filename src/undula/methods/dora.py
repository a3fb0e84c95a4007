"""DoRA (Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen 2024, arXiv:2402.09353), around any Additive method.

    W' = diag(m / ||V||) V,   V = W + dW,   ||V|| the norms of V's rows,   m = ||W|| at the start

As in the paper (section 4.3) ||V|| counts as a constant in the backward pass.  For a LowRank inner method the norms
come from the factors: ||V||^2 = ||W||^2 + 2 <W A', B> + <B A A', B> row by row, and no (O x I) matrix is formed, but
for rows whose three terms cancel (||V|| below 3 % of what they sum to): W x + dW x cancels there too, and m / ||V||
would blow up its rounding, so that these rows of y come from the rows of W' themselves.

A CPU looks which rows those are.  On an accelerator a look would make the step wait for the device, layer by layer:
there the rows that cancel most are formed, whether they cancel or not: 2 R, and `SURE` at least (of a weight whose rows
are independent an update of rank R takes away R at most).

A row that dW takes away, W = -dW, has no direction.  Its row of W' is 0 (m / ||V|| counts as 0) as long as ||V|| is no
more than what rounding leaves of W, live and merged alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import (
    Additive,
    Factors,
    Layer,
    LowRank,
    Method,
    Product,
    Reweight,
    Settled,
    Site,
)
from ..core.wrapper import Around
from ..kernels import reference
from ..kernels.autocast import exact, hand_written, wide
from .lora import LoRA

CANCELLED = 1e-3  # of ||W||^2 + ||dW||^2: below it ||V||^2 has lost three of float32's seven digits
SURE = 16  # rows that are formed where nobody looks which have to be
LOST = 16  # times the rounding unit, of ||W||: V is rounding and has no direction


@dataclass(frozen=True)
class DoRA(Around, Reweight):
    """Magnitudes m (O) trained apart from the directions that `inner` (a method on the Additive rung) gives."""

    formula = "W' = diag(m / ||W + dW||) (W + dW)"
    parameters = "inner + O"
    source = "Liu et al. 2024, arXiv:2402.09353"

    inner: Method = LoRA()

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Additive):
            raise TypeError(f"DoRA wraps a method with an update dW; {self.inner!r} is on the rung {self.inner.rung()}")

    @property
    def _inner(self) -> Additive:
        assert isinstance(self.inner, Additive)
        return self.inner

    def init(self, site: Site) -> dict[str, Tensor]:
        W_OI = site.W  # of an outline no norms are taken: arithmetic there would import torch's compiler, for seconds
        m_O = W_OI.new_empty(site.shape[0]) if W_OI.is_meta else W_OI.norm(dim=1)
        return {**self.inner.init(site), "m": m_O.requires_grad_()}

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        inner = {k: t for k, t in f.items() if k != "m"}
        return {**self.inner.again(site, inner), "m": site.W.norm(dim=1).requires_grad_()}

    def products(self, f: Factors) -> list[Product] | None:
        """Those of the direction V: the gradient that they see is diag(m / ||V||) times the weight's."""
        return self.inner.products(f)

    @property
    def linear_in(self) -> None:
        """None: the norms of V divide it."""

    def inside(self) -> Method:
        return self.inner.inside()

    def around(self, other: Method) -> Method:
        return DoRA(self.inner.around(other))

    def settled(self, layer: Layer, f: Factors) -> Settled | None:
        if not isinstance(self.inner, LowRank):
            return None
        inverse, left_O = self.inverse_norms(layer.weight, f)
        cancels = left_O is not None and bool((left_O < CANCELLED).any())
        return None if cancels else Settled(*self.inner.pair(f), gain=f["m"] * inverse)

    def weight(self, W_OI: Tensor, f: Factors) -> Tensor:
        V_OI = self._inner.weight(W_OI, f)
        inverse = inverted(V_OI.detach().norm(dim=1), W_OI.detach().to(V_OI.dtype).norm(dim=1))
        return (f["m"] * inverse)[:, None] * V_OI

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        inverse, left_O = self.inverse_norms(layer.weight, f)
        gain = f["m"] * inverse
        y = self.inner.forward(x, layer, f)
        if layer.bias is None:
            y = (y * reference.channels(gain, layer)).to(y.dtype)
        else:  # the bias is not scaled: gain (y - b) + b
            shift = (1 - gain) * layer.bias
            shifted = torch.addcmul(reference.channels(shift, layer), y, reference.channels(gain, layer))
            y = shifted.to(y.dtype)
        cancelled = None if left_O is None else self._cancelled(left_O, f)
        return y if cancelled is None else self._formed(x, y, layer, f, inverse, cancelled)

    def _formed(self, x: Tensor, y: Tensor, layer: Layer, f: Factors, inverse: Tensor, rows_K: Tensor) -> Tensor:
        """y with its channels `rows_K` as layer(x) + (W' - W) x: nothing there is scaled up."""
        if layer.training and self.inner.drops:  # what is dropped is part of the law, and cancels nothing
            return y
        W_OI = layer.weight
        V_KI = self._rows(W_OI[rows_K], f, rows_K)
        change_KI = (f["m"] * inverse)[rows_K, None] * V_KI - W_OI[rows_K]
        change_OI = change_KI.new_zeros(W_OI.shape).index_copy(0, rows_K, change_KI)
        right = reference.additive(x, layer, change_OI).index_select(layer.channel, rows_K)
        return y.index_copy(layer.channel, rows_K, right)

    def _cancelled(self, left_O: Tensor, f: Factors) -> Tensor | None:
        """The rows that have to be formed, None where there are none."""
        if looks(left_O.device):
            lost_O = left_O < CANCELLED
            return lost_O.nonzero()[:, 0] if lost_O.any() else None
        rank = self.inner.pair(f)[1].shape[0] if isinstance(self.inner, LowRank) else 0
        return left_O.topk(min(len(left_O), max(SURE, 2 * rank)), largest=False, sorted=False).indices

    def _rows(self, W_KI: Tensor, f: Factors, rows_K: Tensor) -> Tensor:
        """Those rows of V."""
        if isinstance(self.inner, LowRank):
            B_OR, A_RI = (t.to(wide(t.dtype)) for t in self.inner.pair(f))
            return torch.addmm(W_KI.to(A_RI.dtype), B_OR[rows_K], A_RI)
        return W_KI + self._inner.delta(f)[rows_K]

    @torch.no_grad()
    def inverse_norms(self, W_OI: Tensor, f: Factors) -> tuple[Tensor, Tensor | None]:
        """(1 / ||W + dW|| by rows (O), what is left of each row's terms or None in a trace), detached."""
        with exact(W_OI.device):
            if not hand_written():  # no branch on numbers in a trace
                V_OI = self._inner.weight(W_OI, f)
                return inverted(V_OI.norm(dim=1), W_OI.to(V_OI.dtype).norm(dim=1)), None
            norms, own, left_O = self._norms(W_OI, f)
            return inverted(norms, own), left_O

    def _norms(self, W_OI: Tensor, f: Factors) -> tuple[Tensor, Tensor, Tensor]:
        """||W + dW|| and ||W|| by rows, and what is left of ||W||^2 + ||dW||^2, as a share (O)."""
        if not isinstance(self.inner, LowRank):
            V_OI = self._inner.weight(W_OI, f)
            norms, own = V_OI.norm(dim=1), W_OI.to(V_OI.dtype).norm(dim=1)
            return norms, own, left(norms.square(), own.square())
        B_OR, A_RI = (t.to(wide(t.dtype)) for t in self.inner.pair(f))
        W_OI = W_OI.to(A_RI.dtype)
        own, update = torch.linalg.vecdot(W_OI, W_OI), B_OR @ (A_RI @ A_RI.T)
        squared = own + ((2 * (W_OI @ A_RI.T) + update) * B_OR).sum(1)
        left_O = left(squared, own + (update * B_OR).sum(1))
        rows_K = self._cancelled(left_O, f)
        if rows_K is not None:  # the sums cancel: these rows are formed
            V_KI = torch.addmm(W_OI[rows_K], B_OR[rows_K], A_RI)
            squared[rows_K] = torch.linalg.vecdot(V_KI, V_KI)
        return squared.sqrt(), own.sqrt(), left_O


def looks(device: torch.device) -> bool:
    """Whether a branch on numbers costs nothing there."""
    return device.type == "cpu"


def left(squared_O: Tensor, whole_O: Tensor) -> Tensor:
    """What share of `whole` is left, all where there is nothing."""
    return torch.where(whole_O > 0, squared_O / whole_O, 1)


def inverted(norm_O: Tensor, base_O: Tensor) -> Tensor:
    """1 / ||V||, or 0 where V is no more than what rounding leaves of W."""
    lost = norm_O <= (LOST * torch.finfo(norm_O.dtype).eps * base_O).clamp_min(torch.finfo(norm_O.dtype).tiny)
    return torch.where(lost, 0, 1 / norm_O.clamp_min(torch.finfo(norm_O.dtype).tiny))
