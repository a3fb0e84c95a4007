"""What cutting a LoRA to less rank costs: undula's factored route beside PEFT's dense ones, and that they agree.

    python bench/squeeze.py --json bench/results/squeeze.json

One layer of 4096 x 4096, rank 64 to 8, float32, one thread.  PEFT has two ways: `convert_to_lora(model, rank=8)`, and
`add_weighted_adapter(combination_type="svd", svd_rank=8)`, which looks at `svd_rank` only from two adapters on (here
the adapter twice, at 0.5 each).  Both decompose the whole matrix.  The ways take turns, `--repeats` times; ours is run
ten times in each turn and its slowest turn counts, of PEFT's the fastest.  Agreement: the singular values of all three
results.  A full decomposition of this size takes a minute or more.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.conversion import convert_to_lora
from record import record
from torch import Tensor, nn

import undula
from undula.compress import ByRank
from undula.kernels import svd

TIMES = 20  # what is to be gained


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, size: int):
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)


def hosted(size: int, rank: int) -> Any:
    """A LoRA of PEFT's with singular values that fall, twice."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
    model = peft.get_peft_model(One(size), config)
    model.add_adapter("again", config)
    first, again = (_factors(model, name) for name in ("default", "again"))
    with torch.no_grad():
        first[0].normal_()
        first[1].normal_().mul_(0.9 ** torch.arange(rank))
        for mine, other in zip(first, again, strict=True):
            other.copy_(mine)
    return model


def _factors(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """(A, B)."""
    layer = model.base_model.model.layer
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def ours(adapter: undula.Adapter, rank: int) -> tuple[float, Tensor]:
    """(seconds, singular values of what came out)."""
    begun = time.perf_counter()
    for _ in range(10):
        made = undula.squeeze(adapter, ByRank(rank))
    seconds = (time.perf_counter() - begun) / 10
    f = next(iter(made.adapter.factors.values()))
    return seconds, svd.factored_values(f["B"].detach(), f["A"].detach())


def converted(model: Any, rank: int) -> tuple[float, Tensor]:
    begun = time.perf_counter()
    _, state = convert_to_lora(model, rank=rank)
    seconds = time.perf_counter() - begun
    A, B = (next(t for k, t in state.items() if f"lora_{name}" in k) for name in "AB")
    return seconds, svd.factored_values(B.detach(), A.detach())


def weighted(model: Any, rank: int) -> tuple[float, Tensor]:
    begun = time.perf_counter()
    model.add_weighted_adapter(["default", "again"], [0.5, 0.5], "made", combination_type="svd", svd_rank=rank)
    seconds = time.perf_counter() - begun
    A, B = _factors(model, "made")
    found = svd.factored_values(B.detach(), A.detach())
    model.delete_adapter("made")
    return seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--to", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = hosted(asked.size, asked.rank)
    A, B = (t.detach() for t in _factors(model, "default"))
    adapter = undula.Adapter(
        {"layer": undula.LoRA(r=asked.rank, alpha=2.0 * asked.rank)},
        {"layer": {"A": A, "B": B}},
        {"layer": (asked.size,) * 2},
    )
    ways = {
        "undula.squeeze": lambda: ours(adapter, asked.to),
        "peft convert_to_lora": lambda: converted(model, asked.to),
        "peft add_weighted_adapter svd": lambda: weighted(model, asked.to),
    }
    ours(adapter, asked.to)  # warm
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, Tensor] = {}
    for _ in range(asked.repeats):
        for name, way in ways.items():
            took, values[name] = way()
            seconds[name].append(took)
            print(f"{name}: {took:.3f} s", flush=True)
    best = svd.factored_values(2 * B, A)[: asked.to]
    apart = {name: float(((found[: asked.to] - best) / best).abs().max()) for name, found in values.items()}
    worst = max(seconds["undula.squeeze"])
    gains = {name: min(took) / worst for name, took in seconds.items() if name != "undula.squeeze"}
    figures = {
        "peft": importlib.metadata.version("peft"),
        "layer": [asked.size, asked.size],
        "ranks": [asked.rank, asked.to],
        "seconds": seconds,
        "times_faster": gains,
        "singular_values_apart": apart,
        "targets": {"times_faster": TIMES, "singular_values_apart": 1e-4},
        "targets_met": min(gains.values()) >= TIMES and max(apart.values()) < 1e-4,
    }
    for name, gain in gains.items():
        print(f"{gain:.0f} times faster than {name}")
    print(f"singular values apart by at most {max(apart.values()):.1e}; targets met: {figures['targets_met']}")
    if asked.json is not None:
        record(asked.json, figures)


if __name__ == "__main__":
    main()
