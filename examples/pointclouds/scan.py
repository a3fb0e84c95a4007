"""Linear recurrence over tokens, in chunks: h_t = a_t h_(t-1) + k_t' v_t, y_t = q_t h_t, at a cost linear in tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def naive(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_a_BTH: Tensor) -> Tensor:
    """y (B, T, H, V), token by token as the formula says."""
    B, T, H, K = q_BTHK.shape
    h = q_BTHK.new_zeros(B, H, K, v_BTHV.shape[-1])
    out = []
    for t in range(T):
        h = log_a_BTH[:, t, :, None, None].exp() * h + k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None]
        out.append((q_BTHK[:, t, :, None] @ h).squeeze(-2))
    return torch.stack(out, dim=1)


def chunked(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, chunk: int = 32) -> Tensor:
    """What `naive` gives.  Within a chunk one masked product of C x C, between chunks the state h: O(T (C + K) V) for T
    tokens.  Only differences of summed log decays are raised to e, all <= 0, so that nothing overflows."""
    T = q.shape[1]
    chunk = min(chunk, T)
    more = -T % chunk
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, more)).unflatten(1, (-1, chunk)).transpose(2, 3) for t in (q, k, v))
    total = F.pad(log_a, (0, 0, 0, more)).unflatten(1, (-1, chunk)).transpose(2, 3).cumsum(-1)  # (B, n, H, C)
    between = total[..., :, None] - total[..., None, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    inside = ((q @ k.mT) * between.masked_fill(later, -torch.inf).exp()) @ v
    added = (k * (total[..., -1:] - total).exp()[..., None]).mT @ v  # (B, n, H, K, V)
    kept = total[..., -1, None, None].exp()
    h, before = torch.zeros_like(added[:, 0]), []
    for n in range(added.shape[1]):
        before.append(h)
        h = kept[:, n] * h + added[:, n]
    y = inside + (q * total.exp()[..., None]) @ torch.stack(before, dim=1)
    return y.transpose(2, 3).flatten(1, 2)[:, :T]


class TokenMixer(nn.Module):
    """Tokens mixed by a linear recurrence; half of the heads read from the first to the last token, half backwards.

    `decay="input"`: a_t = sigmoid(W x_t + b) for each head, as in Mamba-2; "fixed": a = 1 - 2^-(1+h), RetNet's
    with 1 in the place of its 5.
    """

    def __init__(self, width: int, heads: int = 4, decay: str = "input", chunk: int = 32):
        super().__init__()
        if width % heads or heads % 2:
            raise ValueError(f"width {width} must divide into an even number of heads, not {heads}")
        self.heads, self.chunk = heads, chunk
        self.query, self.key, self.value, self.gate = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.decay = {"input": lambda: nn.Linear(width, heads), "fixed": lambda: None}[decay]()
        slow = 1 - 2.0 ** -(1 + torch.arange(heads // 2).repeat(2))
        if self.decay is None:
            self.register_buffer("log_a", slow.log())
        else:  # it begins at the fixed decays
            nn.init.zeros_(self.decay.weight)
            self.decay.bias.data.copy_(slow.logit())
        self.norm = nn.LayerNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_GTC: Tensor, there_GT: Tensor) -> Tensor:
        """`there` is False at padding, which is passed over: it adds nothing to the state and does not let it decay."""
        half = self.heads // 2
        q, k, v = (f(x_GTC).unflatten(-1, (self.heads, -1)) for f in (self.query, self.key, self.value))
        log_a = self.log_a.expand(*x_GTC.shape[:2], -1) if self.decay is None else F.logsigmoid(self.decay(x_GTC))
        log_a = log_a * there_GT[..., None]
        k = k * there_GT[..., None, None] / k.shape[-1] ** 0.5
        turned = (torch.cat([t[:, :, :half], t[:, :, half:].flip(1)], dim=2) for t in (q, k, v, log_a))
        y = chunked(*turned, self.chunk)
        y = self.norm(torch.cat([y[:, :, :half], y[:, :, half:].flip(1)], dim=2)).flatten(2)
        return self.out(y * F.silu(self.gate(x_GTC)))
