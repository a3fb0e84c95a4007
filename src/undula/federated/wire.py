"""A vector of float32 as the fewest bytes of three forms, and back, strictly.

    form 0, dense     4 n                  every number
    form 1, bitmap    ceil(n / 8) + 4 k    which are not 0, and these
    form 2, indices   4 k + 4 k            where they are, rising, and these

The first byte is the form; n is known to both sides, and is not sent.  A bitmap is shorter than indices where more than
one number in 32 is sent.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DENSE, BITMAP, INDICES = range(3)
FLOAT, INDEX = np.dtype("<f4"), np.dtype("<u4")


def packed(P: Tensor) -> bytes:
    """P (n) as bytes, rounded to float32.  Raises ValueError for numbers that are not finite there."""
    values = P.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} numbers are not finite")
    (where,) = values.nonzero()
    n, k = values.size, where.size
    lengths = {DENSE: 4 * n, BITMAP: -(-n // 8) + 4 * k, INDICES: 8 * k}
    form = min(lengths, key=lambda each: lengths[each])
    if form == DENSE:
        return bytes([form]) + values.astype(FLOAT).tobytes()
    told = np.packbits(values != 0) if form == BITMAP else where.astype(INDEX)
    return bytes([form]) + told.tobytes() + values[where].astype(FLOAT).tobytes()


def unpacked(data: bytes, n: int) -> Tensor:
    """The vector (n) in these bytes, float32.  Raises ValueError for bytes that are none, before anything is made."""
    if not data:
        raise ValueError("an empty message")
    form, body = data[0], memoryview(data)[1:]
    made = np.zeros(n, np.float32)
    if form == DENSE:
        where, values = np.arange(n), body
    elif form == BITMAP:
        size = -(-n // 8)
        if len(body) < size:
            raise ValueError(f"a bitmap of {n} numbers has {size} bytes, found {len(body)}")
        bits = np.unpackbits(np.frombuffer(body[:size], np.uint8))
        if bits[n:].any():
            raise ValueError(f"the bitmap names numbers beyond the {n} that there are")
        (where,), values = bits[:n].nonzero(), body[size:]
    elif form == INDICES:
        if len(body) % 8:
            raise ValueError(f"{len(body)} bytes are no indices and numbers of 4 bytes each")
        half = len(body) // 2
        where, values = np.frombuffer(body[:half], INDEX).astype(np.int64), body[half:]
        if where.size and (where[-1] >= n or (np.diff(where) <= 0).any()):
            raise ValueError(f"the indices do not rise within {n}")
    else:
        raise ValueError(f"form {form} of a message is not known")
    if len(values) != 4 * where.size:
        raise ValueError(f"{where.size} numbers take {4 * where.size} bytes, found {len(values)}")
    made[where] = np.frombuffer(values, FLOAT)
    if not np.isfinite(made).all():
        raise ValueError(f"{int((~np.isfinite(made)).sum())} numbers of the message are not finite")
    return torch.from_numpy(made)
