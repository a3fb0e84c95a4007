"""What the programs on smaller bases share: SmolLM2, sequences of Python code, perplexity, times side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from undula.bundled import dataset, model_path
from undula.train.base import quiet

HELD, LENGTH, BATCH = 32, 64, 4  # sequences that perplexity is measured on, tokens in each, sequences in a step


def model() -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32).eval()


def sequences(split: str, count: int) -> Tensor:
    """`count` sequences of `LENGTH` tokens (count, LENGTH): functions of Python's library, one after another."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"))
    ids: list[int] = []
    for row in dataset("docstrings")[split]:
        ids += tokenizer(row["text"] + "\n\n")["input_ids"]
        if len(ids) >= count * LENGTH:
            return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
    raise ValueError(f"{split} has {len(ids)} tokens, fewer than {count * LENGTH}")


@torch.no_grad()
def perplexity(lm: nn.Module, held: Tensor) -> float:
    lm.eval()
    losses = [float(lm(input_ids=each, labels=each).loss) for each in held.split(4)]
    return math.exp(sum(losses) / len(losses))


def learn(lm: nn.Module, parameters: list[Any], ids: Tensor, steps: int, lr: float, course: Any = None) -> None:
    """`steps` of AdamW, the rate going down to nothing; `course` is a procedure's at its moments."""
    optimizer = course.optimizer if course is not None else torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    lm.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 10 * (1 - step / steps))
        rows = ids[order[(step * BATCH + torch.arange(BATCH)) % len(ids)]]
        if course is not None:
            course.before_forward()
        lm(input_ids=rows, labels=rows).loss.backward()
        if course is not None:
            course.before_update()
        optimizer.step()
        if course is not None:
            course.after_update()
        optimizer.zero_grad()
    lm.eval()


def beside(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """{name: median CPU seconds}, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, call in calls.items():
                start = time.process_time()
                call()
                times[name].append(time.process_time() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def decoder(lm: Any, context: Tensor) -> Callable[[], Any]:
    """One token after `context` (1, T), whose keys and values are kept: what a step of greedy decoding is."""
    with torch.no_grad():
        past = lm(input_ids=context, use_cache=True).past_key_values
    token = context[:, -1:]

    def step() -> None:
        lm(input_ids=token, past_key_values=past, use_cache=True)
        past.crop(-1)

    return step
