"""LoRAPrune on SmolLM2-135M against pruning by magnitude and by chance: perplexity.  (Speed: smaller_speed.py.)

    python bench/prune_base.py --json bench/results/prune-base.json

One thread.  All train the same LoRA on the same sequences for the same steps, with the same schedule, on the base in
bfloat16 (a step takes three quarters of the time in float32 where the machine multiplies in bfloat16); what they go by
differs.  Perplexity is on held-out Python functions, computed in float32; that of the untouched model, in both types of
its weights, and that of the LoRA alone stand beside.
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
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def trained(asked, ids, how=None):
    """The model with a LoRA, trained, pruned as `how` says."""
    torch.manual_seed(0)
    model = lm.model().to(TYPES[asked.dtype])
    adapter = undula.attach(model, undula.LoRA(r=8))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=asked.lr, weight_decay=0.0)
    course = how.start(model, optimizer, asked.steps) if how is not None else None
    lm.learn(model, adapter.parameters(), ids, asked.steps, asked.lr, course)
    if course is not None:
        course.finish()
    return model.float()


def pruned(scores, sparsity, asked, ids, held):
    """The row of a smaller model."""
    model = trained(asked, ids, LoRAPrune(sparsity, scores=scores, every=max(1, asked.steps // 20)))
    masked = lm.perplexity(model, held)
    made = prune_base(model)
    undula.merge(model, keep=False)
    row = {"perplexity": lm.perplexity(model, held), "masked": masked, "parameters": made.after}
    return row | {kind: list(counts) for kind, counts in made.structures.items()}


def references(asked, ids, held):
    """Rows that no pruning is in, one at a time."""
    model = lm.model()
    count = sum(p.numel() for p in model.parameters())
    yield "untouched", lambda: {"perplexity": lm.perplexity(model, held), "parameters": count}
    yield "untouched, rounded to bfloat16", lambda: {"perplexity": lm.perplexity(model.bfloat16().float(), held)}
    yield "LoRA alone", lambda: {"perplexity": lm.perplexity(trained(asked, ids), held)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=list(TYPES), default="bfloat16", help="of the base while it trains")
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--json", type=Path, help="written after each row; rows of the same settings in it stay")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ids, held = lm.sequences("train", max(lm.BATCH * asked.steps, 8)), lm.sequences("test", lm.HELD)
    said = {"steps": asked.steps, "tokens_in_a_step": lm.BATCH * lm.LENGTH, "lr": asked.lr, "dtype": asked.dtype,
            "threads": 1, "held_tokens": held.numel()}  # fmt: skip
    kept = json.loads(asked.json.read_text()) if asked.json and asked.json.is_file() else {}
    same = all(kept.get(name) == value for name, value in said.items())
    rows = kept["rows"] if same else {}

    def told(name, row):
        rows[name] = row
        print(name, row, flush=True)
        if asked.json:
            record(asked.json, {**said, "rows": rows, "targets_met": met(rows)})

    for name, row in references(asked, ids, held):
        if name not in rows:
            told(name, row())
    for name in asked.scores:
        for sparsity in asked.sparsity:
            if (called := f"{sparsity:.0%} by {name}") not in rows:
                row = pruned(SCORES[name], sparsity, asked, ids, held)
                told(called, row)


def met(rows):
    """What was aimed at, of the rows that are there."""
    found = {}
    for name, own in rows.items():
        share, _, scores = name.partition(" by ")
        if scores != "gradients":
            continue
        for other in ("magnitude", "random"):
            if (row := rows.get(f"{share} by {other}")) is not None:
                found[f"{share}: better than {other}"] = own["perplexity"] < row["perplexity"]
        found[f"{share}: masked is pruned, to 0.1 %"] = abs(own["masked"] / own["perplexity"] - 1) < 1e-3
    return found


if __name__ == "__main__":
    main()
