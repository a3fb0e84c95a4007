"""The next token of every request of a batch, each chosen as its own request says."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from .request import Chosen, Refused, Sampling

WHOLE = ("max_tokens", "top_k", "seed", "logprobs")
REAL = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
MOST = 1e4  # of penalties and biases: far above any logit, and sums stay finite in every type
FEW = (256, 4096)  # of the likeliest tokens, that a nucleus is looked for in first


class Drawing:
    """What the choice of one request's tokens goes by: its settings, its tokens so far and its own random numbers."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]):
        self.sampling = sampling
        self.written: Counter[int] = Counter()
        self.prompt = frozenset(prompt) if sampling.repetition_penalty != 1 else frozenset()
        self.random = random.Random(sampling.seed)  # one number a token: nothing else of the batch touches it

    @property
    def adjusts(self) -> bool:
        s = self.sampling
        return bool(s.logit_bias or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1)


def whole(given: object) -> bool:
    """Whether it is a whole number, and no bool."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def real(given: object) -> bool:
    return isinstance(given, float) or whole(given)


def check(sampling: Sampling, vocabulary: int) -> None:
    """Raises Refused for settings that mean nothing, or are of another type, naming the one."""
    s = sampling
    for name in WHOLE:
        if not (whole(value := getattr(s, name)) or (value is None and name in ("seed", "logprobs"))):
            raise Refused(f"{name} is {value!r:.40}: it has to be a whole number")
    for name in REAL:
        if not real(value := getattr(s, name)):
            raise Refused(f"{name} is {value!r:.40}: it has to be a number")
    if not isinstance(s.stop, (tuple, list)) or not all(isinstance(text, str) for text in s.stop):
        raise Refused(f"stop is {s.stop!r:.80}: it has to be a tuple of texts, as ('END',)")
    numbers = {
        "temperature": (s.temperature, 0, math.inf),
        "top_p": (s.top_p, 0, 1),
        "top_k": (s.top_k, 0, math.inf),
        "max_tokens": (s.max_tokens, 1, math.inf),
        "repetition_penalty": (s.repetition_penalty, 1 / MOST, MOST),
        "presence_penalty": (s.presence_penalty, -MOST, MOST),
        "frequency_penalty": (s.frequency_penalty, -MOST, MOST),
        "logprobs": (s.logprobs or 0, 0, vocabulary),
    }
    for name, (value, low, high) in numbers.items():
        if not (low <= value <= high and value < math.inf):
            raise Refused(f"{name} is {value!r:.40}: it has to be a number from {low:g} to {high:g}")
    if not s.top_p:
        raise Refused("top_p is 0: it has to be above 0")
    for token, bias in s.logit_bias.items():
        if not whole(token) or not real(bias) or not 0 <= token < vocabulary or not (abs(bias) <= MOST or bias < 0):
            raise Refused(
                f"logit_bias[{token!r:.40}] is {bias!r:.40}: tokens go from 0 to {vocabulary - 1}, a bias is a number "
                f"up to {MOST:g}"
            )
    if sum(bias < -MOST for bias in s.logit_bias.values()) == vocabulary:
        raise Refused("logit_bias leaves no token that could be written")
    if any(not text for text in s.stop):
        raise Refused("stop holds an empty text: an answer would end before it begins")


def choose(logits: Tensor, drawings: Sequence[Drawing]) -> list[Chosen | None]:
    """One token for each row of logits (R, V), by its own settings; None where the logits are not finite.

    A token is drawn as the first whose cumulated probability, in the order of the vocabulary, exceeds a uniform number
    of the request's own (Python's Mersenne Twister, from its seed): what else is in the batch plays no part.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    finite = logits.amax(-1).isfinite()
    if not finite.all():
        logits = logits.masked_fill(~finite[:, None], 0.0)
    tokens = logits.argmax(-1)
    scores = adjusted(logits, drawings)
    if scores is not logits:
        tokens = scores.argmax(-1)
    drawn = [i for i, d in enumerate(drawings) if d.sampling.temperature]
    if drawn:
        numbers = [drawings[i].random.random() for i in drawn]
        tokens[drawn] = sampled(scores[drawn], [drawings[i].sampling for i in drawn], numbers)
    chosen = [Chosen(t) for t in tokens.tolist()]
    asked = [i for i, d in enumerate(drawings) if d.sampling.logprobs is not None]
    if asked:
        _tell(chosen, asked, logits[asked].log_softmax(-1), drawings)
    for d, c in zip(drawings, chosen, strict=True):
        d.written[c.token] += 1
    return [c if known else None for c, known in zip(chosen, finite.tolist(), strict=True)]


