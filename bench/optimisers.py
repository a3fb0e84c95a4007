"""What an optimiser that sees both factors costs a step, beside AdamW: forward, backward and step, interleaved.

    python bench/optimisers.py --json bench/results/optimisers.json          # SmolLM2, LoRA r=8, a few minutes
    python bench/optimisers.py --tokens 16 --rounds 3 --only adamw lorapro

Few tokens, where the optimiser's share of a step is largest.  Each optimiser has a model of its own over one set of
frozen weights, and every round takes one step of each in turn; the figure is the median over rounds of the ratio to
AdamW's step of the same round, in CPU time of one thread, which a shared machine does not change.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import nn

import undula
from undula.optim import optimisers

CHOICES = {
    "adamw": optimisers.AdamW(),
    "lorapro": optimisers.LoRAPro(),
    "lorapro-full": optimisers.LoRAPro(full=True),
    "allora": optimisers.ALLoRA(),
    "ggpo": optimisers.LoRAGGPO(),
    "mgpo": optimisers.LoRAMGPO(),
    "lorsum": optimisers.LoRSum(),
    "riemannian": optimisers.Riemannian(),
}
TARGETS = {"lorapro": 1.15, "ggpo": 1.10, "mgpo": 1.10}
WARM = 3  # steps that are not counted: the first have no momentum


def build(model: nn.Module, choice: Any) -> torch.optim.Optimizer:
    """The optimiser over the selected adapter."""
    kind, options = choice.made()
    own = {"adapted": model} if choice.paired else {}
    return kind(undula.adapters(model)["default"].parameters(), lr=1e-4, **options, **own)


def model_of(base: nn.Module) -> nn.Module:
    """A model with the base's own weights in memory once, and an adapter of its own."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(base.config, dtype=torch.float32)
    theirs = dict(base.named_parameters())
    for name, p in made.named_parameters():
        p.data = theirs[name].data
    torch.manual_seed(0)
    undula.attach(made.requires_grad_(False), undula.LoRA(r=8), "all-linear")
    return made.train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> Callable[[], None]:
    def taken() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=CHOICES, default=list(CHOICES))
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from undula.bundled import model_path

    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32)
    torch.manual_seed(0)
    batch = torch.randint(5, 40000, (given.batch, given.tokens))
    names = list(dict.fromkeys(["adamw", *given.only]))
    steps = {}
    for name in names:
        model = model_of(base)
        steps[name] = step(model, build(model, CHOICES[name]), batch)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM + given.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begun = time.process_time()
            steps[name]()
            if number >= WARM:
                times[name].append(time.process_time() - begun)
    ratios = {n: statistics.median(a / b for a, b in zip(times[n], times["adamw"], strict=True)) for n in names}
    for name in names:
        print(
            f"{name:12} {statistics.median(times[name]) * 1e3:8.1f} ms   {ratios[name]:.3f} of AdamW's step", flush=True
        )
    met = {n: ratios[n] <= most for n, most in TARGETS.items() if n in ratios}
    print("targets met:", met)
    if given.json:
        figures = {
            "model": "SmolLM2-135M, LoRA r=8 on all linear layers, float32",
            "tokens": given.batch * given.tokens,
            "rounds": given.rounds,
            "clock": "cpu, one thread",
            "milliseconds": {n: round(statistics.median(t) * 1e3, 2) for n, t in times.items()},
            "ratio_to_adamw": {n: round(r, 4) for n, r in ratios.items()},
            "targets": TARGETS,
            "targets_met": met,
        }
        record(given.json, figures)


if __name__ == "__main__":
    main()
