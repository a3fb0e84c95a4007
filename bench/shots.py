"""Few shots for a two-tower model: Block-LoRA beside LoRA, with and without SAM's gradient as a reference.

    python bench/shots.py --work runs/shots --json bench/results/few-shot.json     # about 40 minutes of one core
    python bench/shots.py --work runs/shots --quick                                # a miniature, to see that it runs
    python bench/shots.py --json bench/results/few-shot.json --table --plot docs/few-shot.svg    # makes nothing

The model is the stand-in for CLIP of towers.py, the pictures are those of pictures.py.  As for CLIP, five classes are
taught by 1, 2, 4, 8 or 16 pictures of each, cross-entropy over their prompts, and then five taught and five new classes
are told apart, each among themselves, with their prompts and no head.  The figure is the harmonic mean of both
accuracies.  WORK keeps the bridge between the towers; rows that JSON holds are not made again.

A sweep tries rates, and for SAM its rho, on validation pictures of Fashion-MNIST (4 shots, draws of their own).  Chosen
is, for each method and optimiser, what is best on taught classes; no new class, no emoji and no test picture chooses
a rate.  As the rate decides more than the method, arms are measured at two rates, among them the chosen ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pictures
import torch
import torch.nn.functional as F
from record import kept, record
from shots_report import ARMS, FAST, METHODS, OPTIMISERS, RHO, SETS, SHOTS, SLOW, judged, plot, table
from torch import Tensor
from towers import Begun, Towers, tokens, towers

import undula
from undula.optim.sam import SAMReference, mixed, without_conflict

TAUGHT, BATCH, SWEEP_SHOTS = 5, 16, 4
MADE = {
    "lora": undula.LoRA(r=8, alpha=8.0),
    "block-2": undula.BlockLoRA(r=8, blocks=2, alpha=8.0),
    "block-4": undula.BlockLoRA(r=8, blocks=4, alpha=8.0),
}
KEY = ("kind", "set", "shots", "method", "optimiser", "seed", "lr", "rho")


@dataclass(frozen=True)
class Size:
    steps: int = 24
    images: tuple[int, int, int] = (64, 40, 45)  # of a class of Fashion-MNIST: to draw from, validation, test
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    rhos: tuple[float, ...] = (0.05, 0.5)
    draws: tuple[int, ...] = (100, 101)  # of the choice of rates


QUICK = Size(1, (16, 4, 4), (0,), (1e-3,), (0.5,), (100,))


@dataclass(frozen=True)
class Seen:
    """A set as the frozen beginning of the image tower gives it, its labels, and the prompts of both halves."""

    parts: dict[str, tuple[Tensor, Tensor]]
    prompts: tuple[Begun, Begun]

    def split(self, seed: int, shots: int) -> dict[str, tuple[Tensor, Tensor]]:
        """`taught`: so many of each taught class, those of fewer shots among them; `base` and `new`: to be told."""
        draws, train, test = torch.Generator().manual_seed(seed), [], []
        x, y = self.parts.get("all", self.parts.get("train"))  # type: ignore[misc]
        for k in range(TAUGHT):
            own = (y == k).nonzero()[:, 0]
            own = own[torch.randperm(len(own), generator=draws)]
            train.append(own[:shots])
            test.append(own[max(SHOTS) :])
        there = {"taught": (x[torch.cat(train)], y[torch.cat(train)])}
        if "all" in self.parts:
            there["base"] = x[torch.cat(test)], y[torch.cat(test)]
        else:
            x, y = self.parts["test"]
            there["base"] = x[y < TAUGHT], y[y < TAUGHT]
        return there | {"new": (x[y >= TAUGHT], y[y >= TAUGHT] - TAUGHT)}


def seen(name: str, model: Towers, each: tuple[int, int, int]) -> Seen:
    made = pictures.fashion(*each) if name == "fashion" else pictures.emoji()
    parts = {p: (torch.cat([model.early(b) for b in x.split(32)]), y) for p, (x, y) in made.parts.items()}
    taught, new = (model.begin(tokens(p)) for p in (made.prompts[:TAUGHT], made.prompts[TAUGHT:]))
    return Seen(parts, (taught, new))


def optimiser(name: str, groups: Any, model: Towers, lr: float, rho: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    steer = mixed(0.5) if name == "sam" else without_conflict
    return SAMReference(groups, model, rho=rho, steer=steer, lr=lr, weight_decay=0.0)


def learn(
    model: Towers,
    optimizer: torch.optim.Optimizer,
    rows: tuple[Tensor, Tensor],
    prompts: Begun,
    steps: int,
    seed: int,
) -> None:
    """Each step has up to BATCH rows, in an order that begins anew when all were there; rates fall to zero."""
    x, y = rows
    draws, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        if len(order) < min(BATCH, len(y)):
            order = torch.randperm(len(y), generator=draws)
        at, order = order[:BATCH], order[BATCH:]

        def closure(at: Tensor = at) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[at], prompts), y[at])
            loss.backward()
            return loss

        optimizer.step(closure)
        schedule.step()


@torch.no_grad()
def right(model: Towers, rows: tuple[Tensor, Tensor], prompts: Begun) -> float:
    read = model.read(prompts)
    told = torch.cat([(model.look(x) @ read.T).argmax(1) for x in rows[0].split(64)])
    return float((told == rows[1]).double().mean())


def measured(model: Towers, data: Seen, split: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    base, new = (right(model, split[k], p) for k, p in zip(("base", "new"), data.prompts, strict=True))
    return {"base": base, "new": new, "H": 2 * base * new / max(base + new, 1e-12)}


def trained(model: Towers, data: Seen, how: dict[str, Any], steps: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Leaves the adapter on the model; returns the split that it learnt from."""
    split = data.split(how["seed"], how["shots"])
    torch.manual_seed(how["seed"])
    adapter = undula.attach(model, MADE[how["method"]], model.late_layers())
    optimizer = optimiser(how["optimiser"], adapter.parameters(), model, how["lr"], how["rho"])
    learn(model, optimizer, split["taught"], data.prompts[0], steps, how["seed"])
    return split


