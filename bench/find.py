"""Which adapter for a task that none was trained on?  Found by words, by weights and by rows, against trying all.

    python bench/expert_tasks.py --out build/tasks && undula library build/tasks/library.toml --out build/library
    python bench/find.py --library build/library --tasks build/tasks --json bench/results/find.json

Every adapter of the library answers 200 test rows of every held-out task: that is the oracle's order.  Of each way to
find: recall@k, the share of the oracle's first k among the first k found; and the accuracy of the first one found, next
to the best one's, the mean one's (a draw by chance) and the base's.  `weights` knows no text of an adapter: an encoder
that was trained on the library's adapters reads their weights.  `tried` ranks by the accuracy on the task's 16 rows,
for the price of running every adapter on them; `rows` embeds the same 16 rows with their labels' names.

What the encoder knows of adapters that it has not seen is measured by leaving out fifths of the library (`folds`): how
often the own description of an adapter is among the k nearest of all descriptions to its weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from experts import Encoder, Task, classes_of, expert, right, tasks
from record import mean, once, record, tell
from torch import Tensor

import undula
from undula import retrieve
from undula.retrieve.sketching import DIRECT

TEST, SHOTS, KS = 200, 16, (1, 3, 5, 10)


def answered(root: Path, names: list[str], held: list[Task], work: Path) -> dict[str, dict[str, list[float]]]:
    """{adapter or "base": {task: [accuracy on test rows, on the 16 rows]}}; what WORK holds is not computed again."""
    encoder, classes = Encoder(), {t.name: classes_of(t) for t in held}
    rows = {t.name: (t.some("test", TEST), t.some("train", SHOTS)) for t in held}
    texts = list(dict.fromkeys(text for parts in rows.values() for part in parts for text, _ in part))
    at = {text: i for i, text in enumerate(texts)}

    def of(name: str) -> dict[str, list[float]]:
        if name != "base":
            undula.attach(encoder.model, expert(root / name))
        vectors = encoder.all_vectors(texts)
        if name != "base":
            undula.detach(encoder.model)
        told = {
            task: [right(vectors[[at[t] for t, _ in part]], [c for _, c in part], classes[task]) for part in parts]
            for task, parts in rows.items()
        }
        print(name, told, flush=True)
        return told

    how = {"test": TEST, "shots": SHOTS, "tasks": [t.name for t in held]}
    return {name: once(work / f"{name}.json", how, lambda name=name: of(name)) for name in ["base", *names]}


Ways = dict[str, Callable[[Task], dict[str, float]]]


def ways(index: retrieve.Index, tried: dict[str, dict[str, list[float]]]) -> Ways:
    """{way: task -> {adapter: score}}."""
    encoder = retrieve.learned(index)

    def scores(asked: Tensor, by: str) -> dict[str, float]:
        return {f.name: f.score for f in retrieve.ranked(index, asked, encoder, by=by)}

    def of_rows(task: Task) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            rows = [{"text": text, "label": task.names[c]} for text, c in task.some("train", SHOTS)]
            path = Path(folder) / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            return retrieve.of_rows(str(path))

    def asked(task: Task) -> Tensor:
        return retrieve.question(task.description)

    return {
        "text": lambda task: scores(asked(task), "text"),
        "weights": lambda task: scores(asked(task), "weights"),
        "text and weights": lambda task: scores(asked(task), "both"),
        "rows, by text": lambda task: scores(of_rows(task), "text"),
        "rows, by weights": lambda task: scores(of_rows(task), "weights"),
        "rows, by both": lambda task: scores(of_rows(task), "both"),
        "tried on 16 rows": lambda task: {e.name: tried[e.name][task.name][1] for e in index.entries},
    }


def measured(scores: dict[str, float], oracle: dict[str, float]) -> dict[str, float]:
    """Of one way and one task.  Equal scores are in the order of names, as `undula find` has them; equal accuracies
    of the oracle all count as its first."""
    order = sorted(scores, key=lambda name: (-scores[name], name))
    best = sorted(oracle.values(), reverse=True)
    found = {"accuracy of the first": oracle[order[0]], "of the best of three": max(oracle[n] for n in order[:3])}
    for k in KS:
        found[f"recall@{k}"] = sum(oracle[name] >= best[k - 1] for name in order[:k]) / k
    return found


def chance(oracle: dict[str, float]) -> dict[str, float]:
    """What a drawn order has on the average."""
    best = sorted(oracle.values(), reverse=True)
    n, every = len(best), list(_of_three(best))
    found = {"accuracy of the first": statistics.mean(best), "of the best of three": sum(every)}
    return found | {f"recall@{k}": sum(v >= best[k - 1] for v in best) / n for k in KS}


def _of_three(best: list[float]) -> Iterator[float]:
    """Of each place in a falling order: its number times the chance that it is the best of three that are drawn."""
    n = len(best)
    for i, value in enumerate(best):
        below = n - i - 1
        yield value * 3 * below * (below - 1) / (n * (n - 1) * (n - 2))


def folds(index: retrieve.Index, seeds: int = 2) -> list[dict[str, Any]]:
    """Of adapters that the encoder has not seen: is their own description among the k nearest to their weights?"""
    which = [i for i in index.usable if not index.entries[i].silent]
    _, texts, weights = index.rows(which)
    parts = {"both parts": slice(None), "direct alone": slice(0, DIRECT), "outputs alone": slice(DIRECT, -1)}
    rows = []
    for name, part in parts.items():
        kept = torch.zeros_like(weights)
        kept[:, part] = weights[:, part]
        hits: dict[int, list[float]] = {k: [] for k in KS}
        for seed in range(seeds):
            order = torch.randperm(len(which), generator=torch.Generator().manual_seed(seed))
            for out in order.chunk(5):
                seen = torch.ones(len(which), dtype=torch.bool).index_fill(0, out, False)
                encoder = retrieve.learn(kept[seen], texts[seen], seed=seed)
                with torch.no_grad():
                    near = (encoder(kept[out]) @ texts.T).argsort(1, descending=True)
                for k in KS:
                    hits[k] += (near[:, :k] == out[:, None]).any(1).float().tolist()
        rows.append({"sketch": name} | {f"recall@{k}": statistics.mean(h) for k, h in hits.items()})
        print(rows[-1], flush=True)
    return rows


def run(library: Path, file: Path, work: Path) -> dict[str, Any]:
    held, root = tasks(file), library / "experts"
    index = retrieve.update(root, work / "index.safetensors")
    names = [e.name for e in index.entries if not e.wrong]
    found = answered(root, names, held, work)
    oracle = {task.name: {n: found[n][task.name][0] for n in names} for task in held}
    rows: list[dict[str, Any]] = []
    for way, score in ways(index, found).items():
        rows += [{"way": way, "task": t.name} | measured(score(t), oracle[t.name]) for t in held]
    rows += [{"way": "chance", "task": t.name} | chance(oracle[t.name]) for t in held]
    bounds = {t.name: {"base": found["base"][t.name][0], "best": max(oracle[t.name].values())} for t in held}
    return {"adapters": len(names), "test rows": TEST, "rows": rows, "bounds": bounds, "folds": folds(index),
            "oracle": oracle, "skipped": index.skipped}  # fmt: skip


def means(found: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """{way: {figure: (mean over tasks, its standard error)}}."""
    told: dict[str, dict[str, tuple[float, float]]] = {}
    for way in dict.fromkeys(row["way"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["way"] == way]
        figures = [k for k in own[0] if k not in ("way", "task")]
        told[way] = {k: mean([row[k] for row in own]) for k in figures}
    return told


def judged(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, bool]]:
    told = means(found)
    over = {way: told[way]["recall@5"][0] / told["chance"]["recall@5"][0] for way in ("text", "weights")}
    gain = told["text"]["accuracy of the first"][0] - told["chance"]["accuracy of the first"][0]
    seen = next(row for row in found["folds"] if row["sketch"] == "both parts")["recall@5"] * found["adapters"] / 5
    targets = {
        "recall@5 by text, of chance's >= 2": over["text"],
        "recall@5 by weights, of chance's >= 1.5": over["weights"],
        "accuracy of the first by text, over a draw's > 0": gain,
        "own description among the 5 nearest of unseen weights, of chance's >= 2": seen,
    }
    return targets, dict(zip(targets, (over["text"] >= 2, over["weights"] >= 1.5, gain > 0, seen >= 2), strict=True))


def table(found: dict[str, Any]) -> str:
    told = means(found)
    figures = list(told["chance"])
    lines = [f"| found by | {' | '.join(figures)} |", "|---|" + "---:|" * len(figures)]
    for way, own in told.items():
        lines.append(f"| {way} | {' | '.join(f'{own[k][0]:.2f} ± {own[k][1]:.2f}' for k in figures)} |")
    bounds = {k: mean([b[k] for b in found["bounds"].values()]) for k in ("base", "best")}
    return "\n".join([*lines, *(f"{k}: {v:.3f} ± {e:.3f}" for k, (v, e) in bounds.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True, help="the folder of bench/expert_tasks.py")
    parser.add_argument("--work", type=Path, help="keep what each adapter answered here (default: LIBRARY/found)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = given.work or given.library / "found"
    work.mkdir(parents=True, exist_ok=True)
    found = run(given.library, given.tasks / "held-out.toml", work)
    targets, met = judged(found)
    found |= {"targets": targets, "targets_met": met}
    print(table(found))
    tell(targets, met)
    if given.json:
        record(given.json, found, f"python bench/find.py --library LIBRARY --tasks TASKS --json {given.json}")
    sys.exit(0 if all(met.values()) else 1)


if __name__ == "__main__":
    main()
