"""The block formats of ggml: rows of fixed-size blocks, a few scales and then packed integers, as numpy reads them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def _half(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view("<f2").astype(np.float32)


def _nibbles(b: np.ndarray) -> np.ndarray:
    """Low halves of all bytes first, then the high halves."""
    return np.concatenate([b & 15, b >> 4], axis=-1)


def _f32(b: np.ndarray) -> np.ndarray:
    return b.view("<f4")


def _bf16(b: np.ndarray) -> np.ndarray:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(b: np.ndarray) -> np.ndarray:
    return (_nibbles(b[:, 2:]).astype(np.float32) - 8) * _half(b[:, :2])


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _nibbles(b[:, 4:]) * _half(b[:, :2]) + _half(b[:, 2:4])


def _fifth_bit(b: np.ndarray) -> np.ndarray:
    return np.unpackbits(b, axis=-1, bitorder="little") << 4


def _q5_0(b: np.ndarray) -> np.ndarray:
    return ((_nibbles(b[:, 6:]) | _fifth_bit(b[:, 2:6])).astype(np.float32) - 16) * _half(b[:, :2])


def _q5_1(b: np.ndarray) -> np.ndarray:
    return (_nibbles(b[:, 8:]) | _fifth_bit(b[:, 4:8])) * _half(b[:, :2]) + _half(b[:, 2:4])


def _q8_0(b: np.ndarray) -> np.ndarray:
    return b[:, 2:].view(np.int8) * _half(b[:, :2])


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and eight 6-bit minima out of 12 bytes, times the block's two halves: [blocks, 8, 1] each."""
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    least = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=1)
    return (scale * _half(b[:, :2]))[..., None], (least * _half(b[:, 2:4]))[..., None]


def _q4_k(b: np.ndarray) -> np.ndarray:
    scale, least = _k_scales(b)
    values = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return values * scale - least


def _q5_k(b: np.ndarray) -> np.ndarray:
    scale, least = _k_scales(b)
    bits = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    values = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | bits
    return values * scale - least


def _q6_k(b: np.ndarray) -> np.ndarray:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4
    scale = b[:, 192:208].view(np.int8) * _half(b[:, 208:])
    return ((low | high).reshape(-1, 16, 16).astype(np.float32) - 32) * scale[..., None]


class Encoding(NamedTuple):
    name: str
    block_values: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


ENCODINGS = {  # by ggml's number
    0: Encoding("F32", 1, 4, _f32),
    1: Encoding("F16", 1, 2, _half),
    2: Encoding("Q4_0", 32, 18, _q4_0),
    3: Encoding("Q4_1", 32, 20, _q4_1),
    6: Encoding("Q5_0", 32, 22, _q5_0),
    7: Encoding("Q5_1", 32, 24, _q5_1),
    8: Encoding("Q8_0", 32, 34, _q8_0),
    12: Encoding("Q4_K", 256, 144, _q4_k),
    13: Encoding("Q5_K", 256, 176, _q5_k),
    14: Encoding("Q6_K", 256, 210, _q6_k),
    30: Encoding("BF16", 1, 2, _bf16),
}
BY_NAME = {encoding.name: encoding for encoding in ENCODINGS.values()}
