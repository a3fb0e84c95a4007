"""What a model does between its products, in one pass forward and one backward, where this machine has a C compiler.

    norm(x, w, eps)       w * x / sqrt(mean x^2 + eps)
    turned(x, cos, sin)   x cos + (-x2, x1) sin, x1 and x2 the halves of a head
    gated(a, b)           a / (1 + exp(-a)) * b

    weighed(S, P ...)     softmax of scores, and sloped: its gradient, see `attention`

Model code writes these as six, five and two operations, and autograd runs about twice as many backward.  Everything is
computed in float32 and rounded to bfloat16 where the model's own operations round; kept for the backward is what went
in.
Compiled as `in_c` compiles.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .autocast import exact_backward, hand_written
from .elementwise import under_mode
from .in_c import built, pool

KINDS = (Tensor, torch.nn.Parameter)
SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
HEAD = r"""
#include <math.h>
#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef unsigned short bfloat16;
typedef union { float f; unsigned u; int i; } word;

INLINE float up_float32(float x) { return x; }
INLINE float down_float32(float x) { return x; }
INLINE float up_bfloat16(bfloat16 x) { word w; w.u = (unsigned)x << 16; return w.f; }
INLINE bfloat16 down_bfloat16(float x) { word w; w.f = x; return (w.u + 0x7fff + (w.u >> 16 & 1)) >> 16; }

/* e^x of x <= 88, to 2e-7; 0 below -87 */
INLINE float exponential(float x) {
    float k = rintf(x * 1.44269504f), r = x - k * 0.693145752f - k * 1.42860677e-6f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f
        + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    word w;
    w.i = ((int)k + 127) << 23;
    return x < -87.0f ? 0.0f : p * w.f;
}

