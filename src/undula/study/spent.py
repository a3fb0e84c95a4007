"""Time spent: by the clock, and of the processor.  The clock follows whatever else the machine does."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and seconds that this process had of all processors."""

    wall: float = 0.0
    cpu: float = 0.0

    @staticmethod
    def now() -> Spent:
        return Spent(time.perf_counter(), time.process_time())

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)
