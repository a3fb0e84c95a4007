"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def bytes_of(text: str, option: str) -> int:
    """The bytes that 2GB (two billion), 500 MiB (500 * 2^20), 1.5g, 2e9 or a plain number say.  Raises ValueError."""
    found = SIZE.fullmatch(text)
    unit = found[2].lower() if found else None
    if found is None or unit not in UNITS or (size := int(float(found[1]) * UNITS[unit])) < 1:
        raise ValueError(f"{option} is a number of bytes, as 500MB, 2GB or 1GiB; found {text!r:.40}")
    return size
