"""Parameter groups for optimisers: LoRA+ (Hayou, Ghosh, Yu 2024, arXiv:2402.12354, ICML 2024).

B, which starts at zero, learns `ratio` times as fast as A.  Tools that find B by the names of PEFT's LoRA (`lora_B`, as
`peft.optimizers.create_loraplus_optimizer` does) find none in undula's adapters; this goes by undula's.
"""

from __future__ import annotations

from typing import Any

from torch import nn

MARKS = ("undula", "undula_factors")  # what factors hang below: `undula.attach` and PEFT


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for any torch optimiser: the factors B of the adapters on `model` at lr * ratio, all else that trains (A,
    other factors, heads) at lr.  Both hosts; wrapped methods too (`0_B` in a Sum).

    Raises ValueError where nothing that trains is a factor B.
    """
    fast = factors_B(model)
    slow = [p for n, p in model.named_parameters() if p.requires_grad and n not in fast]
    rates = ((slow, lr), (list(fast.values()), lr * ratio))
    return [{"params": found, "lr": rate, "weight_decay": weight_decay} for found, rate in rates]


def factors_B(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors B that train, by their names.  Raises ValueError where there is none."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fast = {n: p for n, p in trained.items() if _is_B(n)}
    if not fast:
        some = ", ".join(list(trained)[:3]) or "none"
        raise ValueError(
            f"LoRA+ gives the factor B its own rate; nothing that trains in this model is one (trained: {some}). "
            "LoRA, LoRAN, AuroRA and their like have it"
        )
    return fast


def _is_B(name: str) -> bool:
    parts = name.split(".")
    return parts[-1].rpartition("_")[2] == "B" and any(mark in parts for mark in MARKS)
