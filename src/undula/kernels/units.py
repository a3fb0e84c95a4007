"""Which narrow products this machine computes in hardware."""

from __future__ import annotations

import torch

CPU = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch's own questions, as some versions have them


def has_bfloat16() -> bool:
    """Whether the GPU, where there is one, else the CPU has units for products in bfloat16.  Other CPUs compute them
    too, by conversions, some four times slower than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, name, bool)() for name in CPU)