def row(model: Towers, data: Seen, how: dict[str, Any], steps: int) -> dict[str, Any]:
    begun = time.process_time()
    try:
        split = trained(model, data, how, steps)
        taught = time.process_time() - begun
        if how["kind"] == "sweep":
            x, y = data.parts["validation"]
            split = {"base": (x[y < TAUGHT], y[y < TAUGHT]), "new": (x[y >= TAUGHT], y[y >= TAUGHT] - TAUGHT)}
        found = measured(model, data, split)
    finally:
        undula.detach(model)
    return {**how, **found, "cpu_seconds": round(taught, 2)}


def twin(model: Towers, data: Seen, steps: int, lr: float) -> float:
    """The largest difference of a logit between Block-LoRA of 4 blocks and LoRA of rank 2 with B's rate times 4."""
    split, logits, start = data.split(0, SWEEP_SHOTS), [], {}
    blocked = MADE["block-4"]
    narrow = undula.LoRA(r=2, alpha=2.0)
    for method in (blocked, narrow):
        torch.manual_seed(0)
        adapter = undula.attach(model, method, model.late_layers())
        with torch.no_grad():
            for site, f in adapter.factors.items():
                f["A"].copy_(start.setdefault(site, f["A"].detach().clone()))
        groups = [{"params": [f[k] for f in adapter.factors.values()]} for k in "AB"]
        groups[1]["lr"] = lr * (4 if method is narrow else 1)
        learn(model, optimiser("adamw", groups, model, lr, 0.0), split["taught"], data.prompts[0], steps, 0)
        with torch.no_grad():
            logits.append(model(split["new"][0], data.prompts[1]))
        undula.detach(model)
    return float((logits[0] - logits[1]).abs().max())


def conflicts(model: Towers, data: Seen, size: Size, rho: float) -> float:
    """The share of LoRA's steps in which the gradient goes against SAM's: where `conflict` does anything."""
    against: list[bool] = []

    def counted(g: list[Tensor], g_s: list[Tensor]) -> list[Tensor]:
        against.append(sum(float((a * b).sum()) for a, b in zip(g, g_s, strict=True)) < 0)
        return without_conflict(g, g_s)

    adapter = undula.attach(model, MADE["lora"], model.late_layers())
    lr = FAST
    optimizer = SAMReference(adapter.parameters(), model, rho=rho, steer=counted, lr=lr, weight_decay=0.0)
    learn(model, optimizer, data.split(0, SWEEP_SHOTS)["taught"], data.prompts[0], size.steps, 0)
    undula.detach(model)
    return sum(against) / len(against)


