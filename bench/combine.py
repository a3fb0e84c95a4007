"""Four adapters of four real tasks as one, by every way to combine: how much of each task is left?

    python bench/combine.py --work runs/combine --json bench/results/combine.json --plot docs/combine.svg
    python bench/combine.py --quick                                    # to see that it runs
    python bench/combine.py --table                                    # writes docs/combine.md's table

With --work the adapters and each row are kept as they come, and a run that was stopped goes on from there.

MiniLM, a LoRA of rank 8 at every linear layer and a head for each task, each trained from its own seed: the kind of a
word's definition (WordNet), the section of a package (Debian), a review's verdict (Rotten Tomatoes), and whether a
summary is that of a package's description (Debian).  The four updates become one body; each task is measured with that
body and its own head.  Bounds: the single adapters above, the base with the same heads below, and beside them one
adapter trained on the rows of all four tasks with one head over all their classes, of which each task takes its own;
its learning rate is the one of two that is better on the validation rows (at the single adapters' it learns nothing),
its head has a higher one of its own (at the body's it is still learning its 44 classes when the run ends).

What a way leaves open is one number, the sum of the weights (the update's size), chosen on validation rows from 1, 2
and 4; averages and what normalises has none.  Every way is measured at the rank that it gives (at most 4 x 8) and, with
the same weights, kept at rank 8.  The share is sum(accuracy - base) / sum(single - base), over the tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import record, tell

import undula
from undula import bundled, combine
from undula.combine.merge import Merge
from undula.train import Classification, Run, restored
from undula.train.run import REPORT

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench/results/combine.json", ROOT / "docs/combine.md"
BEGIN, END = "<!-- combine: written by bench/combine.py -->", "<!-- end of combine -->"
TASKS = ("wordnet", "section", "reviews", "match")
SUMS = (1.0, 2.0, 4.0)
RANK = 8
RATE, RATES, HEAD_RATE = 2e-3, (5e-4, 1e-3), 2e-2  # of a single task's adapter; of the one of all tasks, and its head


@dataclass(frozen=True)
class Size:
    train: int
    validation: int
    test: int
    epochs: float
    batch: int = 16


FULL, SHORT, QUICK = Size(1000, 60, 200, 2.0), Size(400, 48, 150, 2.0, 32), Size(64, 8, 8, 1.0)


def rows_of(task: str) -> dict[str, list[dict[str, Any]]]:
    """{split: rows {text, label}} of a task."""
    if task != "match":
        name = {"wordnet": "wordnet", "section": "debian-section", "reviews": "rotten-tomatoes"}[task]
        data = bundled.dataset(name)
        names = data["train"].features["label"].names
        return {s: [{"text": r["text"], "label": names[r["label"]]} for r in part] for s, part in data.items()}
    made = {}
    for split, part in bundled.dataset("debian-synopsis").items():
        draw, pairs = random.Random(split), list(part)
        made[split] = [
            {
                "text": f"{(row if right else draw.choice(pairs))['summary']}: {' '.join(row['text'].split()[:12])}",
                "label": "right" if right else "wrong",
            }
            for row in pairs
            for right in (draw.random() < 0.5,)
        ]
    return made


def files_of(folder: Path, size: Size) -> dict[str, Path]:
    """{task: a folder with its rows}, and one with the rows of all under `all`, whose labels name their task."""
    counts = {"train": size.train, "validation": size.validation, "test": size.test}
    mixed: dict[str, list[dict[str, Any]]] = {split: [] for split in counts}
    for task in TASKS:
        rows = rows_of(task)
        for split, n in counts.items():
            some = rows[split][:n]
            write(folder / task / f"{split}.jsonl", some)
            mixed[split] += [{"text": r["text"], "label": f"{task}/{r['label']}"} for r in some]
    for split, rows in mixed.items():
        random.Random(0).shuffle(rows)
        write(folder / "all" / f"{split}.jsonl", rows)
    return {task: folder / task for task in (*TASKS, "all")}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def trained(
    folder: Path, data: Path, task: str, seed: int, size: Size, lr: float = RATE, head_lr: float | None = None
) -> Path:
    """The directory of an adapter, which is trained where it is not there yet."""
    out, names = folder / f"adapter-{task}-{lr:g}", set()
    if (out / REPORT).is_file():
        return out
    for split in ("train", "validation", "test"):  # a class may be in one of them alone
        names |= {json.loads(line)["label"] for line in (data / f"{split}.jsonl").read_text().splitlines()}
    task_of = Classification(names=tuple(sorted(names)))
    run = Run(
        model="bundled:minilm", data=str(data), task=task_of, method=undula.LoRA(r=RANK), where="all-linear",
        lr=lr, head_lr=head_lr, batch=size.batch, epochs=size.epochs, eval_every=0, seed=seed, out=out,
    )  # fmt: skip
    undula.train(run)
    return out


class Tasks:
    """The four tasks, each on the base with its own head, and what a body reaches on them."""

    def __init__(self, paths: dict[str, Path], size: Size):
        self.opened = {task: restored(paths[task]) for task in TASKS}
        self.whole = {task: o.adapter.copy() for task, o in self.opened.items()}
        self.bodies = [replace(a, full={}, about={}) for a in self.whole.values()]
        self.examples = {
            split: {t: o.examples(None, split, n) for t, o in self.opened.items()}
            for split, n in (("validation", size.validation), ("test", size.test))
        }

    def accuracy(self, bodies: dict[str, undula.Adapter], split: str) -> dict[str, float]:
        found = {}
        for task, o in self.opened.items():
            undula.detach(o.model)
            undula.attach(o.model, replace(bodies[task], full=self.whole[task].full))
            found[task] = o.run.task.score(o.model.eval(), self.examples[split][task], 64)["accuracy"]
        return found


def mixed(path: Path, data: Path, split: str) -> dict[str, float]:
    """Of the adapter that was trained on all: of each row the likeliest class of its own task."""
    opened, right = undula.load(path), {task: [0, 0] for task in TASKS}
    rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
    for row, answer in zip(rows, opened.predict([r["text"] for r in rows]), strict=True):
        task = row["label"].partition("/")[0]
        own = {k: v for k, v in answer["probabilities"].items() if k.startswith(f"{task}/")}
        hits, n = right[task]
        right[task] = [hits + (max(own, key=lambda k: own[k]) == row["label"]), n + 1]
    return {task: hits / n for task, (hits, n) in right.items()}


def sums_for(combiner: combine.Combiner) -> tuple[float, ...]:
    """The sums of weights that make a difference."""
    open_ended = isinstance(combiner, Merge) and abs(sum(combiner.shares([1.0] * len(TASKS))) - 1) > 1e-9
    return SUMS if open_ended else (1.0,)


def measured(tasks: Tasks, name: str, make: Callable[[int | None], combine.Combiner]) -> list[dict[str, Any]]:
    """The rows of a way: at its own rank, with the sum of weights that is best on validation rows, and kept at RANK."""
    own, tried = make(None), {}
    for total in sums_for(own):
        body, seconds = timed(tasks, own, total)
        tried[total] = sum(tasks.accuracy(dict.fromkeys(TASKS, body), "validation").values()), body, seconds
    best = max(tried, key=lambda total: tried[total][0])
    rows = []
    for kept, (body, seconds) in ((False, tried[best][1:]), (True, timed(tasks, make(RANK), best))):
        rank = max(getattr(m, "r", 0) for m in body.methods.values())
        found = tasks.accuracy(dict.fromkeys(TASKS, body), "test")
        told = {"how": name, "kept": kept, "rank": rank, "sum of weights": best, "seconds": seconds}
        rows.append(told | {"accuracy": found})
        print(rows[-1], flush=True)
    return rows


def timed(tasks: Tasks, combiner: combine.Combiner, total: float) -> tuple[undula.Adapter, float]:
    """The combination with equal weights of that sum, and the seconds that it took."""
    begun = time.perf_counter()
    return combiner(tasks.bodies, [total / len(TASKS)] * len(TASKS)), time.perf_counter() - begun


def ways(tasks: Tasks) -> dict[str, Any]:
    """{name: rank -> combiner}."""
    found: dict[str, Any] = {}
    for name in combine.NAMED:
        if name in ("linear", "task-arithmetic", "svd"):  # the average and the sum; what `--rank` makes of that
            continue
        found[name] = lambda rank, name=name: combine.named(name, rank=rank)
    grams = []
    for task, o in tasks.opened.items():
        undula.detach(o.model)
        undula.attach(o.model, tasks.whole[task])
        o.model.eval()
        grams.append(dict(combine.grams(o.model, list(o.batches(o.examples(None, "train", 128))))))
    found["regmean"] = lambda rank: combine.RegMean(tuple(grams), rank=rank)
    return found


def run(size: Size, folder: Path) -> dict[str, Any]:
    data = files_of(folder, size)
    tasks = Tasks({task: trained(folder, data[task], task, seed, size) for seed, task in enumerate(TASKS)}, size)
    bounds = kept(folder / "bounds.json", lambda: bounds_of(tasks, data["all"], folder, size))
    print(bounds, flush=True)
    rows = []
    for name, make in ways(tasks).items():
        rows += kept(folder / f"rows-{name}.json", lambda name=name, make=make: measured(tasks, name, make))
    rates = bounds.pop("multi-task rates")
    for row in rows:
        row["share"] = share(row["accuracy"], bounds)
    for name, found in bounds.items():
        bounds[name] = found | {"share": share(found, bounds)}
    return {"bounds": bounds, "multi-task, validation, by rate": rates, "rows": rows, "size": vars(size)}


def kept(file: Path, made: Callable[[], Any]) -> Any:
    """What an earlier run has left in that file, or else what is made now, which is left there."""
    if not file.is_file():
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(made()), encoding="utf-8")
        part.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def bounds_of(tasks: Tasks, data: Path, folder: Path, size: Size) -> dict[str, Any]:
    """{bound: accuracies}; and of each rate for all tasks the mean accuracy on validation rows."""
    single = tasks.accuracy(dict(zip(TASKS, tasks.bodies, strict=True)), "test")
    nothing = {site: {k: torch.zeros_like(t) for k, t in f.items()} for site, f in tasks.bodies[0].factors.items()}
    base = tasks.accuracy(dict.fromkeys(TASKS, replace(tasks.bodies[0], factors=nothing)), "test")
    paths = {lr: trained(folder, data, "all", len(TASKS), size, lr, HEAD_RATE) for lr in RATES}
    rates = {lr: sum(mixed(path, data, "validation").values()) / len(TASKS) for lr, path in paths.items()}
    best = paths[max(rates, key=lambda lr: rates[lr])]
    return {"single": single, "base": base, "multi-task": mixed(best, data, "test"), "multi-task rates": rates}


def share(found: dict[str, float], bounds: dict[str, Any]) -> float:
    base, single = bounds["base"], bounds["single"]
    return sum(found[t] - base[t] for t in TASKS) / sum(single[t] - base[t] for t in TASKS)


def judged(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, bool]]:
    best = max(row["share"] for row in found["rows"])
    kept = max(row["share"] for row in found["rows"] if row["kept"])
    slow = max(row["seconds"] for row in found["rows"])
    targets = {
        "best share of what the single adapters gain >= 0.5": best,
        f"the same of those of rank {RANK} >= 0.4": kept,
        "seconds of the slowest combination <= 60": slow,
    }
    return targets, dict(zip(targets, (best >= 0.5, kept >= 0.4, slow <= 60), strict=True))


def table(found: dict[str, Any]) -> str:
    lines = [f"`{found['command']}`, {found['date']}: {found['machine']}, torch {found['torch']}.", ""]
    lines += [f"| way | rank | sum of weights | {' | '.join(TASKS)} | share | seconds |"]
    lines += ["|---|---:|---:|" + "---:|" * (len(TASKS) + 2)]
    for name, own in found["bounds"].items():
        lines.append(f"| *{name}* | | | {cells(own)} | {own['share']:.2f} | |")
    for row in sorted(found["rows"], key=lambda row: -row["share"]):
        weights = f"{row['sum of weights']:g}"
        figures = f"{cells(row['accuracy'])} | {row['share']:.2f} | {row['seconds']:.2f}"
        lines.append(f"| {row['how']} | {row['rank']} | {weights} | {figures} |")
    return "\n".join(lines)


def cells(accuracy: dict[str, float]) -> str:
    return " | ".join(f"{accuracy[t]:.3f}" for t in TASKS)


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "combine"
    import matplotlib.pyplot as plt

    rows = sorted((r for r in found["rows"] if not r["kept"]), key=lambda r: r["share"])
    kept = {r["how"]: r["share"] for r in found["rows"] if r["kept"]}
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(rows) + 1.4), layout="constrained")
    names = [r["how"] for r in rows]
    axes.barh(names, [r["share"] for r in rows], color="#4c72b0", label="at its own rank")
    axes.plot([kept[n] for n in names], names, "o", color="#dd8452", label=f"kept at rank {RANK}")
    axes.axvline(1, color="black", lw=1, label="the single adapters")
    axes.axvline(found["bounds"]["multi-task"]["share"], color="grey", ls="--", lw=1, label="trained on all tasks")
    axes.axvline(0, color="black", lw=1)
    axes.set_xlabel("share of what the single adapters gain over the base, four tasks together")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few rows, to see that it runs")
    parser.add_argument("--short", action="store_true", help="400 rows a task")
    parser.add_argument("--table", action="store_true", help=f"write the table of {RESULTS.name} into {PAGE.name}")
    parser.add_argument("--work", type=Path, help="keep adapters and rows here, and go on from those that are there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.table:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(
            f"{before}{BEGIN}\n\n{table(json.loads(RESULTS.read_text()))}\n\n{END}{after}", encoding="utf-8"
        )
        return
    size = QUICK if given.quick else SHORT if given.short else FULL
    with tempfile.TemporaryDirectory() as folder:
        place = given.work or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        if kept(place / "size.json", lambda: vars(size)) != vars(size):
            sys.exit(f"{place} holds a run of another size: name another folder")
        found = run(size, place)
    targets, met = judged(found)
    found |= {"targets": targets, "targets_met": met}
    tell(targets, met)
    if given.json:
        record(given.json, found)
    if given.plot:
        plot(found, given.plot)
    sys.exit(0 if given.quick or all(met.values()) else 1)


if __name__ == "__main__":
    main()
