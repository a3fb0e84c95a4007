"""Which adapters have private copies of weights."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection

from torch import nn

from ..host.copies import copy_size, drop_copy, keep_copy
from ..host.host import adapters
from ..host.shelf import Held

log = logging.getLogger(__name__)


class Copies:
    """Copies for adapters that share no product with others (LoRAN, SHiRA ...), those used last, in a budget of bytes
    (see `host.copies`).  Making one costs what one step without it does.  `before` is called before any comes or goes.
    """

    def __init__(self, model: nn.Module, budget: int, before: Callable[[], None]):
        self.model, self.budget, self.before = model, budget, before
        self.used: dict[str, int] = {}  # {attached adapter: when it was used last}
        self.sizes: dict[str, int] = {}
        self._now = itertools.count()

    def use(self, name: str, running: Collection[str | None]) -> None:
        """Sees to it that the attached adapter `name` has a copy, if there is room beside those of the `running`."""
        if not self.budget:
            return
        there = adapters(self.model)
        for known in (self.used, self.sizes):
            for gone in [n for n in known if n not in there]:
                del known[gone]
        self.used[name] = next(self._now)
        if name not in self.sizes:
            self.sizes[name] = copy_size(self.model, name)
            if self.sizes[name] > self.budget:
                log.warning(
                    "a copy of its weights takes %s bytes, and copies may take %s: it computes without, slower",
                    f"{self.sizes[name]:,}",
                    f"{self.budget:,}",
                )
        size = self.sizes[name]
        kept = {n: self.sizes[n] for n, a in there.items() if isinstance(a, Held) and a.copies}
        if not size or name in kept:
            return
        for old in sorted((n for n in kept if n not in running), key=lambda n: self.used[n]):
            if sum(kept.values()) + size <= self.budget:
                break
            self.before()
            drop_copy(self.model, old)
            del kept[old]
        if sum(kept.values()) + size <= self.budget:
            self.before()
            keep_copy(self.model, name)
