"""Who is taken in at all: never more than memory and time can serve."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from .request import Busy, Late, Refused

SHORTEST, LONGEST = 1.0, 120.0  # seconds that somebody is told to come back after


@dataclass(frozen=True)
class Claim:
    """What a request has in the cache (of one that is still to be read, its whole prompt), what it may write, and after
    how many steps at most it begins to write; in tokens."""

    held: int
    left: int
    delay: int = 0


def peak(claims: Iterable[Claim], block: int = 1) -> int:
    """No fewer tokens than these requests can have in the cache at a time if each writes all that it may, one token a
    step: what has ended is free by then (S-LoRA's rule, Sheng et al. 2023, arXiv:2311.03285).

        max over i of  sum_{j <= i} held_j + min(i t_i, sum_{j <= i} left_j),    in the order of falling ends t

    with t = left + delay.  Without delays it is the most that they have.  A request takes whole blocks: up to block - 1
    tokens more each.
    """
    most = held = left = 0
    for i, claim in enumerate(sorted(claims, key=lambda c: -(c.left + c.delay)), 1):
        held += claim.held + block - 1
        left += claim.left
        most = max(most, held + min(i * (claim.left + claim.delay), left))
    return most


class Admission:
    """The cache of `capacity` tokens in blocks of `block`, and a queue of at most `waiting` requests.

    Times are estimated from what was measured: the tokens that finished requests had asked for, by second, over the
    last of them.  So answers that end early count as what they had asked for, as those who wait do.
    """

    def __init__(self, capacity: int, waiting: int = 256, block: int = 1):
        if capacity < 1 or waiting < 1 or block < 1:
            raise ValueError(f"capacity, waiting and block are 1 at least; found {capacity}, {waiting}, {block}")
        self.capacity, self.waiting, self.block = capacity, waiting, block
        self._ends: deque[tuple[float, int]] = deque(maxlen=64)  # (when, tokens) of the last requests that ended

    def fits(self, running: Iterable[Claim], new: Claim) -> bool:
        """Whether one more request can run to its end whatever it and the others write: nobody is ever put out."""
        return peak([*running, new], self.block) <= self.capacity

    def ended(self, tokens: int, now: float) -> None:
        """A request is done that had asked for so many tokens, its prompt among them."""
        self._ends.append((now, tokens))

    def rested(self) -> None:
        """Nothing runs or waits: the time until the next request does not count."""
        self._ends.clear()

    @property
    def rate(self) -> float | None:
        """Tokens a second; None before two requests have ended."""
        if len(self._ends) < 2 or self._ends[-1][0] <= self._ends[0][0]:
            return None
        return sum(tokens for _, tokens in list(self._ends)[1:]) / (self._ends[-1][0] - self._ends[0][0])

    def delay(self, tokens: int) -> float | None:
        """Seconds until so many tokens are done; None where that is not known."""
        return None if self.rate is None else tokens / self.rate

    def check(self, tokens: int, waiting: int, ahead: int, deadline: float | None = None) -> None:
        """Whether a new request is taken in, of so many tokens (its prompt and all that it may write), where `waiting`
        requests wait and they and the running ones have `ahead` tokens left.

        Raises Refused for what the cache could not hold if it were alone; Busy, with the seconds after which what waits
        now should be done, where the queue is full; Late where the first token is not to be expected within `deadline`
        seconds.
        """
        if peak([Claim(0, tokens)], self.block) > self.capacity:
            raise Refused(
                f"the request is for {tokens} tokens, its prompt and max_tokens together; the cache holds "
                f"{self.capacity}. Shorten the prompt, or ask for fewer"
            )
        delay = self.delay(ahead)
        again = min(max(SHORTEST if delay is None else delay, SHORTEST), LONGEST)
        if waiting >= self.waiting:
            raise Busy(f"{waiting} requests wait already: try again in {again:.0f} s", again)
        if deadline is not None and (deadline <= 0 or (delay is not None and waiting and delay > deadline)):
            raise Late(f"the first token is not to be expected within {deadline:g} s: {waiting} requests wait", again)
