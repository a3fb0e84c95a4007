"""LoRAPrune on SmolLM2-135M against pruning by magnitude and by chance: perplexity, and how fast the smaller model is.

    python bench/prune_base.py --sparsity 0.2 --json bench/results/prune-base-20.json
    python bench/prune_base.py --sparsity 0.5 --json bench/results/prune-base-50.json

One thread.  All three train the same LoRA on the same sequences for the same steps, with the same schedule; what they
go by differs.  Perplexity is on held-out Python functions, and that of the untouched model and of the LoRA alone stands
beside.
"""

import argparse
import json
from pathlib import Path

import lm
import torch
from record import record

import undula
from undula.compress.prune_base import prune_base
from undula.ranks.loraprune import Gradients, LoRAPrune, Magnitude, Random

SCORES = {"gradients": Gradients(), "magnitude": Magnitude(), "random": Random(0)}


def pruned(scores, asked, ids, held):
    """(the smaller model, its row of the table)."""
    torch.manual_seed(0)
    model = lm.model()
    adapter = undula.attach(model, undula.LoRA(r=8))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=asked.lr, weight_decay=0.0)
    how = LoRAPrune(asked.sparsity, scores=scores, every=max(1, asked.steps // 10))
    course = how.start(model, optimizer, asked.steps)
    lm.learn(model, adapter.parameters(), ids, asked.steps, asked.lr, course)
    course.finish()
    masked = lm.perplexity(model, held)
    made = prune_base(model)
    undula.merge(model, keep=False)
    row = {"perplexity": lm.perplexity(model, held), "masked": masked, "parameters": made.after}
    return model, row | {kind: list(counts) for kind, counts in made.structures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--json", type=Path, help="written after each row; rows of the same settings in it stay")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ids, held = lm.sequences("train", max(lm.BATCH * asked.steps, 8)), lm.sequences("test", lm.HELD)
    said = {"sparsity": asked.sparsity, "steps": asked.steps, "lr": asked.lr, "threads": 1, "held_tokens": held.numel()}
    kept = json.loads(asked.json.read_text()) if asked.json and asked.json.is_file() else {}
    same = all(kept.get(name) == value for name, value in said.items())
    rows, speed = (kept["rows"], kept["speed"]) if same else ({}, {})

    def told(name, row):
        rows[name] = row
        print(name, row, flush=True)
        if asked.json:
            record(asked.json, {**said, "rows": rows, "speed": speed, "targets_met": met(rows, speed)})

    dense = lm.model()
    if "untouched" not in rows:
        count = sum(p.numel() for p in dense.parameters())
        told("untouched", {"perplexity": lm.perplexity(dense, held), "parameters": count})
    for name in asked.scores:
        small, row = pruned(SCORES[name], asked, ids, held)
        if name == "gradients":
            speed |= speeds(dense, small, held, asked.rounds)
            print(speed)
        told(name, row)


def speeds(dense, small, held, rounds):
    seq = held[:1]
    forward = {"dense": lambda: dense(input_ids=seq), "pruned": lambda: small(input_ids=seq)}
    token = {"dense": lm.decoder(dense, seq[:, :32]), "pruned": lm.decoder(small, seq[:, :32])}
    found = {"forward of 64 tokens": lm.beside(forward, rounds), "one token of decoding": lm.beside(token, rounds)}
    return {what: {**each, "times as fast": each["dense"] / each["pruned"]} for what, each in found.items()}


def met(rows, speed):
    """What was aimed at, of the rows that are there."""
    own, found = rows.get("gradients"), {}
    for other in ("magnitude", "random"):
        if own and other in rows:
            found[f"better than {other}"] = own["perplexity"] < rows[other]["perplexity"]
    if own:
        found["masked is pruned, to 0.1 %"] = abs(own["masked"] / own["perplexity"] - 1) < 1e-3
    if speed:
        found["faster"] = all(each["times as fast"] > 1 for each in speed.values())
    return found


if __name__ == "__main__":
    main()
