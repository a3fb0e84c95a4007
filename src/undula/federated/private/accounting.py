"""What noise is worth: Opacus's accountants of the sampled Gaussian mechanism, asked with what was really done.

A history is ((noise multiplier, sample rate, steps), ...): in each step every row took part with that chance, by itself
(Poisson), and the sum got noise of the multiplier times the clip.  Its epsilon holds for one row more or less.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import secrets
import warnings
from collections.abc import Iterator
from hashlib import sha256

import torch

from ...core.extras import needs

History = tuple[tuple[float, float, int], ...]
PRV, RDP = ACCOUNTANTS = ("prv", "rdp")
COARSE = 30.0  # above it PRV's grid, whose size follows epsilon, takes gigabytes, and its gain over RDP means nothing


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Opacus sets up the root logger where it is imported, and warns of what is settled here."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers, root.level = handlers, level


@functools.lru_cache(maxsize=4096)
@needs("federated")
def epsilon(history: History, delta: float, accountant: str = PRV) -> float:
    """The epsilon at this delta: an upper bound; 0 where nothing was done, infinite without noise."""
    done = merged(history)
    if not done:
        return 0.0
    if any(noise == 0 for noise, _, _ in done):
        return math.inf
    with quiet():
        from opacus.accountants import create_accountant

        found = math.inf
        for kind in (RDP, accountant):
            if kind == PRV and found > COARSE:
                break
            asked = create_accountant(kind)
            asked.history = list(done)
            found = float(min(found, asked.get_epsilon(delta=delta)))
    return found


def merged(history: History) -> History:
    """Steps of the same noise and rate together: their order tells nothing."""
    found: dict[tuple[float, float], int] = {}
    for noise, rate, steps in history:
        if rate > 0 and steps > 0:
            found[noise, rate] = found.get((noise, rate), 0) + steps
    return tuple((noise, rate, steps) for (noise, rate), steps in sorted(found.items()))


@functools.lru_cache(maxsize=4096)
@needs("federated")
def noise_for(target: float, delta: float, rate: float, steps: int, accountant: str = PRV) -> float:
    """The least noise multiplier with which so many steps keep to a target epsilon, to within 0.01 of it."""
    with quiet():
        from opacus.accountants.utils import get_noise_multiplier

        try:
            return float(
                get_noise_multiplier(
                    target_epsilon=target,
                    target_delta=delta,
                    sample_rate=rate,
                    steps=steps,
                    accountant=RDP if target > COARSE else accountant,
                    epsilon_tolerance=min(0.01, target / 20),
                )
            )
        except ValueError as error:
            raise ValueError(
                f"no noise keeps {steps} steps at the rate {rate:.3g} to epsilon={target}, delta={delta}: {error}"
            ) from error


def generator(seed: int | None, *what: object, device: torch.device | None = None) -> torch.Generator:
    """What noise and choices are drawn from: the system's own randomness, or a seed and what it is for (for
    experiments: who knows the seed can take the noise away again)."""
    made = torch.Generator(device or "cpu")
    if seed is not None:
        text = "/".join(map(str, (seed, *what)))
        return made.manual_seed(int.from_bytes(sha256(text.encode()).digest()[:8]) >> 1)
    made.manual_seed(secrets.randbits(63))
    if made.device.type == "cpu":  # whose seeds are cut to 32 bits, few enough to try them all
        _scramble(made)
    return made


WORDS, FIRST, LAST = 632, 3, 627  # of 64 bits in the state of a Mersenne twister, and those that are its own


def _scramble(made: torch.Generator) -> None:
    """Draws the 624 words of the state from the system."""
    state = made.get_state()
    words = state.view(torch.int64)
    if len(words) != WORDS:
        raise RuntimeError(
            f"torch's generator has a state of {len(words)} words where {WORDS} were known: this version of torch "
            "would draw noise from 32 bits. Take another version"
        )
    drawn = torch.frombuffer(bytearray(os.urandom(4 * (LAST - FIRST))), dtype=torch.int32)
    words[FIRST:LAST] = drawn.long() & 0xFFFFFFFF
    made.set_state(state)
