"""The sines and cosines of LoRAN and Sine-LoRA in one pass of C, where this machine has a compiler.

In torch's own operations the sine of a block and what is made of it are three passes forward and five backward, and
sine and cosine of one number are computed one without the other: half of what LoRAN costs above its products.  In C
they are one pass each.  The few lines are compiled when the first matrix comes that is worth it, for this machine, into
a folder that is gone once they are loaded: nothing is kept that could be stale, of another machine or of another user.
Without a compiler, or with UNDULA_COMPILE=0, torch's operations do the same.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .autocast import hand_written
from .elementwise import under_mode

LEAST = 1 << 15  # entries of a block: below, nothing is gained
PATIENCE = 60.0  # seconds for the compiler

# The argument w u is rounded to float as torch rounds it, brought to [-pi/2, pi/2] in double, exactly enough for any
# float, and there sine and cosine are polynomials of degree 11 and 10, to 1e-10: as exact as torch's own.
SOURCE = r"""
#include <math.h>
#define INLINE static inline __attribute__((always_inline))

/* x = k pi + r, and the sign (-1)^k */
INLINE float turned(float x, float *sign) {
    double k = rint((double)x * 0.31830988618379067154), half = 0.5 * k;
    *sign = (float)(1.0 - 4.0 * fabs(half - rint(half)));
    return (float)(((double)x - k * 3.14159265358979311600) - k * 1.2246467991473532e-16);
}

INLINE float sine(float r) {
    float t = r * r;
    return r * (0.99999999997f + t * (-1.66666665e-1f + t * (8.33332926e-3f + t * (-1.98407029e-4f
        + t * (2.75188559e-6f + t * -2.37947172e-8f)))));
}

INLINE float cosine(float r) {
    float t = r * r;
    return 1.0f + t * (-4.99999994e-1f + t * (4.16666363e-2f + t * (-1.38883616e-3f
        + t * (2.47601676e-5f + t * -2.60515865e-7f))));
}

/* u + a u sin(w u) in the place of u */
void sinter_bend(float *restrict u, long n, float w, float a) {
    for (long i = 0; i < n; i++) {
        float sign, r = turned(w * u[i], &sign);
        u[i] += a * u[i] * (sign * sine(r));
    }
}

/* the same, and g (1 + a (sin(w u) + w u cos(w u))) in the place of g */
void sinter_pull(float *restrict u, float *restrict g, long n, float w, float a) {
    for (long i = 0; i < n; i++) {
        float sign, x = u[i], r = turned(w * x, &sign), s = sign * sine(r);
        g[i] += a * g[i] * (s + w * x * (sign * cosine(r)));
        u[i] = x + a * x * s;
    }
}

/* a sin(w u) in the place of u */
void sine_bend(float *restrict u, long n, float w, float a) {
    for (long i = 0; i < n; i++) {
        float sign, r = turned(w * u[i], &sign);
        u[i] = a * (sign * sine(r));
    }
}

/* the same, and g a w cos(w u) in the place of g */
void sine_pull(float *restrict u, float *restrict g, long n, float w, float a) {
    for (long i = 0; i < n; i++) {
        float sign, r = turned(w * u[i], &sign);
        g[i] *= a * w * (sign * cosine(r));
        u[i] = a * (sign * sine(r));
    }
}
"""

CURVES = ("sinter", "sine")
_pools: dict[int, concurrent.futures.ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # whose threads are not there


def applies(u: Tensor) -> bool:
    """Whether the passes may be taken for a block: plain float32 numbers on a CPU, enough of them."""
    if u.numel() < LEAST or u.dtype != torch.float32 or u.device.type != "cpu" or type(u) is not Tensor:
        return False
    return u.is_contiguous() and hand_written() and not under_mode() and passes() is not None


def bend(curve: str, u: Tensor, w: float, a: float = 1.0) -> Tensor:
    """f(u) in the place of u, where `applies`.  The curves: "sinter", u + a u sin(w u), and "sine", a sin(w u)."""
    _in_parts(f"{curve}_bend", w, a, u)
    return u


def pull(curve: str, u: Tensor, g: Tensor, w: float, a: float = 1.0) -> tuple[Tensor, Tensor]:
    """(f(u), g f'(u)) in the places of u and g, where `applies`."""
    _in_parts(f"{curve}_pull", w, a, u, g)
    return u, g


def _in_parts(name: str, w: float, a: float, *blocks: Tensor) -> None:
    """As many threads as torch has take even parts; C lets go of the interpreter."""
    library, count, threads = passes(), blocks[0].numel(), torch.get_num_threads()
    run = getattr(library, name)
    if threads == 1:
        run(*(t.data_ptr() for t in blocks), count, w, a)
        return
    each = -(-count // threads + 63) // 64 * 64

    def part(i: int) -> None:
        run(*(t.data_ptr() + 4 * i for t in blocks), min(each, count - i), w, a)

    list(pool(threads).map(part, range(0, count, each)))


def pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """So many threads, made once."""
    if threads not in _pools:
        _pools[threads] = concurrent.futures.ThreadPoolExecutor(threads, "undula-c")
    return _pools[threads]


@functools.cache
def passes() -> ctypes.CDLL | None:
    """The compiled passes; None where there is no compiler, or what it made is not right."""
    library = built(SOURCE)
    return None if library is None else _declared(library)


def built(text: str) -> ctypes.CDLL | None:
    """What the compiler of this machine makes of C; None where there is none, or it is not to be used."""
    compiler = os.environ.get("CC") or "cc"
    if os.environ.get("UNDULA_COMPILE") == "0" or os.name != "posix" or shutil.which(compiler) is None:
        return None
    try:
        return _built(compiler, text)
    except (OSError, subprocess.SubprocessError):  # of a compiler without headers, a folder that runs nothing ...
        return None


def _built(compiler: str, text: str) -> ctypes.CDLL:
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    with tempfile.TemporaryDirectory(prefix="undula-") as folder:
        source, made = Path(folder) / "undula.c", Path(folder) / "undula.so"
        source.write_text(text)
        options = ["-O3", native, "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
        command = [compiler, *options, str(source), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE)
        return ctypes.CDLL(str(made))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL | None:
    numbers, place = [ctypes.c_long, ctypes.c_float, ctypes.c_float], [ctypes.c_void_p]
    for curve in CURVES:
        for name, places in ((f"{curve}_bend", place), (f"{curve}_pull", place * 2)):
            found = getattr(library, name)
            found.argtypes, found.restype = places + numbers, None
    return library if _right(library) else None


def _right(library: ctypes.CDLL) -> bool:
    """Whether it computes what torch does in double."""
    u, w, a = torch.linspace(-9, 9, 4099, device="cpu", dtype=torch.float32), 300.0, 0.25
    x, v = (w * u).double(), u.double()
    sinter = v + a * v * x.sin(), 1 + a * (x.sin() + x * x.cos())
    sine = a * x.sin(), a * w * x.cos()
    for curve, (value, slope) in zip(CURVES, (sinter, sine), strict=True):
        bent, pulled, g = u.clone(), u.clone(), torch.ones_like(u)
        getattr(library, f"{curve}_bend")(bent.data_ptr(), len(u), w, a)
        getattr(library, f"{curve}_pull")(pulled.data_ptr(), g.data_ptr(), len(u), w, a)
        found = (bent, value), (pulled, value), (g, slope)
        if not all(torch.allclose(t.double(), want, 1e-5, 1e-4) for t, want in found):
            return False
    return True
