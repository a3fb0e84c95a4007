"""Products with weights of 4 bits in groups, of which a part is kept (GQSA: see `undula.compress.gqsa`).

    w^_okg = (q_okg - z_ok) s_ok       row o, kept group k = columns index_ok G .. (index_ok + 1) G, place g in it

q (O, K, G/2 bytes): byte j of a group has the place j in its low four bits and the place G/2 + j in the high ones, so
that eight bytes widen into two runs of eight neighbours.

    y_o = sum_k s_ok (sum_g q_okg x_g - z_ok sum_g x_g)

which is read as it is stored, 4 bits a weight: for few tokens a product waits for memory.  In C where this machine has
a compiler (see `in_c`); else, and for many tokens, the weight is made dense and multiplied by torch.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import in_c
from .autocast import hand_written
from .elementwise import under_mode

FEW = 4  # tokens: more are multiplied with the dense weight
SOURCE = r"""
#include <stdint.h>
#include <string.h>
#define INLINE static inline __attribute__((always_inline))
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

/* a row of K groups of 2 h columns, h a multiple of 8 */
#define ROW(KIND, NAME) \
INLINE float NAME(const uint8_t *codes, const KIND *index, const float *scale, const float *zero, const float *x, \
                  const float *sums, long K, long h) { \
    __m256i mask = _mm256_set1_epi32(15); \
    __m256 whole = _mm256_setzero_ps(); \
    float lanes[8], more = 0.0f, less = 0.0f; \
    for (long k = 0; k < K; k++) { \
        const float *g = x + 2 * h * index[k]; \
        __m256 part = _mm256_setzero_ps(); \
        for (long j = 0; j < h; j += 8) { \
            __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + k * h + j))); \
            __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(v, mask)); \
            __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 4)); \
            part = _mm256_fmadd_ps(low, _mm256_loadu_ps(g + j), part); \
            part = _mm256_fmadd_ps(high, _mm256_loadu_ps(g + h + j), part); \
        } \
        whole = _mm256_fmadd_ps(part, _mm256_set1_ps(scale[k]), whole); \
        less += scale[k] * zero[k] * sums[index[k]]; \
    } \
    _mm256_storeu_ps(lanes, whole); \
    for (int i = 0; i < 8; i++) more += lanes[i]; \
    return more - less; \
}
ROW(uint8_t, eights)
ROW(int16_t, eights_wide)
#define EIGHTS 1
#else
#define eights(...) 0.0f
#define eights_wide(...) 0.0f
#define EIGHTS 0
#endif

INLINE long group(const void *index, long wide, long k) {
    return wide ? ((const int16_t *)index)[k] : ((const uint8_t *)index)[k];
}

/* sums[c] of each of C groups of G numbers */
void gqsa_sums(const float *x, float *sums, long C, long G) {
    for (long c = 0; c < C; c++) {
        float s = 0.0f;
        for (long j = 0; j < G; j++) s += x[c * G + j];
        sums[c] = s;
    }
}

/* y (T, O) in rows from .. to, of x (T, I) and its sums (T, I / G) */
void gqsa_product(const uint8_t *codes, const void *index, long wide, const float *scale, const float *zero,
                  const float *x, const float *sums, float *y, long from, long to, long K, long G, long I, long O,
                  long T) {
    long h = G / 2;
    for (long o = from; o < to; o++) {
        const uint8_t *q = codes + o * K * h, *small = (const uint8_t *)index + o * K;
        const int16_t *large = (const int16_t *)index + o * K;
        const float *s = scale + o * K, *z = zero + o * K;
        for (long t = 0; t < T; t++) {
            const float *xt = x + t * I, *st = sums + t * (I / G);
            float found = 0.0f;
            if (EIGHTS && h % 8 == 0) {
                found = wide ? eights_wide(q, large, s, z, xt, st, K, h) : eights(q, small, s, z, xt, st, K, h);
            } else {
                for (long k = 0; k < K; k++) {
                    const float *g = xt + G * (wide ? large[k] : small[k]);
                    float part = 0.0f;
                    for (long j = 0; j < h; j++) {
                        uint8_t both = q[k * h + j];
                        part += ((float)(both & 15) - z[k]) * g[j] + ((float)(both >> 4) - z[k]) * g[h + j];
                    }
                    found += s[k] * part;
                }
            }
            y[t * O + o] = found;
        }
    }
}

