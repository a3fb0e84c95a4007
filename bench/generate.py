"""Adapters that nobody trained, on eight tasks that no part of them has seen.

    python bench/generate.py --work build/generate --json bench/results/generate.json    # goes on with what WORK has
    python bench/generate.py --work build/small --experts 4 --tasks 2 --steps 2   # a miniature

WORK/tasks (`expert_tasks`) and WORK/library (`undula.generate.build`, 40 experts of MiniLM, LoRA r=2 at query and
value, 40 steps of 16 glosses each) are made once, and so are the oracles: the held-out tasks trained as experts are.
Two questions.  Without training: the accuracy on test glosses of
    base        the prompt head alone (the zero adapter)
    all         the mean of all experts, whatever is asked for
    nearest     the expert whose description is nearest
    mixture     the weighted mean of the K = 4 nearest (SG-LoRA without its network)
    sg-lora     SG-LoRA's network, z the prior's mean;  sg-lora drawn: z drawn
    icm-lora    ICM-LoRA's, from 30 unlabelled training rows, z = 0;  convolutions: in the published form, narrower
    oracle      trained there
and with 4, 16, 64 labelled rows (as many of each class): a few steps of AdamW from each of these starts.  Beside it
how far a generated adapter is from what was there before: a generator that answers every task alike has memorised the
mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import expert_tasks
import torch
from record import kept, mean, record
from torch import Tensor

import undula
from undula.core.adapter import Adapter
from undula.generate import ICMLoRA, Library, SGLoRA, build, icmlora, mixture, sglora
from undula.train.restored import Restored, restored
from undula.train.tasks.task import Examples

CHANNELS = (8, 16, 16, 32, 32, 32, 32, 32, 32, 16, 16, 8)  # a fourth of the published widths
SG = sglora.Options()
ICM = icmlora.Options()
CONVOLUTIONS = icmlora.Options(channels=CHANNELS, latent=64, steps=300, batch=8)
SHOTS, LR, BATCH, ROWS = (4, 16, 64), 2e-3, 16, 30
STARTS = ("base", "all", "nearest", "mixture", "sg-lora", "icm-lora")


def fitted(kind: Any, folder: Path, library: Library, options: Any) -> Any:
    """The generator that lies there, or a new one."""
    if (folder / "generator.json").is_file():
        there = kind.load(folder, library)
        if there.options != options:
            raise ValueError(f"{folder} was made with {there.options}, and {options} is asked for: name another --work")
        return there
    begun = time.process_time()
    made = kind.fit(library, options)
    made.save(folder)
    seconds = time.process_time() - begun
    (folder / "course.json").write_text(json.dumps({"cpu_seconds": round(seconds, 1), "losses": made.losses}))
    print(f"{folder.name}: loss {made.losses[0]:.4g} to {statistics.mean(made.losses[-20:]):.4g}, {seconds:.0f} s")
    return made


class Ways:
    """The numbers (D,) that each way has for a task."""

    def __init__(self, library: Library, work: Path):
        self.library = library
        self.sg = fitted(SGLoRA, work / "generators" / "sg-lora", library, SG)
        self.icm = fitted(ICMLoRA, work / "generators" / "icm-lora", library, ICM)
        self.convolutions = fitted(ICMLoRA, work / "generators" / "convolutions", library, CONVOLUTIONS)

    def of(self, description: str, rows: Sequence[str]) -> dict[str, Tensor]:
        query = self.library.embed([description])[0]
        return {
            "base": self.library.start, "all": self.library.means.mean(0),
            "nearest": mixture(self.library, query, k=1).mean, "mixture": mixture(self.library, query).mean,
            "sg-lora": self.sg.vector(query), "sg-lora drawn": self.sg.vector(query, seed=0),
            "icm-lora": self.icm.vector(rows), "convolutions": self.convolutions.vector(rows),
        }  # fmt: skip


def told(library: Library, vector: Tensor, mix: Tensor) -> dict[str, float]:
    """How far numbers are from the nearest expert, from the mixture and from the mean of all, each as a part of how far
    experts are from the mean of all (root of the mean square)."""
    middle = library.means.mean(0)
    unit = float((library.means - middle).square().sum(1).mean().sqrt())
    near = float((library.means - vector).norm(dim=1).min())
    return {"to_nearest": near / unit, "to_mixture": float((vector - mix).norm()) / unit,
            "to_mean": float((vector - middle).norm()) / unit}  # fmt: skip


def learned(opened: Restored, rows: Examples, steps: int) -> None:
    """AdamW, the rate falling to 0, in batches of at most 16 in their order."""
    model, adapter = opened.model, undula.selected(opened.model)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=LR, weight_decay=0.0)
    collate = rows.task.collator(rows.processor)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LR * (1 - step / steps)
        at = [(step * BATCH + i) % len(rows) for i in range(min(BATCH, len(rows)))]
        model(**collate([rows[i] for i in at])).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def few(rows: Examples, number: int, seed: int) -> Examples:
    """So many rows, as many of each class, drawn by the seed and mixed."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor(rows.rows["label"][:])
    count = int(labels.max()) + 1
    own = [(labels == c).nonzero()[:, 0] for c in range(count)]
    some = torch.cat([each[torch.randperm(len(each), generator=draw)[: number // count]] for each in own])
    return Examples(rows.task, rows.rows.select(some[torch.randperm(len(some), generator=draw)].tolist()),
                    rows.processor)  # fmt: skip


class Held:
    """A held-out task: its oracle opened, on whose model other adapters take turns."""

    def __init__(self, path: Path):
        self.opened = restored(path)
        self.test, self.train = (self.opened.examples(split=s, rows=10_000) for s in ("test", "train"))
        self.oracle = self.opened.adapter.copy()

    def wear(self, adapter: Adapter) -> None:
        undula.detach(self.opened.model)
        undula.attach(self.opened.model, adapter)

    def accuracy(self, adapter: Adapter | None = None) -> float:
        """On all test rows, of an adapter, or of what is on the model."""
        if adapter is not None:
            self.wear(adapter)
        return float(self.opened.run.task.score(self.opened.model, self.test, 64)["accuracy"])


def without_training(held: Held, ways: Ways, vectors: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    for way, vector in vectors.items():
        accuracy = held.accuracy(ways.library.layout.unpack(vector))
        yield {"way": way, "shots": 0, "accuracy": accuracy, **told(ways.library, vector, vectors["mixture"])}
    vector = ways.library.layout.pack(held.oracle)
    accuracy = held.accuracy(held.oracle)
    yield {"way": "oracle", "shots": 0, "accuracy": accuracy, **told(ways.library, vector, vectors["mixture"])}


def with_rows(held: Held, ways: Ways, vectors: dict[str, Tensor], number: int, seed: int, steps: int) -> Iterator[Any]:
    rows = few(held.train, number, seed)
    for way in STARTS:
        held.wear(ways.library.layout.unpack(vectors[way]))
        torch.manual_seed(seed)
        learned(held.opened, rows, steps)
        yield {"way": way, "shots": number, "seed": seed, "accuracy": held.accuracy()}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each way and number of rows the mean over the tasks (of each the mean over its seeds), the standard error over
    the tasks, and the same of the difference from `base`."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault((row["way"], row["shots"]), {}).setdefault(row["task"], []).append(row["accuracy"])
    means = {key: {task: statistics.mean(v) for task, v in own.items()} for key, own in found.items()}
    made = []
    for (way, shots), own in sorted(means.items(), key=lambda item: item[0][1]):
        base = means["base", shots]
        gain = mean([own[task] - base[task] for task in own])
        new = mean([v for task, v in own.items() if is_new(task)] or [math.nan])
        old = mean([v for task, v in own.items() if not is_new(task)] or [math.nan])
        value = mean(list(own.values()))
        made.append({"way": way, "shots": shots, "accuracy": value[0], "error": value[1], "over_base": gain[0],
                     "over_base_error": gain[1], "seen_classes": old[0], "unseen_classes": new[0]})  # fmt: skip
    return made


def is_new(task: str) -> bool:
    """Whether a task is of classes that no expert has seen."""
    return task.partition("-")[0] in expert_tasks.UNSEEN


def spread(library: Library, vectors: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Of each way how much its answers differ from task to task (root of the mean square from their mean), as a part of
    how much experts do: 0 is one answer for all."""
    unit = float((library.means - library.means.mean(0)).square().sum(1).mean().sqrt())
    found = {}
    for way in next(iter(vectors.values())):
        X = torch.stack([own[way] for own in vectors.values()])
        found[way] = float((X - X.mean(0)).square().sum(1).mean().sqrt()) / unit
    return found


def targets(made: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Whether generating beats what needs no network, by more than the standard error over the tasks."""
    by = {(row["way"], row["shots"]): row for row in made}
    zero, sg = {way: by[way, 0]["accuracy"] for way in (*STARTS, "oracle")}, by["sg-lora", 0]
    started = all(
        by["sg-lora", n]["over_base"] > by["sg-lora", n]["over_base_error"] for n in SHOTS if ("base", n) in by
    )
    return {
        "generated beats the base without training": sg["over_base"] > sg["over_base_error"],
        "generated beats the nearest expert": zero["sg-lora"] > zero["nearest"],
        "generated beats the weighted mean": zero["sg-lora"] > zero["mixture"],
        "a generated start is better than the base's": started,
    }  # fmt: skip


def tasks_of(args: argparse.Namespace) -> tuple[Path, list[expert_tasks.Made]]:
    folder = args.work / "tasks"
    library, held = expert_tasks.chosen() if folder.is_dir() else expert_tasks.write(folder)
    for name, tasks in (("library", library[: args.experts]), ("held-out", held[: args.tasks])):
        (folder / f"{name}.toml").write_text(expert_tasks.toml(tasks, folder / "data"), encoding="utf-8")
    return folder, held[: args.tasks]


def trained(folder: Path, work: Path) -> Library:
    """The library and the oracles, with what is there already."""
    if not (work / "library" / "library.json").is_file():
        build(folder / "library.toml", work / "library", resume=(work / "library").is_dir())
    if not (work / "oracles" / "library.json").is_file():
        build(folder / "held-out.toml", work / "oracles", resume=(work / "oracles").is_dir())
    return Library.load(work / "library")


def run(args: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]) -> dict[str, Any]:
    begun = time.process_time()
    folder, held_out = tasks_of(args)
    library = trained(folder, args.work)
    print(f"library and oracles: {time.process_time() - begun:.0f} s of CPU")
    ways = Ways(library, args.work)
    held = {task.name: Held(args.work / "oracles" / "experts" / task.name) for task in held_out}
    vectors = {task.name: ways.of(task.description, held[task.name].train.rows["text"][:ROWS]) for task in held_out}
    rows = kept(args.work / "rows.json", how(args))
    for number, seed in ((0, 0), *itertools.product(SHOTS, args.seeds)):  # so that what is there is of all tasks
        for name, own in held.items():
            if any((row["task"], row["shots"], row.get("seed", 0)) == (name, number, seed) for row in rows):
                continue
            found = (
                with_rows(own, ways, vectors[name], number, seed, args.steps)
                if number
                else without_training(own, ways, vectors[name])
            )
            new = [{"task": name, "test_rows": len(own.test), **row} for row in found]
            rows += new
            keep(rows)
            print(name, number, {row["way"]: row["accuracy"] for row in new}, flush=True)
    made = summary(rows)
    return {**how(args), "cpu_seconds_of_the_last_part": round(time.process_time() - begun),
            "targets_met": targets(made), "summary": made,
            "spread": spread(library, vectors), "rows": rows}  # fmt: skip


def how(args: argparse.Namespace) -> dict[str, Any]:
    return {"experts": args.experts, "steps": args.steps, "lr": LR, "batch": BATCH, "icm_rows": ROWS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--experts", type=int, default=40, help="how many of the library's tasks")
    parser.add_argument("--tasks", type=int, default=8, help="how many of the held-out ones")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="of the rows to train on; none: no training")
    parser.add_argument("--steps", type=int, default=12, help="of the fine-tuning")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = run(args, lambda rows: record(args.work / "rows.json", {**how(args), "rows": rows}))
    for row in made["summary"]:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    print(made["spread"], made["targets_met"])
    if args.json:
        record(args.json, made)


if __name__ == "__main__":
    main()
