"""Forgetting classes for real: what goes, what stays, and whether it is gone or only masked.

    python bench/forget.py --case text --json bench/results/forget-text.json       # about six minutes of one core
    python bench/forget.py --case images --json bench/results/forget-images.json   # longer
    python bench/forget.py --case text --quick                                     # a miniature: a minute
    python bench/forget.py --case text --work runs/forget                          # goes on there after a kill
    python bench/forget.py --plot docs/forget.svg --of bench/results/forget-text.json   # and a table

A pretrained model is taught a data set's classes, then asked to forget a sequence of them (`undula.forget`).  Beside
it the same model taught without those rows (retraining, what forgetting is measured against), and plain gradient ascent
on the rows to forget, stopped where their accuracy on validation rows is that of chance.  Of each, on test rows: the
accuracy on what was to go and on what stays; that of a logistic regression on the features, on the forgotten classes
(high where the head alone masks them; retraining says what it is of a model that never saw them); and how fast they
come back: the accuracy after so many steps on rows of all classes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import once, record

import undula
from undula.bundled import dataset
from undula.cli.forgetting import PENALTY
from undula.observe import drawing as D
from undula.train.base import open_model
from undula.train.forgetting import merged
from undula.train.tasks.classification import Classification
from undula.train.tasks.image_classification import ImageClassification
from undula.train.tasks.outputs import with_embeddings
from undula.train.tasks.task import Examples, Task

CONVOLUTIONS = ("stem", "expand", "project", "top")


@dataclass(frozen=True)
class Case:
    model: str
    data: str
    task: Task
    batch: int
    steps: int
    lr: float
    head_lr: float
    where: Any
    forget_lr: float
    forget_steps: int
    rows: int


TEXTS, IMAGES = Classification(max_length=32), ImageClassification(size=64)
CASES = {
    "text": Case("minilm", "wordnet", TEXTS, 16, 500, 1e-3, 3e-3, "all-linear", 3e-3, 120, 4000),
    "images": Case("efficientnet-lite0", "fashion-mnist", IMAGES, 32, 200, 1e-3, 1e-2, CONVOLUTIONS, 3e-3, 80, 3000),
}
RELEARN = (0, 2, 5, 10, 20)


def taught(case: Case, data: Any, names: tuple[str, ...], out: Path) -> Path:
    """The whole folder of the model after learning these rows."""
    if (out / "whole").is_dir():
        return out / "whole"
    run = undula.Run(
        model=f"bundled:{case.model}", data=data, task=replace(case.task, names=names), method=undula.LoRA(r=8),
        lr=case.lr, head_lr=case.head_lr, max_steps=case.steps, batch=case.batch, where=case.where, out=out / "run",
        eval_every=0, eval_rows=100,
    )  # fmt: skip
    if not (run.out / "report.json").is_file():
        undula.train(run, resume=(run.out / "run.json").is_file())
    merged(run.out, out / "whole")
    return out / "whole"


class Judge:
    """Measures models on fixed rows."""

    def __init__(self, case: Case, folder: Path, names: tuple[str, ...], parts: dict[str, Any], gone: set[str]):
        self.task = replace(case.task, names=names)
        self.names, self.batch, self.where = names, case.batch, case.where
        _, self.processor = open_model(str(folder), self.task, torch.float32, 0)
        self.parts = {name: Examples(self.task, rows, self.processor) for name, rows in parts.items()}
        self.gone = {names.index(name) for name in gone}

    def labels(self, part: str) -> torch.Tensor:
        return torch.tensor(self.parts[part].rows["label"][:])

    def accuracies(self, model: Any, part: str) -> dict[str, float]:
        labels = self.labels(part)
        right = self.task.logits(model, self.parts[part], 64).argmax(1) == labels
        gone = torch.isin(labels, torch.tensor(sorted(self.gone)))
        return {"forgotten": float(right[gone].double().mean()), "kept": float(right[~gone].double().mean())}

    @torch.no_grad()
    def features(self, model: Any, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        collate, rows, found, labels = self.task.collator(self.processor), self.parts[part], [], []
        model.eval()
        for start in range(0, len(rows), 64):
            batch = dict(collate([rows[i] for i in range(start, min(start + 64, len(rows)))]))
            labels.append(batch.pop("labels"))
            found.append(with_embeddings(model, len(self.names), batch)[1].float())
        return torch.cat(found), torch.cat(labels)

    def probe(self, model: Any) -> float:
        """The accuracy on the forgotten classes of a logistic regression on the features."""
        from sklearn.linear_model import LogisticRegression

        (x, y), (z, t) = self.features(model, "train"), self.features(model, "test")
        scale = x.std(0).clamp_min(1e-6)
        learned = LogisticRegression(max_iter=300).fit((x / scale).numpy(), y.numpy())
        gone = torch.isin(t, torch.tensor(sorted(self.gone)))
        return float(learned.score((z[gone] / scale).numpy(), t[gone].numpy()))

    def relearned(self, folder: Path, lr: float) -> dict[int, float]:
        """The accuracy on the forgotten classes after so many steps on training rows of all classes."""
        model, _ = open_model(str(folder), self.task, torch.float32, 0)
        torch.manual_seed(1)
        adapter = undula.attach(model, undula.LoRA(r=8), self.where, full=self.task.head(model))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr)
        found, order = {}, torch.randperm(len(self.parts["train"]), generator=torch.Generator().manual_seed(1)).tolist()
        collate = self.task.collator(self.processor)
        for step in range(max(RELEARN) + 1):
            if step in RELEARN:
                found[step] = self.accuracies(model, "test")["forgotten"]
            model.train()
            rows = [order[(step * self.batch + i) % len(order)] for i in range(self.batch)]
            model(**collate([self.parts["train"][i] for i in rows])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return found

    def all_of(self, folder: Path, lr: float) -> dict[str, Any]:
        model, _ = open_model(str(folder), self.task, torch.float32, 0)
        return {**self.accuracies(model, "test"), "probe": self.probe(model), "relearned": self.relearned(folder, lr)}


def ascent(judge: Judge, folder: Path, out: Path, lr: float, most: int) -> tuple[Path, dict[str, Any]]:
    """(folder, steps) of plain gradient ascent on the rows to forget, until their validation accuracy is chance."""
    model, processor = open_model(str(folder), judge.task, torch.float32, 0)
    adapter = undula.attach(model, undula.LoRA(r=8), judge.where)
    optimizer, collate = torch.optim.AdamW(adapter.parameters(), lr=lr), judge.task.collator(processor)
    rows = [i for i, label in enumerate(judge.labels("train").tolist()) if label in judge.gone]
    step = 0
    while step < most and judge.accuracies(model, "validation")["forgotten"] > 1 / len(judge.names):
        for _ in range(2):
            model.train()
            at = [rows[(step * judge.batch + i) % len(rows)] for i in range(judge.batch)]
            (-model(**collate([judge.parts["train"][i] for i in at])).loss).backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    undula.merge(model, keep=False)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out, {"steps": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="text")
    parser.add_argument("--requests", type=int, default=3, help="so many classes, one after another")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, help="a folder to work in, which is kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="draw what is in --of, and measure nothing")
    parser.add_argument("--of", nargs="*", type=Path, default=[])
    args = parser.parse_args()
    if args.plot:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in args.of]
        args.plot.write_bytes(plotted(found))
        print("\n".join(table(found)))
        return
    warnings.simplefilter("ignore")
    case = CASES[args.case]
    if args.quick:
        case = replace(case, steps=40, forget_steps=20, rows=600)
        args.requests = 2
    with contextlib.ExitStack() as closes:
        out = args.work or Path(closes.enter_context(tempfile.TemporaryDirectory()))
        figures = compared(case, args.requests, out)
    if args.json:
        record(args.json, {"case": args.case, **figures})


def compared(case: Case, number: int, out: Path) -> dict[str, Any]:
    """What each way leaves, after `number` requests; what is in OUT already is not made again.
    Raises ValueError where that was made otherwise."""
    begun = time.process_time()
    once(out / "how.json", {"case": repr(case), "requests": number}, dict)
    rows = dataset(case.data)
    task, parts = case.task.read(rows, "train", "validation", "test")
    names: tuple[str, ...] = task.names  # type: ignore[attr-defined]
    requests = [[name] for name in names[:: max(1, len(names) // number)][:number]]
    gone = {name for request in requests for name in request}
    most = {n: case.rows if n == "train" else min(1000, case.rows) for n in parts}
    small = type(parts)({n: p.shuffle(seed=0).select(range(min(most[n], len(p)))) for n, p in parts.items()})
    if not (out / "without").is_dir():
        spoken = type(small)({n: _spoken(part, names) for n, part in small.items()})
        spoken.save_to_disk(out / "data")
        without = {n: part.filter(lambda row: row["label"] not in gone) for n, part in spoken.items()}
        type(small)({**without, "test": spoken["test"]}).save_to_disk(out / "without")
    whole = taught(case, out / "data", names, out / "known")
    held = {n: small[n] for n in ("train", "test")} | {"validation": small.get("validation", small["test"])}
    judge = Judge(case, whole, names, held, gone)
    run = undula.Run(
        model=str(whole), data=out / "data", task=case.task, method=undula.LoRA(r=8), where=case.where,
        lr=case.forget_lr, max_steps=case.forget_steps, batch=case.batch, penalty=PENALTY,
        eval_rows=500, out=out / "forgotten",
    )  # fmt: skip
    report = undula.forget(run, requests, resume=run.out.is_dir())
    kept = ("request", "forgotten_before", "forgotten", "kept_before", "kept", "h_mean", "earlier", "groups")
    told = [{k: row[k] for k in kept} for row in report["requests"]]
    print(*told, sep="\n", flush=True)
    last = out / "bases" / "after"
    merged(run.out / "requests" / f"{number:02}", last)
    ways: dict[str, Callable[[], tuple[Path, dict[str, Any]]]] = {
        "known": lambda: (whole, {}),
        "GS-LoRA": lambda: (last, {}),
        "retrained": lambda: (taught(case, out / "without", names, out / "retrained"), {}),
        "ascent": lambda: ascent(judge, whole, out / "ascent", case.lr, case.forget_steps),
    }
    figures = {name: of_way(judge, make, out / f"{name}.json", case.lr) for name, make in ways.items()}
    cpu = round(time.process_time() - begun, 1)
    return {"classes": len(names), "requests": told, "ways": figures, "cpu_seconds_of_the_last_run": cpu}


def of_way(judge: Judge, make: Callable[[], tuple[Path, dict[str, Any]]], kept: Path, lr: float) -> dict[str, Any]:
    """What is measured of a model that `make` leaves; kept in a file."""
    if not kept.is_file():
        folder, more = make()
        kept.write_text(json.dumps({**judge.all_of(folder, lr), **more}), encoding="utf-8")
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    print(kept.stem, found, flush=True)
    return found


def table(cases: list[dict[str, Any]]) -> Iterator[str]:
    yield "| | way | forgotten | kept | probe | " + " | ".join(f"back after {n}" for n in RELEARN[1:]) + " |"
    yield "|---|---|---|---|---|" + "---|" * len(RELEARN[1:])
    for case in cases:
        for way, found in case["ways"].items():
            back = [found["relearned"][str(n)] for n in RELEARN[1:]]
            numbers = (found["forgotten"], found["kept"], found["probe"], *back)
            yield f"| {case['case']} | {way} | {' | '.join(f'{x:.3f}' for x in numbers)} |"


def plotted(cases: list[dict[str, Any]]) -> bytes:
    """Of each case: what is right of the forgotten classes and of the others, and how fast the former come back."""
    width, height, top, left, gap = 300.0, 170.0, 45.0, 60.0, 60.0
    with D.styled():
        figure = D.blank(left + 2 * width + gap + 110, len(cases) * (height + 2 * top))
        for row, case in enumerate(cases):
            ways, y = case["ways"], top + row * (height + 2 * top)
            bars, curves = (D.axes(figure, left + i * (width + gap), y, width, height) for i in (0, 1))
            for i, (key, colour) in enumerate((("kept", "win"), ("forgotten", "loss"), ("probe", "open"))):
                at = [n + 0.26 * (i - 1) for n in range(len(ways))]
                bars.bar(at, [found[key] for found in ways.values()], 0.24, color=D.LIGHT[colour], label=key)
            bars.set_xticks(range(len(ways)), list(ways))
            bars.set_ylabel(f"{case['case']}: accuracy")
            for (way, found), mark in zip(ways.items(), "os^D", strict=True):
                back = {int(k): v for k, v in found["relearned"].items()}
                curves.plot(list(back), list(back.values()), marker=mark, markersize=4, label=way)
            curves.set_xlabel("steps on all classes: forgotten ones come back")
            for axis in (bars, curves):
                axis.set_ylim(0, 1)
                axis.grid(axis="y")
            bars.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
            curves.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
        return D.rendered(figure, "svg", "What is forgotten, what is kept, and how fast the forgotten comes back")


def _spoken(part: Any, names: tuple[str, ...]) -> Any:
    """The rows with their classes by name."""
    from datasets import Value

    labels = [names[i] for i in part["label"][:]]
    return part.remove_columns("label").add_column("label", labels, feature=Value("string"))


if __name__ == "__main__":
    main()