/* rows from .. to of the dense weight */
void gqsa_dense(const uint8_t *codes, const void *index, long wide, const float *scale, const float *zero,
                float *W, long from, long to, long K, long G, long I) {
    long h = G / 2;
    for (long o = from; o < to; o++) {
        float *row = W + o * I;
        memset(row, 0, (size_t)I * sizeof(float));
        for (long k = o * K; k < (o + 1) * K; k++) {
            float *w = row + group(index, wide, k) * G, s = scale[k], z = zero[k];
            const uint8_t *q = codes + k * h;
            for (long j = 0; j < h; j++) {
                w[j] = ((float)(q[j] & 15) - z) * s;
                w[h + j] = ((float)(q[j] >> 4) - z) * s;
            }
        }
    }
}
"""


def pack(q: Tensor) -> Tensor:
    """q (..., G) of 0 .. 15 as bytes (..., G/2)."""
    half = q.shape[-1] // 2
    return q[..., :half].to(torch.uint8) | (q[..., half:].to(torch.uint8) << 4)


def unpack(codes: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.cat([codes & 15, codes >> 4], -1)


def spread(w_OKG: Tensor, index_OK: Tensor, I: int) -> Tensor:
    """The dense matrix (O, I) that has these groups at their places, and zeros elsewhere."""
    O, _, G = w_OKG.shape
    at = index_OK.long()[..., None].expand_as(w_OKG)
    return w_OKG.new_zeros(O, I // G, G).scatter(1, at, w_OKG).view(O, I)


def gathered(W_OI: Tensor, index_OK: Tensor, G: int) -> Tensor:
    """The groups (O, K, G) of a dense matrix: the transpose of `spread`."""
    whole = W_OI.view(len(W_OI), -1, G)
    return whole.gather(1, index_OK.long()[..., None].expand(-1, -1, G))


def dense(codes: Tensor, index: Tensor, scale: Tensor, zero: Tensor, I: int) -> Tensor:
    """W^ (O, I), in the type of `scale`."""
    O, K, half = codes.shape
    if _fits(scale) and (run := library()) is not None:
        W = torch.empty(O, I, dtype=torch.float32, device="cpu")
        _in_parts(
            lambda a, b: run.gqsa_dense(*_places(codes, index, scale, zero), W.data_ptr(), a, b, K, 2 * half, I), O
        )
        return W
    return spread((unpack(codes).to(scale.dtype) - zero[..., None]) * scale[..., None], index, I)


def applies(x: Tensor, scale: Tensor) -> bool:
    """Whether `product` may be taken: few tokens, plain float32 on a CPU, no gradient wanted, and a compiler."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
    few = x.dim() > 0 and 0 < x.numel() <= FEW * x.shape[-1]
    return few and not wanted and type(x) is Tensor and _fits(x) and _fits(scale) and library() is not None


def product(x: Tensor, codes: Tensor, index: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """y (..., O) = W^ x, where it `applies`, from the packed weight."""
    O, K, half = codes.shape
    run, (I, G) = library(), (x.shape[-1], 2 * half)
    assert run is not None
    x_TI = x.detach().contiguous()
    T = x.numel() // I
    y, sums = (torch.empty(n, dtype=torch.float32, device="cpu") for n in ((*x.shape[:-1], O), (T * I // G,)))
    at, sums_at, y_at, places = x_TI.data_ptr(), sums.data_ptr(), y.data_ptr(), _places(codes, index, scale, zero)
    run.gqsa_sums(at, sums_at, T * I // G, G)
    _in_parts(lambda a, b: run.gqsa_product(*places, at, sums_at, y_at, a, b, K, G, I, O, T), O)
    return y


def _fits(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.device.type == "cpu" and hand_written() and not under_mode()


def _places(codes: Tensor, index: Tensor, scale: Tensor, zero: Tensor) -> tuple[Any, ...]:
    wide = index.dtype != torch.uint8
    return codes.data_ptr(), index.data_ptr(), int(wide), scale.data_ptr(), zero.data_ptr()


def _in_parts(run: Any, count: int) -> None:
    threads = torch.get_num_threads()
    if threads == 1:
        run(0, count)
        return
    each = -(-count // threads)
    list(in_c.pool(threads).map(lambda i: run(i, min(i + each, count)), range(0, count, each)))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler, or what it made is not right."""
    made = in_c.built(SOURCE)
    if made is None:
        return None
    place, number = ctypes.c_void_p, ctypes.c_long
    packed: list[Any] = [place, place, number, place, place]
    made.gqsa_product.argtypes, made.gqsa_product.restype = [*packed, *[place] * 3, *[number] * 7], None
    made.gqsa_sums.argtypes, made.gqsa_sums.restype = [place, place, number, number], None
    made.gqsa_dense.argtypes, made.gqsa_dense.restype = [*packed, place, *[number] * 5], None
    return made if all(_right(made, G, kind) for G in (16, 6) for kind in (torch.uint8, torch.int16)) else None


def _right(run: ctypes.CDLL, G: int, kind: torch.dtype) -> bool:
    """Whether it computes what torch does in double."""
    O, K, C = 5, 3, 7
    q = (torch.arange(O * K * G) * 7 % 16).view(O, K, G)
    index = torch.tensor([[0, 2, 6], [1, 2, 3], [0, 5, 6], [3, 4, 5], [2, 4, 6]], dtype=kind)
    scale, zero = torch.linspace(0.1, 1, O * K).view(O, K), (torch.arange(O * K) % 16).view(O, K).float()
    codes, x = pack(q), torch.linspace(-2, 3, 2 * C * G).view(2, C * G)
    W = spread((q.double() - zero[..., None]) * scale[..., None].double(), index, C * G)
    found, y, sums = torch.empty(O, C * G), torch.empty(2, O), x.reshape(-1, G).sum(1)
    packed = _places(codes, index, scale, zero)
    run.gqsa_dense(*packed, found.data_ptr(), 0, O, K, G, C * G)
    run.gqsa_product(*packed, x.data_ptr(), sums.data_ptr(), y.data_ptr(), 0, O, K, G, C * G, O, 2)
    return torch.allclose(found.double(), W, 1e-5, 1e-5) and torch.allclose(y.double(), x.double() @ W.T, 1e-4, 1e-3)