INLINE float sigmoid(float x) {
    float e = exponential(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}
"""
BODY = r"""
void norm_TYPE(const TYPE_ *restrict x, const TYPE_ *restrict w, TYPE_ *restrict y, long n, long d, float eps) {
    for (long t = 0; t < n; t++, x += d, y += d) {
        float sums[LANES] = {0}, sum = 0;
        long i = 0;
        for (; i + LANES <= d; i += LANES)
            for (int l = 0; l < LANES; l++) sums[l] += UP(x[i + l]) * UP(x[i + l]);
        for (; i < d; i++) sum += UP(x[i]) * UP(x[i]);
        for (int l = 0; l < LANES; l++) sum += sums[l];
        float inverse = 1.0f / sqrtf(sum / d + eps);
        for (i = 0; i < d; i++) y[i] = DOWN(UP(w[i]) * UP(DOWN(UP(x[i]) * inverse)));
    }
}

void norm_back_TYPE(const TYPE_ *restrict x, const TYPE_ *restrict w, const TYPE_ *restrict g, TYPE_ *restrict dx,
                    long n, long d, float eps) {
    for (long t = 0; t < n; t++, x += d, g += d, dx += d) {
        float sums[LANES] = {0}, dots[LANES] = {0}, sum = 0, dot = 0;
        long i = 0;
        for (; i + LANES <= d; i += LANES)
            for (int l = 0; l < LANES; l++) {
                float v = UP(x[i + l]);
                sums[l] += v * v;
                dots[l] += v * UP(w[i + l]) * UP(g[i + l]);
            }
        for (; i < d; i++) sum += UP(x[i]) * UP(x[i]), dot += UP(x[i]) * UP(w[i]) * UP(g[i]);
        for (int l = 0; l < LANES; l++) sum += sums[l], dot += dots[l];
        float inverse = 1.0f / sqrtf(sum / d + eps), along = dot / d * inverse * inverse * inverse;
        for (i = 0; i < d; i++) dx[i] = DOWN(UP(w[i]) * UP(g[i]) * inverse - UP(x[i]) * along);
    }
}

/* heads of width 2 half: x[t, h] at x + t step + h stride; y is (n, heads, 2 half) */
void turned_TYPE(const TYPE_ *restrict x, const TYPE_ *restrict c, const TYPE_ *restrict s, TYPE_ *restrict y, long n,
                 long heads, long half, long step, long stride) {
    for (long t = 0; t < n; t++, c += 2 * half, s += 2 * half)
        for (long h = 0; h < heads; h++, y += 2 * half) {
            const TYPE_ *a = x + t * step + h * stride, *b = a + half;
            for (long i = 0; i < half; i++) {
                y[i] = DOWN(UP(DOWN(UP(a[i]) * UP(c[i]))) - UP(DOWN(UP(b[i]) * UP(s[i]))));
                y[i + half] = DOWN(UP(DOWN(UP(b[i]) * UP(c[i + half]))) + UP(DOWN(UP(a[i]) * UP(s[i + half]))));
            }
        }
}

void turned_back_TYPE(const TYPE_ *restrict g, const TYPE_ *restrict c, const TYPE_ *restrict s, TYPE_ *restrict y,
                      long n, long heads, long half, long step, long stride) {
    for (long t = 0; t < n; t++, c += 2 * half, s += 2 * half)
        for (long h = 0; h < heads; h++, y += 2 * half) {
            const TYPE_ *a = g + t * step + h * stride, *b = a + half;
            for (long i = 0; i < half; i++) {
                y[i] = DOWN(UP(DOWN(UP(a[i]) * UP(c[i]))) + UP(DOWN(UP(b[i]) * UP(s[i + half]))));
                y[i + half] = DOWN(UP(DOWN(UP(b[i]) * UP(c[i + half]))) - UP(DOWN(UP(a[i]) * UP(s[i]))));
            }
        }
}

void gated_TYPE(const TYPE_ *restrict a, const TYPE_ *restrict b, TYPE_ *restrict y, long n) {
    for (long i = 0; i < n; i++) y[i] = DOWN(UP(DOWN(UP(a[i]) * sigmoid(UP(a[i])))) * UP(b[i]));
}

void gated_back_TYPE(const TYPE_ *restrict a, const TYPE_ *restrict b, const TYPE_ *restrict g, TYPE_ *restrict da,
                     TYPE_ *restrict db, long n) {
    for (long i = 0; i < n; i++) {
        float v = UP(a[i]), p = sigmoid(v);
        db[i] = DOWN(UP(g[i]) * UP(DOWN(v * p)));
        da[i] = DOWN(UP(DOWN(UP(g[i]) * UP(b[i]))) * p * (1.0f + v * (1.0f - p)));
    }
}

/* softmax of scale s over the keys from .. to - 1 of each row, in the place of s and, rounded, in p; 0 elsewhere */
void weighed_TYPE(float *s, TYPE_ *p, const int *from, const int *to, long n, long width, float scale) {
    for (long t = 0; t < n; t++, s += width, p += width) {
        float tops[LANES], sums[LANES] = {0}, top = -INFINITY, sum = 0;
        long first = from[t], end = to[t], i = first;
        for (int l = 0; l < LANES; l++) tops[l] = -INFINITY;
        for (; i + LANES <= end; i += LANES)
            for (int l = 0; l < LANES; l++) tops[l] = s[i + l] > tops[l] ? s[i + l] : tops[l];
        for (; i < end; i++) top = s[i] > top ? s[i] : top;
        for (int l = 0; l < LANES; l++) top = tops[l] > top ? tops[l] : top;
        for (i = first; i + LANES <= end; i += LANES)
            for (int l = 0; l < LANES; l++) sums[l] += s[i + l] = exponential(scale * (s[i + l] - top));
        for (; i < end; i++) sum += s[i] = exponential(scale * (s[i] - top));
        for (int l = 0; l < LANES; l++) sum += sums[l];
        float inverse = 1.0f / sum;
        for (i = 0; i < first; i++) s[i] = 0;
        for (i = first; i < end; i++) s[i] *= inverse;
        for (i = end; i < width; i++) s[i] = 0;
        if ((void *)p != (void *)s)
            for (i = 0; i < width; i++) p[i] = DOWN(s[i]);
    }
}

/* scale p (dp - d) of each row, d (n); ds may lie where dp does */
void sloped_TYPE(const float *p, const float *dp, const float *d, TYPE_ *ds, long n, long width, float scale) {
    for (long t = 0; t < n; t++, p += width, dp += width, ds += width)
        for (long i = 0; i < width; i++) ds[i] = DOWN(scale * p[i] * (dp[i] - d[t]));
}
"""


def _source() -> str:
    kinds = (("float32", "float"), ("bfloat16", "bfloat16"))
    parts = [
        BODY.replace("TYPE_", kind)
        .replace("TYPE", name)
        .replace("UP(", f"up_{name}(")
        .replace("DOWN(", f"down_{name}(")
        for name, kind in kinds
    ]
    return HEAD + "".join(parts)


COUNTS = {"norm": (3, 2, 1), "norm_back": (4, 2, 1), "turned": (4, 5, 0), "turned_back": (4, 5, 0), "gated": (3, 1, 0),
          "gated_back": (5, 1, 0), "weighed": (4, 2, 1), "sloped": (4, 2, 1)}  # fmt: skip  # tensors, integers, numbers


@functools.cache
def passes() -> ctypes.CDLL | None:
    """The compiled passes; None where there is no compiler."""
    library = built(_source())
    for name, (places, integers, numbers) in COUNTS.items() if library is not None else ():
        for suffix in SUFFIX.values():
            found = getattr(library, f"{name}_{suffix}")
            kinds = [ctypes.c_void_p] * places + [ctypes.c_long] * integers + [ctypes.c_float] * numbers
            found.argtypes, found.restype = kinds, None
    return library


def applies(*tensors: Tensor) -> bool:
    """Whether the passes take these: of one type that they know, on a CPU, and nothing sees or follows operations."""
    first = tensors[0]
    if first.dtype not in SUFFIX or not hand_written() or under_mode() or torch.is_autocast_enabled("cpu"):
        return False
    known = all(t.dtype == first.dtype and t.device.type == "cpu" and type(t) in KINDS for t in tensors)
    return known and passes() is not None


def _run(name: str, dtype: torch.dtype, tensors: tuple[tuple[Tensor, int], ...], n: int, *rest: float) -> None:
    """A pass over n rows, in as many threads as torch has.  tensors: each with its numbers a row, 0 for one that all
    rows share."""
    run, threads = getattr(passes(), f"{name}_{SUFFIX[dtype]}"), torch.get_num_threads()
    each = max(-(-n // threads), 1)

    def part(i: int) -> None:
        run(*(t.data_ptr() + t.element_size() * i * width for t, width in tensors), min(each, n - i), *rest)

    if threads == 1:
        part(0)
    else:
        list(pool(threads).map(part, range(0, n, each)))


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        x, ctx.eps = x.contiguous(), eps
        ctx.save_for_backward(x, w)
        y, d = torch.empty_like(x), x.shape[-1]
        _run("norm", x.dtype, ((x, d), (w, 0), (y, d)), x.numel() // d, d, eps)
        return y

    @staticmethod
    @exact_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, w = ctx.saved_tensors
        g, dx, d = g.contiguous(), torch.empty_like(x), x.shape[-1]
        _run("norm_back", x.dtype, ((x, d), (w, 0), (g, d), (dx, d)), x.numel() // d, d, ctx.eps)
        return dx, None, None


class _Turned(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _each_head("turned", x, cos, sin)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _each_head("turned_back", g, *ctx.saved_tensors), None, None


def _each_head(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(1, H, T, d) -> the same, in memory (T, H, d)."""
    _, H, T, d = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    y = x.new_empty(1, T, H, d)
    step, stride = x.stride(2), x.stride(1)
    _run(name, x.dtype, ((x, step), (cos, d), (sin, d), (y, H * d)), T, H, d // 2, step, stride)
    return y.transpose(1, 2)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        y = torch.empty_like(a)
        _run("gated", a.dtype, ((a, 1), (b, 1), (y, 1)), a.numel())
        return y

    @staticmethod
    @exact_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        g, da, db = g.contiguous(), torch.empty_like(a), torch.empty_like(b)
        _run("gated_back", a.dtype, ((a, 1), (b, 1), (g, 1), (da, 1), (db, 1)), a.numel())
        return da, db


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """x (..., d), w (d,) without a gradient, where `applies`."""
    return _Norm.apply(x, w, eps)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (1, H, T, d), d even, cos and sin (1, T, d) contiguous and without gradients, where `applies`."""
    return _Turned.apply(x, cos, sin)


def gated(a: Tensor, b: Tensor) -> Tensor:
    """Two of one shape, where `applies`."""
    return _Gated.apply(a, b)


def weighed(S: Tensor, first: Tensor, end: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale S) over keys first .. end - 1 of each row, in the place of S (n, keys) float32, and rounded to
    `dtype` as what is returned; first, end (n,) int32."""
    P = S if dtype == S.dtype else torch.empty_like(S, dtype=dtype)
    n, width = S.shape
    _run("weighed", dtype, ((S, width), (P, width), (first, 1), (end, 1)), n, width, scale)
    return P


def sloped(P: Tensor, dP: Tensor, D: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale P (dP - D) of float32 P, dP (n, keys) and D (n,), rounded to `dtype`; dP may be written over."""
    dS = dP if dtype == dP.dtype else torch.empty_like(dP, dtype=dtype)
    n, width = P.shape
    _run("sloped", dtype, ((P, width), (dP, width), (D, 1), (dS, width)), n, width, scale)
    return dS
