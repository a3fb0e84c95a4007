"""How fast smaller bases are: SmolLM2-135M dense, pruned to the sizes that 20 % and 50 % leave, and in 4-bit groups.

    python bench/smaller_speed.py --json bench/results/smaller-speed.json

One thread, CPU seconds, medians of rounds in which the models take turns.  Speed depends on shapes alone: the pruned
models have the sizes that `undula prune-base` says, and random weights; the groups are chosen without data.  The groups
are multiplied as they are stored in float32; in bfloat16 their weight is made dense for each product.
"""

import argparse
import copy
from pathlib import Path

import lm
import torch
from record import record

from undula.compress.gqsa import Form, compress, compressed_layers
from undula.host.coupled import KINDS, coupled, resized
from undula.ranks.loraprune import to_close

READ, CONTEXT = 256, 32  # tokens that are read at once, and that stand before the one that is decoded


def pruned(dense, sparsity):
    """A model of the size that this sparsity leaves."""
    parts = coupled(dense)
    first = {kind: next(p for p in parts if p.kind == kind) for kind in KINDS}
    gone = to_close(list(first.values()), {kind: p.weights(dense) for kind, p in first.items()}, sparsity)
    return type(dense)(resized(dense, parts, {kind: p.count - gone[kind] for kind, p in first.items()})).eval()


def grouped(sparsity):
    model = lm.model()
    compress(model, Form(sparsity))
    return model


def linear(model, names):
    """All linear layers but the head, one token each."""
    layers = [m for n, m in model.named_modules() if n in names]
    x = {m.in_features: torch.randn(1, m.in_features, dtype=model.dtype) for m in layers}
    return lambda: [m(x[m.in_features]) for m in layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ids, dense = lm.sequences("test", READ // lm.LENGTH).view(1, READ), lm.model()
    models = {"dense": dense, "pruned 20 %": pruned(dense, 0.2), "pruned 50 %": pruned(dense, 0.5)}
    models["4-bit groups, 50 % gone"] = packed = grouped(0.5)
    names, found = set(compressed_layers(packed)), {}
    for dtype in ("float32", "bfloat16"):
        typed = {
            n: copy.deepcopy(m).to(getattr(torch, dtype))
            for n, m in models.items()
            if dtype == "float32" or m is not packed
        }
        calls = {
            f"reading {READ} tokens": {n: lambda m=m: m(input_ids=ids) for n, m in typed.items()},
            "decoding a token": {n: lm.decoder(m, ids[:, :CONTEXT]) for n, m in typed.items()},
            "linear layers, a token": {n: linear(m, names) for n, m in typed.items()},
        }
        for what, each in calls.items():
            seconds = lm.beside(each, asked.rounds)
            tokens = READ if what.startswith("reading") else 1
            found[f"{what}, {dtype}"] = {
                n: {"seconds": s, "tokens a second": tokens / s, "times as fast": seconds["dense"] / s}
                for n, s in seconds.items()
            }
            print(what, dtype, {n: round(s, 4) for n, s in seconds.items()}, flush=True)
    against = found["decoding a token, bfloat16"]["dense"]["seconds"]
    packed_s = found["decoding a token, float32"]["4-bit groups, 50 % gone"]["seconds"]
    targets = {
        "pruned models are faster": all(
            r["times as fast"] > 1 for rows in found.values() for n, r in rows.items() if n.startswith("pruned")
        ),
        "groups decode faster than dense float32": found["decoding a token, float32"]["4-bit groups, 50 % gone"][
            "times as fast"
        ]
        > 1,
        "groups decode faster than dense bfloat16": packed_s < against,
    }
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items() if m is not packed}
    print(targets)
    if asked.json:
        record(asked.json, {"threads": 1, "parameters": sizes, "speed": found, "targets_met": targets})


if __name__ == "__main__":
    main()
