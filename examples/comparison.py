"""What both demos do: train each method, save it, load it back, merge or collapse it, check, tell, draw."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import undula
from undula.train import Restored, Run, restored
from undula.train.bar import Bar
from undula.train.base import quiet

CLOSE = 1e-3  # the largest difference of logits (float32, of size 1 to 20) that counts as the same prediction


def arguments(what: str, out: str, threads: int) -> argparse.Namespace:
    """`--quick`, `--threads` and `--out`; torch is set to these threads."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--quick", action="store_true", help="a few steps only: does everything run?")
    parser.add_argument("--threads", type=int, default=threads, help="of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="the directory to write (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def screen() -> Console:
    """Wide enough for the table where there is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 110)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is compared: a method (None: the head alone) at a learning rate that suits it."""

    name: str
    method: undula.Method | None
    lr: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows on which predictions are compared, and training rows that a collapse is fitted to."""

    checked: int
    calibration: int


def compare(entries: Sequence[Entry], run: Run, sizes: Sizes, console: Console) -> list[dict[str, Any]]:
    """One row per entry, all with the same model, data, seed and steps; adapters stay in `run.out`/NAME."""
    rows = []
    for number, entry in enumerate(entries, 1):
        console.rule(f"{number} of {len(entries)}: {entry.name}, learning rate {entry.lr:g}")
        out = run.out / entry.name.replace(" ", "-").lower()
        shutil.rmtree(out, ignore_errors=True)
        own = dataclasses.replace(run, method=entry.method, lr=entry.lr, out=out)
        with quiet(), Bar(console) as bar:
            report = undula.train(own, callbacks=(bar,))
            rows.append({"method": entry.name, "lr": entry.lr, **row(report, out, sizes)})
        console.print(verdict(rows[-1], run.task.headline), highlight=False)
    return rows


def row(report: Mapping[str, Any], out: Path, sizes: Sizes) -> dict[str, Any]:
    """The report of a training with what loading, and merging or collapsing, gave."""
    kept = ("rung", "configuration", "trainable_parameters", "before", "after", "seconds", "steps")
    kept += ("peak_memory_bytes", "peak_memory_is", "device", "seed", "losses")
    begun = time.perf_counter()
    opened = restored(out)
    batches = list(opened.batches(opened.examples(rows=sizes.checked)))
    return {
        **{k: report[k] for k in kept},
        "reloaded_metric": reloaded(opened, report, out),
        "logits_largest": max(t.abs().max().item() for t in logits(opened, batches)),
        **merged(opened, batches, out, sizes.calibration),
        "seconds_after_training": round(time.perf_counter() - begun, 2),
    }


def reloaded(opened: Restored, report: Mapping[str, Any], out: Path) -> float:
    """The metric of the adapter as it is on disk.  It is the one that training ended with, or something is wrong."""
    found, trained = opened.score()[report["metric"]], report["after"][report["metric"]]
    if found != trained:
        raise SystemExit(f"{out}: trained to {trained}, but loaded it measures {found}")
    return found


def merged(opened: Restored, batches: list[dict[str, torch.Tensor]], out: Path, rows: int) -> dict[str, Any]:
    """Merges the adapter, after a collapse where its method has no merged form, and compares all predictions."""
    collapse = {"collapse_error": None, "collapsed_metric": None}
    if not issubclass(opened.adapter.rung, undula.Reweight):
        collapse = collapsed(opened, batches, out, rows)
    before = logits(opened, batches)
    undula.merge(opened.model)
    difference = max((a - b).abs().max().item() for a, b in zip(before, logits(opened, batches), strict=True))
    if difference > CLOSE:
        raise SystemExit(f"{out}: merged, the logits differ by {difference:.2g}")
    return {"merge_difference": difference, **collapse}


def collapsed(opened: Restored, batches: list[dict[str, torch.Tensor]], out: Path, rows: int) -> dict[str, Any]:
    """Puts a plain LoRA, fitted by least squares, in the place of the adapter; its error, and its metric."""
    calibration = list(opened.batches(opened.examples(split="train", rows=rows)))
    made = undula.collapse(opened.model, undula.LeastSquares(8, calibration), held_out=batches)
    made.adapter.save(out / "collapsed", base=opened.folder, task=opened.run.task.peft)
    undula.detach(opened.model)
    undula.attach(opened.model, undula.Adapter.load(out / "collapsed"))
    return {"collapse_error": made.error, "collapsed_metric": opened.score()[opened.run.task.headline]}


@torch.no_grad()
def logits(opened: Restored, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The model's outputs on every batch, padding left out."""
    opened.model.eval()
    found = [opened.model(**batch).logits for batch in batches]
    return [t[b["attention_mask"].bool()] if t.ndim == 3 else t for t, b in zip(found, batches, strict=True)]


def verdict(row: Mapping[str, Any], metric: str) -> str:
    """One line about a method."""
    after = f"{metric} {row['before'][metric]:.3f} -> {row['after'][metric]:.3f}, loaded back the same"
    if row["collapse_error"] is None:
        return f"{after}; merged, logits differ by {row['merge_difference']:.1e}"
    return (
        f"{after}; collapsed to a rank-8 LoRA: error {row['collapse_error']:.3f} of its change, "
        f"{metric} {row['collapsed_metric']:.3f}; that one merged, logits differ by {row['merge_difference']:.1e}"
    )


def tell(rows: list[dict[str, Any]], metrics: tuple[str, ...], console: Console) -> None:
    """The table."""
    table = Table(title="The same model, data, seed and steps", title_justify="left")
    for name in ("method", "rung", "parameters", *metrics, "time", "memory", "merge", "collapse"):
        table.add_column(name, justify="left" if name in ("method", "rung") else "right")
    for r in rows:
        table.add_row(
            r["method"],
            r["rung"] or "-",
            f"{r['trainable_parameters']:,}",
            *(f"{r['before'][m]:.3f} -> {r['after'][m]:.3f}" for m in metrics),
            f"{r['seconds']:.0f} s",
            f"{r['peak_memory_bytes'] / 2**20:.0f} MiB",
            f"{r['merge_difference']:.0e}",
            "-" if r["collapse_error"] is None else f"{r['collapse_error']:.3f}",
        )
    console.print(table)
    console.print("merge: the largest difference of a logit, merged against unmerged")
    console.print("collapse: the relative error of the model's change, as a rank-8 LoRA")
    console.print(f"memory: {rows[0]['peak_memory_is']}")


def write(rows: list[dict[str, Any]], about: Mapping[str, Any], path: Path) -> None:
    """report.json: one object per method under `rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def draw(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """The training losses, and the metric against the number of parameters trained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, r in enumerate(rows):
        steps, losses = zip(*smooth(r["losses"]), strict=True)
        width = 1.5 + 0.8 * (len(rows) - i)  # so that lines which coincide all show
        left.plot(steps, losses, color=f"C{i}", linewidth=width, label=r["method"])
        right.bar(i, r["after"][metric], color=f"C{i}")
        right.text(i, r["after"][metric], f"{r['after'][metric]:.3f}", ha="center", va="bottom")
    right.axhline(rows[0]["before"][metric], color="0.4", linestyle=":", label="before training")
    left.set(xlabel="step", ylabel="training loss (running mean)")
    names = [f"{r['method']}\n{r['trainable_parameters'] / 1000:.0f} k" for r in rows]
    right.set_xticks(range(len(rows)), names, rotation=30, ha="right")
    right.set_ylabel(f"{metric}, held-out rows")
    right.margins(y=0.2)
    left.legend(frameon=False)
    right.legend(frameon=False, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def smooth(losses: list[list[float]], share: float = 0.1) -> Iterator[tuple[float, float]]:
    """Exponentially weighted means (unbiased at the beginning) of (step, loss)."""
    keep, total, weight = 1 - 1 / max(1.0, share * len(losses)), 0.0, 0.0
    for step, loss in losses:
        total, weight = keep * total + loss, keep * weight + 1
        yield step, total / weight


@contextlib.contextmanager
def timed(console: Console) -> Iterator[None]:
    """Says at the end how long all of it took."""
    begun = time.perf_counter()
    yield
    console.print(f"{time.perf_counter() - begun:.0f} s in all", highlight=False)
