"""A base of the shape of Llama-3-8B with random weights on a device, and what is asked of that device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Where:
    """A device, and how large a base is put there."""

    device: torch.device
    layers: int = 4
    tiny: bool = False

    @property
    def away(self) -> bool:
        return self.device.type == "cuda"

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.away:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak(self, go: Callable[[], Any]) -> float:
        """Bytes that `go` takes at most above what is taken before."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        go()
        torch.cuda.synchronize(self.device)
        return float(torch.cuda.max_memory_allocated(self.device) - before)

    def card(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.away else str(self.device)


def llama(where: Where) -> Any:
    """A frozen causal model with random bfloat16 weights that were made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = TINY if where.tiny else LLAMA_3_8B
    config = LlamaConfig(**sizes, num_hidden_layers=2 if where.tiny else where.layers, dtype="bfloat16")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with where.device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)
