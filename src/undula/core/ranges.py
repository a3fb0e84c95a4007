"""What numbers may be: the types of the fields of choices, declared where a field is (`r: Rank = 8`).

A field's type says its range; `given.Checked` reads it when a choice is made, whether in Python, from a file or from a
command line.  A method of another package declares its own likewise: `Annotated[float, Range(least=0, below=2)]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

FLOAT32 = 3.4028234663852886e38  # the largest: what is larger is infinite in a float32 tensor
INT64 = (1 << 63) - 1
NATURAL = (FLOAT32, INT64, (1 << 31) - 1, (1 << 32) - 1)  # ends of what can be counted to: named where they are passed


@dataclass(frozen=True)
class Range:
    """Numbers from `least` (or above `above`) to `most` (or below `below`), but those in `without`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    without: tuple[float, ...] = ()
    note: str = ""  # why, where that is not plain: of a field, `Annotated[NotZero, "else it never learns"]`

    def __contains__(self, number: float) -> bool:
        inside = self.least <= number <= self.most and self.above < number < self.below
        return inside and number not in self.without

    def told(self, number: float) -> str:
        """What a number is instead of `number`, in words."""
        ends = [f"greater than {self.above:g}"] if self.above > -math.inf else []
        if self.least > -FLOAT32 or number < self.least:
            ends += [f"at least {_end(self.least)}"] if self.least > -math.inf else []
        ends += [f"below {self.below:g}"] if self.below < math.inf else []
        if self.most < math.inf and (self.most not in NATURAL or number > self.most):
            ends += [f"at most {_end(self.most)}"]
        ends += [f"not {' or '.join(f'{each:g}' for each in self.without)}"] if self.without else []
        return " and ".join(ends) + (f" ({self.note})" if self.note else "")


def _end(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


@dataclass(frozen=True)
class Among(Range):
    """One of these numbers."""

    numbers: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        return number in self.numbers

    def told(self, number: float) -> str:
        return " or ".join(f"{each:g}" for each in self.numbers)


# Whole numbers
Rank = Annotated[int, Range(least=1, most=1 << 20)]  # of a matrix: no layer that is known is wider
Extra = Annotated[int, Range(least=0, most=1 << 20)]  # ranks or columns beside others
Count = Annotated[int, Range(least=1, most=(1 << 31) - 1)]
Natural = Annotated[int, Range(least=0, most=(1 << 31) - 1)]
Few = Annotated[int, Range(least=1, most=1_000_000)]  # listed one by one
Seed = Annotated[int, Range(least=0, most=INT64)]
Seed32 = Annotated[int, Range(least=0, most=(1 << 32) - 1)]  # of generators that know no more: numpy's
Bits = Annotated[int, Among(numbers=(4, 8))]

# Floats, all finite
Finite = Annotated[float, Range(least=-FLOAT32, most=FLOAT32)]
NotZero = Annotated[float, Range(least=-FLOAT32, most=FLOAT32, without=(0,))]
Positive = Annotated[float, Range(above=0, most=FLOAT32)]
NotNegative = Annotated[float, Range(least=0, most=FLOAT32)]
Share = Annotated[float, Range(least=0, most=1)]
SomeShare = Annotated[float, Range(above=0, most=1)]  # not none
PartShare = Annotated[float, Range(least=0, below=1)]  # not all
Inside = Annotated[float, Range(above=0, below=1)]