def adjusted(logits: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """Logits after each row's penalties and biases: the same tensor where no row has any."""
    which = [i for i, d in enumerate(drawings) if d.adjusts]
    if not which:
        return logits
    logits = logits.clone()
    for i in which:
        s, written, row = drawings[i].sampling, drawings[i].written, logits[i]
        if s.repetition_penalty != 1:
            seen = torch.tensor(sorted(drawings[i].prompt | written.keys()), device=row.device, dtype=torch.long)
            old = row[seen]
            row[seen] = torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
        if written and (s.presence_penalty or s.frequency_penalty):
            counts = torch.tensor(list(written.values()), device=row.device, dtype=row.dtype)
            row[list(written)] -= s.presence_penalty + s.frequency_penalty * counts
        if s.logit_bias:
            row[list(s.logit_bias)] += torch.tensor(list(s.logit_bias.values()), device=row.device, dtype=row.dtype)
    return logits


def sampled(scores: Tensor, samplings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """A token for each row of scores (R, V), drawn with the row's number from [0, 1); temperatures are above 0."""
    vocabulary = scores.shape[-1]
    heat = torch.tensor([s.temperature for s in samplings], device=scores.device, dtype=scores.dtype)[:, None]
    scores = (scores - scores.amax(-1, keepdim=True)) / heat.clamp(min=torch.finfo(scores.dtype).tiny)  # at most 0
    tokens = torch.empty(len(samplings), dtype=torch.long, device=scores.device)
    open_ = [i for i, s in enumerate(samplings) if s.top_p >= 1 and not 0 < s.top_k < vocabulary]
    if open_:
        tokens[open_] = draw(scores[open_].softmax(-1).double(), [uniform[i] for i in open_])
    rest = sorted({*range(len(samplings))} - {*open_})
    for among in (*(n for n in FEW if n < vocabulary), vocabulary):
        if not rest:
            break
        index, p, enough = likeliest(scores[rest], [samplings[i] for i in rest], among)
        found = index.gather(1, draw(p, [uniform[i] for i in rest])[:, None])[:, 0]
        done = [k for k, was in enumerate(enough) if was]
        tokens[[rest[k] for k in done]] = found[done]
        rest = [i for i, was in zip(rest, enough, strict=True) if not was]
    return tokens


def likeliest(scores: Tensor, samplings: Sequence[Sampling], among: int) -> tuple[Tensor, Tensor, list[bool]]:
    """(tokens (R, among) in their order, p (R, among) of each in float64, whether none is left out): softmax(scores) of
    the top_k likeliest, then of the fewest likeliest that have top_p of that together; of the others 0.  The likeliest
    of all always stays.

    Few are looked at first: to sort a whole vocabulary takes about 5 ms, the likeliest 256 of it 0.2.
    """

    def of(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, device=scores.device, dtype=torch.float64)[:, None]

    value, index = scores.topk(among)
    vocabulary = scores.shape[-1]
    limit = of([min(s.top_k or vocabulary, vocabulary) for s in samplings])
    limited, within = limit < vocabulary, torch.arange(among, device=scores.device) < limit
    p = value.double().exp() * within
    p /= torch.where(limited, p.sum(-1, keepdim=True), scores.exp().sum(-1, keepdim=True).double())
    before, top_p = p.cumsum(-1) - p, of([s.top_p for s in samplings])
    reached = p.sum(-1, keepdim=True) >= top_p
    enough = torch.where(limited, limit <= among, reached)[:, 0] | (among == vocabulary)
    p = p * (before < top_p)
    index, order = index.sort(-1)
    return index, p.gather(1, order), enough.tolist()


def draw(p: Tensor, uniform: Sequence[float]) -> Tensor:
    """For each row of p (R, V) the first token whose cumulated probability exceeds its number from [0, 1)."""
    total = p.cumsum(-1)
    at = torch.tensor(uniform, device=p.device, dtype=p.dtype)[:, None] * total[:, -1:]
    at = torch.minimum(at, torch.nextafter(total[:, -1:], torch.zeros_like(at)))  # never past the last
    return torch.searchsorted(total, at, right=True)[:, 0]


def _tell(chosen: list[Chosen], asked: list[int], logp: Tensor, drawings: Sequence[Drawing]) -> None:
    """Puts log p, of these rows, into what was chosen in them, and the likeliest of each."""
    most = max(cast(int, drawings[i].sampling.logprobs) for i in asked)
    values, tokens = (t.tolist() for t in logp.topk(most))
    for row, i in enumerate(asked):
        token, k = chosen[i].token, cast(int, drawings[i].sampling.logprobs)
        chosen[i] = Chosen(token, float(logp[row, token]), tuple(zip(tokens[row][:k], values[row][:k], strict=True)))
