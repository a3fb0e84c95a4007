"""Forgetting classes for real: what goes, what stays, and whether it is gone or only masked.

    python bench/forget.py --case text --json bench/results/forget-text.json       # about six minutes of one core
    python bench/forget.py --case images --json bench/results/forget-images.json   # longer
    python bench/forget.py --case text --quick                                     # a miniature: a minute

A pretrained model is taught a data set's classes, then asked to forget a sequence of them (`undula.forget`).  Beside
it the same model taught without those rows (retraining, what forgetting is measured against), and plain gradient ascent
on the rows to forget, stopped where their accuracy on validation rows is that of chance.  Of each, on test rows: the
accuracy on what was to go and on what stays; that of a logistic regression on the features, on the forgotten classes
(high where the head alone masks them; retraining says what it is of a model that never saw them); and how fast they
come back: the accuracy after so many steps on rows of all classes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import record

import undula
from undula.bundled import dataset
from undula.penalties import GroupLasso
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
    run = undula.Run(
        model=f"bundled:{case.model}", data=data, task=replace(case.task, names=names), method=undula.LoRA(r=8),
        lr=case.lr, head_lr=case.head_lr, max_steps=case.steps, batch=case.batch, where=case.where, out=out / "run",
        eval_every=0, eval_rows=100,
    )  # fmt: skip
    undula.train(run)
    merged(run.out, out / "whole")
    return out / "whole"


class Judge:
    """Measures models on fixed rows."""

    def __init__(self, case: Case, folder: Path, names: tuple[str, ...], parts: dict[str, Any], gone: set[str]):
        self.task = replace(case.task, names=names)
        self.names, self.batch = names, case.batch
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
        adapter = undula.attach(model, undula.LoRA(r=8), full=self.task.head(model))
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


def ascent(judge: Judge, folder: Path, out: Path, lr: float, most: int) -> tuple[Path, int]:
    """Plain gradient ascent on the rows to forget, until their validation accuracy is chance."""
    model, processor = open_model(str(folder), judge.task, torch.float32, 0)
    adapter = undula.attach(model, undula.LoRA(r=8))
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
    return out, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--requests", type=int, default=3, help="so many classes, one after another")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    case = CASES[args.case]
    if args.quick:
        case = replace(case, steps=40, forget_steps=20, rows=600)
        args.requests = 2
    begun = time.perf_counter()
    rows = dataset(case.data)
    task, parts = case.task.read(rows, "train", "validation", "test")
    names: tuple[str, ...] = task.names  # type: ignore[attr-defined]
    requests = [[name] for name in names[:: max(1, len(names) // args.requests)][: args.requests]]
    gone = {name for request in requests for name in request}
    most = {n: case.rows if n == "train" else min(1000, case.rows) for n in parts}
    small = type(parts)({n: p.shuffle(seed=0).select(range(min(most[n], len(p)))) for n, p in parts.items()})
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        spoken = type(small)({n: _spoken(part, names) for n, part in small.items()})
        spoken.save_to_disk(out / "data")
        without = {n: part.filter(lambda row: row["label"] not in gone) for n, part in spoken.items()}
        type(small)({**without, "test": spoken["test"]}).save_to_disk(out / "without")
        whole = taught(case, out / "data", names, out / "known")
        held = {n: small[n] for n in ("train", "test")} | {"validation": small.get("validation", small["test"])}
        judge = Judge(case, whole, names, held, gone)
        figures: dict[str, Any] = {"known": judge.all_of(whole, case.lr)}
        print("known", figures["known"], flush=True)
        run = undula.Run(
            model=str(whole), data=out / "data", task=case.task, method=undula.LoRA(r=8), where=case.where,
            lr=case.forget_lr, max_steps=case.forget_steps, batch=case.batch, penalty=GroupLasso(1e-2, after=0.2),
            eval_rows=500, out=out / "forgotten",
        )  # fmt: skip
        report = undula.forget(run, requests)
        for row in report["requests"]:
            print({k: v for k, v in row.items() if k != "groups"}, row["groups"], flush=True)
        last = out / "bases" / "after"
        merged(out / "forgotten" / "requests" / f"{len(requests):02}", last)
        figures["GS-LoRA"] = judge.all_of(last, case.lr)
        print("GS-LoRA", figures["GS-LoRA"], flush=True)
        figures["retrained"] = judge.all_of(taught(case, out / "without", names, out / "retrained"), case.lr)
        print("retrained", figures["retrained"], flush=True)
        up, steps = ascent(judge, whole, out / "ascent", case.lr, case.forget_steps)
        figures["ascent"] = {**judge.all_of(up, case.lr), "steps": steps}
        print("ascent", figures["ascent"], flush=True)
    kept = ("request", "forgotten_before", "forgotten", "kept_before", "kept", "h_mean", "earlier", "groups")
    told = [{k: row[k] for k in kept} for row in report["requests"]]
    seconds = round(time.perf_counter() - begun, 1)
    if args.json:
        record(
            args.json, {"case": args.case, "classes": len(names), "requests": told, "ways": figures, "seconds": seconds}
        )
    print(f"{seconds} s")


def _spoken(part: Any, names: tuple[str, ...]) -> Any:
    """The rows with their classes by name."""
    from datasets import Value

    labels = [names[i] for i in part["label"][:]]
    return part.remove_columns("label").add_column("label", labels, feature=Value("string"))


if __name__ == "__main__":
    main()
