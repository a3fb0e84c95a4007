"""Decoding with many adapters in one batch, on a device: a token of each of N requests, each through its own adapter.

    python bench/decode.py --device cuda --adapters 16 64 --json decode.json
    python bench/decode.py --device cpu --tiny --adapters 4

One step is a forward of one token of each request after a prompt, with a cache of keys and values, within
`undula.rows`; beside it the base alone.  Medians over the steps; the adapters (LoRA of rank 16 on all linear layers,
numbers drawn) are frozen, as an engine has them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path

import shaped
import torch
from record import record

import undula


def attached(model: torch.nn.Module, count: int) -> list[str]:
    """Names of so many frozen adapters with drawn numbers."""
    for i in range(count):
        adapter = undula.attach(model, undula.LoRA(r=16), "all-linear", name=f"a{i}")
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_(std=0.02)
        undula.attach(model, undula.detach(model, f"a{i}"), name=f"a{i}", frozen=True)
    undula.select(model, None)
    return [f"a{i}" for i in range(count)]


@torch.no_grad()
def seconds(
    model: torch.nn.Module, where: shaped.Where, names: list[str] | None, requests: int, steps: int
) -> list[float]:
    """Of each step, with names[i] for request i or the base alone."""
    from transformers import DynamicCache

    prompt = torch.randint(5, model.config.vocab_size, (requests, 8 if where.tiny else 128), device=where.device)
    token, cache, found = prompt[:, :1], DynamicCache(config=model.config), []
    with contextlib.nullcontext() if names is None else undula.rows(model, names):
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(steps + 3):
            start = where.clock()
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            found.append(where.clock() - start)
    return found[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--adapters", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    where = shaped.Where(torch.device(args.device), args.layers, args.tiny)
    model, rows = shaped.llama(where).eval(), []
    names = attached(model, max(args.adapters))
    for count in args.adapters:
        alone = statistics.median(seconds(model, where, None, count, args.steps))
        mixed = statistics.median(seconds(model, where, names[:count], count, args.steps))
        row = {"adapters": count, "base_ms": alone * 1e3, "mixed_ms": mixed * 1e3, "tokens_per_second": count / mixed}
        rows.append(row)
        print(f"decode, {count:3} adapters: {mixed * 1e3:8.2f} ms a step, base alone {alone * 1e3:8.2f} ms, "
              f"x {mixed / alone:.2f}, {count / mixed:9.0f} tokens/s")  # fmt: skip
    if args.json:
        record(args.json, {"device": where.card(), "layers": args.layers, "tiny": args.tiny, "rows": rows})


if __name__ == "__main__":
    main()
