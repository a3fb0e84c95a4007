"""When does a nonlinear adapter pay?  What few trained numbers can hold of a matrix.

    python bench/capacity.py --json bench/results/capacity-planted.json       # three minutes of one core
    python bench/capacity.py --ranks 1 --methods LoRA "LoRAN, learnable" --seeds 0

A matrix (64, 64) is to become W + D, D random and so of full rank: the figure is the share of |D|^2 that is reached,
beside the truncated singular value decomposition's, the most that an update of rank r can.  AuroRA's B h(x) has that
rank too, whatever h is; methods that bend the product itself may have more.

Ranks 1, 2 and 4; every method has as many trained numbers as LoRA of that rank, or as near as its form allows (told in
each row).  Rates are swept on the first seed, and the best serves the others.  Rows that the file holds are not made
again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import Tensor, nn

import undula

VISIBLE = {"is": "sinter", "a": 0.02, "w": 300.0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {}),
    "rsLoRA": ("lora", {"scaling": "rank-stabilised"}),
    "Sine-LoRA": ("sine-lora", {}),
    "LoRAN, visible": ("loran", {"activation": VISIBLE}),
    "LoRAN, learnable": ("loran", {"learn": ["a", "w"]}),
    "AuroRA": ("aurora", {}),
    "VeRA": ("vera", {}),
}
RATES = (1e-2, 3e-2, 1e-1)


def method_of(name: str, r: int, rows: int) -> undula.Method:
    """At rank r; VeRA's rank so that its r + O numbers a layer of O = `rows` outputs are LoRA's 2 r O."""
    kind, options = METHODS[name]
    if name == "VeRA":
        return undula.Method.build(kind, {"r": max(1, (2 * r - 1) * rows)})
    return undula.Method.build(kind, {"r": r, "alpha": 2 * r, **options})


def trained(adapter: undula.Adapter, loss: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """AdamW along `loss(step)`, its rate falling to zero."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        loss(step).backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def planted(name: str, r: int, size: int, seed: int, lr: float, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    D = torch.randn(size, size) / size**0.5
    W = model[0].weight.detach().clone()
    adapter = undula.attach(model, method_of(name, r, size), "*")
    one = torch.eye(size)
    trained(adapter, lambda _: (model(one).T - W - D).square().sum(), steps, lr)
    with torch.no_grad():
        left = (model(one).T - W - D).square().sum() / D.square().sum()
    most = torch.linalg.svdvals(D).square()
    bound = float(most[:r].sum() / most.sum())
    return {"score": float(1 - left), "linear_bound": bound, "trained": adapter.num_parameters()}


def made(args: argparse.Namespace, there: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each (method, rank, seed) that is not there; the first seed's tells its sweep."""
    kept = {(r["method"], r["r"], r["seed"]): r for r in there}
    for r in args.ranks:
        for name in args.methods:
            best: float | None = None
            for seed in args.seeds:
                row = kept.get((name, r, seed))
                if row is None:
                    rates = RATES if best is None else (best,)
                    tried = {lr: planted(name, r, args.size, seed, lr, args.steps) for lr in rates}
                    lr = max(tried, key=lambda rate: tried[rate]["score"])
                    swept = {f"{rate:g}": t["score"] for rate, t in tried.items()} if best is None else {}
                    yield (row := {"method": name, "r": r, "seed": seed, "lr": lr, **tried[lr], "swept": swept})
                best = row["lr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    there = args.json is not None and args.json.is_file()
    rows: list[dict[str, Any]] = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if there else []
    for row in made(args, list(rows)):
        rows.append(row)
        print(row, flush=True)
        if args.json:
            record(args.json, {"size": args.size, "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