def wanted(sets: list[str], shots: list[int], size: Size) -> Iterator[dict[str, Any]]:
    """1 and 16 shots of all seeds first."""
    for some in ((1, 16), (4,), (2, 8)):
        here = [k for k in some if k in shots]
        for seed, name, number, (method, how, lr) in itertools.product(size.seeds, sets, here, ARMS):
            yield {"kind": "row", "set": name, "shots": number, "method": method, "optimiser": how, "seed": seed,
                   "lr": lr, "rho": RHO if how == "sam" else 0.0}  # fmt: skip


def sweep(size: Size) -> Iterator[dict[str, Any]]:
    for method, how, lr, seed in itertools.product(METHODS, OPTIMISERS, size.rates, size.draws):
        for rho in (0.0,) if how == "adamw" else size.rhos:
            yield {"kind": "sweep", "set": "fashion", "shots": SWEEP_SHOTS, "method": method, "optimiser": how,
                   "seed": seed, "lr": lr, "rho": rho}  # fmt: skip


def choice(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{method and optimiser: the rate and rho} with the best mean on validation pictures; of equals the least."""
    found = {}
    for method, how in itertools.product(METHODS, OPTIMISERS):
        own = [r for r in rows if r["kind"] == "sweep" and (r["method"], r["optimiser"]) == (method, how)]
        score = {(r["lr"], r["rho"]): 0.0 for r in own}
        for r in own:
            score[r["lr"], r["rho"]] += r["base"]
        lr, rho = max(sorted(score), key=lambda at: score[at])
        found[f"{method} {how}"] = {"lr": lr, "rho": rho}
    return found


def run(work: Path, json_file: Path | None, sets: list[str], shots: list[int], size: Size) -> dict[str, Any]:
    """Makes the rows that are not there, keeping each as it comes."""
    how = {"steps": size.steps, "images": list(size.images)}
    rows = kept(json_file, how)
    model, bridge = towers(work)
    data = {name: seen(name, model, size.images) for name in sets}
    zero = {name: {str(s): measured(model, d, d.split(s, 1)) for s in size.seeds} for name, d in data.items()}
    first = {**how, "bridge": bridge, "zero_shot": zero}

    def make(these: Iterator[dict[str, Any]]) -> None:
        there = {tuple(r[k] for k in KEY) for r in rows}
        for one in these:
            if tuple(one[k] for k in KEY) in there:
                continue
            rows.append(row(model, data[one["set"]], one, size.steps))
            print(*rows[-1].values(), flush=True)
            if json_file:
                record(json_file, {**first, "rows": rows})

    make(sweep(size))
    chosen = choice(rows)
    make(wanted(sets, shots, size))
    seen_of = data["fashion"]
    opposed = {str(rho): conflicts(model, seen_of, size, rho) for rho in size.rhos}
    apart = twin(model, seen_of, size.steps, SLOW)
    return {**first, "chosen": chosen, "twin": apart, "opposed": opposed, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/shots"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS), help="fashion is always one of them")
    parser.add_argument("--shots", nargs="+", type=int, choices=SHOTS, default=list(SHOTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(Size().seeds))
    parser.add_argument("--quick", action="store_true", help="one step, one seed, Fashion-MNIST alone")
    parser.add_argument("--table", action="store_true", help="print what is there, and make nothing")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table:
        found = json.loads(args.json.read_text(encoding="utf-8"))
    else:
        size, sets = (QUICK, ["fashion"]) if args.quick else (Size(seeds=tuple(args.seeds)), args.sets)
        found = run(args.work, args.json, sets, args.shots, size)
        found |= judged(found)
        if args.json:
            record(args.json, found)
    print("\n".join(table(found)))
    for what, met in found.get("met", found["targets_met"]).items():
        print(f"{'met   ' if met else 'MISSED'} {what}")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
