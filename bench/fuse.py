"""Three found adapters for a task that none was trained on, fused: gates on few rows, against averages and PEFT.

    python bench/fuse.py --library build/library --tasks build/tasks --json bench/results/fuse.json

The three whose descriptions are nearest (`undula find`).  Of each held-out task and seed, 16 rows to train on and 200
to test; classes are told by their descriptions, no head trains, and every step sees all 16 rows.

    base, found        no adapter; the nearest one as it is
    best of three      the one of the three that is best on the 16 rows
    average, sum, ties `undula.combine.named`, no training
    arrow              PEFT's Arrow (top 3), no training
    gates              `undula.combine.fused`: 5 vectors a layer train (AutoLoRA)
    ... the average    the same, where the gates start at the average: w_out = 2 / 3
    x-lora             PEFT's X-LoRA: a classifier over the last states gives each adapter its weight; frozen adapters
    lora               a new LoRA of rank 2 on the same rows, and nothing found
    own                an adapter of the task itself, where OWN holds one: what training on all its rows gives

Rates of the three that train are chosen on two tasks of the library, with adapters that were not trained on them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from experts import Encoder, Task, classes_of, expert, renamed, tasks
from record import mean, once, record, tell
from torch import Tensor

import undula
from undula import combine, retrieve

SHOTS, TEST, STEPS, FOUND = 16, 200, 30, 3
RATES = {"gates": (1e-2, 1e-1), "x-lora": (1e-3, 1e-2), "lora": (1e-3, 5e-3)}
Row = tuple[str, int]


def trained(encoder: Encoder, parameters: list[Tensor], rows: list[Row], classes: Tensor, lr: float) -> None:
    """So many steps of AdamW on all rows."""
    tokens, labels = encoder.tokens([t for t, _ in rows]), torch.tensor([c for _, c in rows])
    optimiser = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    for _ in range(STEPS):
        loss = F.cross_entropy(20 * encoder.vectors(tokens) @ classes.T, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


class Try:
    """One task and seed with three adapters."""

    def __init__(self, encoder: Encoder, task: Task, found: list[undula.Adapter], seed: int, tests: int = TEST):
        self.encoder, self.task, self.found = encoder, task, found
        self.classes = classes_of(task)
        self.rows, self.tests = task.some("train", SHOTS, seed), task.some("test", tests)
        self.seed = seed

    def score(self, adapter: undula.Adapter | None, lr: float | None = None, rows: list[Row] | None = None) -> float:
        """The accuracy of a value on the test rows; trained before where there is a rate."""
        if adapter is not None:
            live = undula.attach(self.encoder.model, adapter)
            if lr is not None:
                trained(self.encoder, live.parameters(), self.rows, self.classes, lr)
        try:
            return self.encoder.accuracy(self.task, rows or self.tests, self.classes)
        finally:
            if adapter is not None:
                undula.detach(self.encoder.model)

    def best(self) -> float:
        on_rows = [self.score(a, rows=self.rows) for a in self.found]
        return self.score(self.found[on_rows.index(max(on_rows))])

    def combined(self, name: str) -> float:
        return self.score(combine.named(name)(self.found))

    def gates(self, lr: float, share: float = 1.0) -> float:
        """From this share of the sum on."""
        return self.score(combine.fused(self.found, share=share), lr)

    def lora(self, lr: float) -> float:
        torch.manual_seed(self.seed)
        live = undula.attach(self.encoder.model, undula.LoRA(r=2, alpha=16.0), ["query", "value"])
        value = live.copy()
        undula.detach(self.encoder.model)
        return self.score(value, lr)

    def by_peft(self, make: Callable[[Any, list[str]], Any], lr: float | None = None) -> float:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paths = []
            for i, adapter in enumerate(self.found):
                undula.io.export_lora(renamed(adapter, lambda site: f"model.{site}"), Path(folder) / str(i))
                paths.append(str(Path(folder) / str(i)))
            other = copy.copy(self.encoder)
            torch.manual_seed(self.seed)
            other.model = make(Holder(copy.deepcopy(self.encoder.model)), paths)
        if lr is not None:
            moving = [p for p in other.model.parameters() if p.requires_grad]
            trained(other, moving, self.rows, self.classes, lr)
        return other.accuracy(self.task, self.tests, self.classes)


class Holder(torch.nn.Module):
    """The encoder as `model`: X-LoRA takes the names of its layers to begin so."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.model(*args, **named)


def arrow(model: Any, paths: list[str]) -> Any:
    from peft import ArrowConfig, create_arrow_model

    return create_arrow_model(model, paths, ArrowConfig(top_k=FOUND)).eval()


def x_lora(model: Any, paths: list[str]) -> Any:
    from peft import XLoraConfig, get_peft_model

    said = XLoraConfig(
        hidden_size=model.config.hidden_size, adapters={str(i): p for i, p in enumerate(paths)}, xlora_depth=1,
        layerwise_scalings=True,
    )  # fmt: skip
    return get_peft_model(model, said).eval()


def arms(one: Try, rates: dict[str, float], own: Path | None) -> dict[str, Callable[[], float]]:
    made: dict[str, Callable[[], float]] = {
        "base": lambda: one.score(None),
        "found": lambda: one.score(one.found[0]),
        "best of three": one.best,
        "average": lambda: one.combined("average"),
        "sum": lambda: one.combined("stack"),
        "ties": lambda: one.combined("ties"),
        "arrow": lambda: one.by_peft(arrow),
        "gates": lambda: one.gates(rates["gates"]),
        "gates from the average": lambda: one.gates(rates["gates"], 1 / FOUND),
        "x-lora": lambda: one.by_peft(x_lora, rates["x-lora"]),
        "lora": lambda: one.lora(rates["lora"]),
    }
    if own is not None and (own / one.task.name).is_dir():
        made["own"] = lambda: one.score(expert(own / one.task.name))
    return made


def nearest(index: retrieve.Index, root: Path, task: Task, but: tuple[str, ...] = ()) -> list[undula.Adapter]:
    ranked = retrieve.ranked(index, retrieve.question(task.description), by="text")
    return [expert(root / f.name) for f in ranked if f.name not in but][:FOUND]


def chosen(encoder: Encoder, index: retrieve.Index, root: Path, known: list[Task]) -> dict[str, Any]:
    """{arm: {rate: mean accuracy}} on tasks of the library, without their own adapters."""
    found: dict[str, Any] = {name: dict.fromkeys(rates, 0.0) for name, rates in RATES.items()}
    for task in known:
        one = Try(encoder, task, nearest(index, root, task, (task.name,)), 0, 100)
        for name, rates in RATES.items():
            for lr in rates:
                found[name][lr] += arms(one, {name: lr}, None)[name]() / len(known)
    return found


def timed(work: Callable[[], float]) -> dict[str, float]:
    begun = time.process_time()
    return {"accuracy": work(), "cpu seconds": time.process_time() - begun}


def run(library: Path, folder: Path, own: Path | None, held: int, seeds: int, work: Path) -> dict[str, Any]:
    root, encoder = library / "experts", Encoder()
    index = retrieve.update(root, work / "index.safetensors")
    known = tasks(folder / "library.toml")
    how = {"shots": SHOTS, "steps": STEPS, "test rows": TEST, "found": FOUND, "tried rates": RATES,
           "experts": [e.name for e in index.entries]}  # fmt: skip
    tried = once(work / "rates.json", how, lambda: chosen(encoder, index, root, [known[0], known[len(known) // 2]]))
    rates = {name: float(max(found, key=lambda lr: found[lr])) for name, found in tried.items()}
    rows = []
    for task in tasks(folder / "held-out.toml")[:held]:
        found = nearest(index, root, task)
        for seed in range(seeds):
            for name, arm in arms(Try(encoder, task, found, seed), rates, own).items():
                done = once(work / f"{task.name}-{seed}-{name}.json", how, lambda arm=arm: timed(arm))
                rows.append({"arm": name, "task": task.name, "seed": seed, **done})
                print(rows[-1], flush=True)
    return {"rates": rates, "tried": tried, "rows": rows, "shots": SHOTS,
            "steps": STEPS, "test rows": TEST}  # fmt: skip


def paired(found: dict[str, Any], one: str, other: str) -> tuple[float, float]:
    """(mean over tasks of the difference in accuracy, its standard error)."""
    by_task: dict[str, list[float]] = {}
    of = {(r["arm"], r["task"], r["seed"]): r["accuracy"] for r in found["rows"]}
    for (arm, task, seed), value in of.items():
        if arm == one:
            by_task.setdefault(task, []).append(value - of[other, task, seed])
    return mean([statistics.mean(v) for v in by_task.values()])


def table(found: dict[str, Any]) -> str:
    lines = ["| way | accuracy | against the average | CPU seconds |", "|---|---:|---:|---:|"]
    for arm in dict.fromkeys(r["arm"] for r in found["rows"]):
        own = [r for r in found["rows"] if r["arm"] == arm]
        gain, error = paired(found, arm, "average")
        accuracy, took = (statistics.mean(r[k] for r in own) for k in ("accuracy", "cpu seconds"))
        lines.append(f"| {arm} | {accuracy:.3f} | {gain:+.3f} ± {error:.3f} | {took:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True, help="the folder of bench/expert_tasks.py")
    parser.add_argument("--own", type=Path, help="a folder with adapters of the held-out tasks themselves")
    parser.add_argument("--held", type=int, default=8, help="tasks")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keep what is done here (default: LIBRARY/fused)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = given.work or given.library / "fused"
    work.mkdir(parents=True, exist_ok=True)
    found = run(given.library, given.tasks, given.own, given.held, given.seeds, work)
    gain = {
        other: paired(found, "gates", other)[0] for other in ("average", "best of three", "ties", "x-lora", "arrow")
    }
    found["targets"] = {f"accuracy of gates over {other}'s > 0": value for other, value in gain.items()}
    found["targets_met"] = {what: value > 0 for what, value in found["targets"].items()}
    print(table(found))
    tell(found["targets"], found["targets_met"])
    if given.json:
        record(given.json, found, f"python bench/fuse.py --library LIBRARY --tasks TASKS --json {given.json}")
    sys.exit(0 if all(found["targets_met"].values()) else 1)


if __name__ == "__main__":
    main()
