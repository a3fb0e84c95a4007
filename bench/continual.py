"""Three real tasks in sequence with one encoder: what is left of the first ones.

    python bench/continual.py --json bench/results/continual.json          # about ten minutes of one core
    python bench/continual.py --json F --arms plain gorp --seeds 0         # rows that F holds are not made again
    python bench/continual.py --short                                      # a miniature, to see that it runs
    python bench/continual.py --json F --table

MiniLM learns WordNet glosses, film reviews and Debian sections one after the other, each with a head of its own that
stays as it was when its task ended.  What forgets is the encoder's adapter (all linear layers, r = 8):

    plain   one LoRA, trained on
    olora   a LoRA for each task, the earlier ones merged, with `undula.penalties.OrthogonalToEarlier` against their A
    merged  the same without the penalty: what a LoRA for each task does by itself
    gorp    one LoRA under GORP (energy 0.95), closed after each task
    osf     PEFT's orthogonal subspace fine-tuning: 1/2, 2/3, 5/6 of the directions frozen, merged after each task
    apart   an adapter for each task, on the encoder as it was: what there is to keep

Of each: accuracy over the tasks after the last one, and backward transfer, the mean change of a task's accuracy between
its own end and the last.  Rates are the same for all (osf's, which trains matrices, is lower) and were not swept.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import kept, record
from torch import Tensor, nn

import undula
from undula.bundled import dataset, model_path
from undula.optim.gorp import GORP
from undula.penalties import OrthogonalToEarlier

TASKS = ("wordnet", "rotten-tomatoes", "debian-section")
ARMS = ("plain", "olora", "merged", "gorp", "osf", "apart")
RATES = {"osf": 3e-4}
SHARES = (1 / 2, 2 / 3, 5 / 6)  # of the directions that osf freezes, task by task
LR, HEAD_LR, LENGTH, BATCH = 3e-3, 1e-2, 32, 16
SHORT = {"steps": 2, "rows": 32, "seeds": [0]}


class Task:
    """Its rows as tokens, in two parts."""

    def __init__(self, name: str, tokenizer: Any, train: int, test: int):
        rows = dataset(name)
        self.classes = len(rows["train"].features["label"].names)
        self.train, self.test = (
            self._read(rows[part].shuffle(seed=0).select(range(n)), tokenizer)
            for part, n in (("train", train), ("test", test))
        )

    @staticmethod
    def _read(rows: Any, tokenizer: Any) -> dict[str, Tensor]:
        words = tokenizer(
            rows["text"][:], max_length=LENGTH, truncation=True, padding="max_length", return_tensors="pt"
        )
        return {"ids": words["input_ids"], "mask": words["attention_mask"], "label": torch.tensor(rows["label"][:])}


class Encoder(nn.Module):
    """A body, and a head for each task."""

    def __init__(self, classes: list[int]):
        super().__init__()
        from transformers import AutoModel

        self.body: Any = AutoModel.from_pretrained(model_path("minilm")).requires_grad_(False)
        self.heads = nn.ModuleList(nn.Linear(self.body.config.hidden_size, n) for n in classes)

    def forward(self, task: int, ids: Tensor, mask: Tensor) -> Tensor:
        width = int(mask.sum(1).max())
        mask = mask[:, :width]
        states = self.body(input_ids=ids[:, :width], attention_mask=mask).last_hidden_state
        return self.heads[task]((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Arm:
    """How the encoder is trained on one task after another."""

    def __init__(self, name: str, model: Encoder, scratch: Path):
        self.name, self.model, self.rate, self.scratch = name, model, RATES.get(name, LR), scratch
        self.before: list[str] = []  # directories of the adapters of earlier tasks
        self.bases: dict[str, Tensor] = {}
        self.adapter: Any = None

    def begin(self, task: int) -> torch.optim.Optimizer:
        body = self.model.body
        if self.name == "osf":
            from peft import OSFConfig, get_peft_model

            kept = OSFConfig(effective_rank=SHARES[task], target_modules="all-linear")
            self.model.body = get_peft_model(body, kept)
            trained = [p for p in self.model.body.parameters() if p.requires_grad]
        else:
            if self.name in ("olora", "merged", "apart") or self.adapter is None:
                self.adapter = undula.attach(body, undula.LoRA(r=8))
            trained = self.adapter.parameters()
        self.model.heads.requires_grad_(False)
        head = list(self.model.heads[task].requires_grad_(True).parameters())
        groups = [{"params": trained, "lr": self.rate}, {"params": head, "lr": HEAD_LR}]
        if self.name == "gorp":
            return GORP(groups, body, energy=0.95, bases=self.bases, weight_decay=0.0)
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def penalty(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """What is lowered beside the loss, at work; None for nothing."""
        if self.name != "olora" or not self.before:
            return None
        return OrthogonalToEarlier(earlier=tuple(self.before)).start(self.model.body, optimizer, steps)

    def end(self, optimizer: torch.optim.Optimizer) -> None:
        if self.name == "gorp":
            self.bases = optimizer.close_task()  # type: ignore[attr-defined]
        elif self.name == "olora":
            place = self.scratch / str(len(self.before))
            self.adapter.save(place)
            self.before.append(str(place))
            undula.merge(self.model.body, keep=False)
        elif self.name == "merged":
            undula.merge(self.model.body, keep=False)
        elif self.name == "osf":
            self.model.body = self.model.body.merge_and_unload().requires_grad_(False)
        elif self.name == "apart":
            undula.detach(self.model.body)


def learn(arm: Arm, number: int, task: Task, steps: int, seed: int) -> torch.optim.Optimizer:
    optimizer = arm.begin(number)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5) * (1 - step / steps))
    order = torch.randperm(len(task.train["label"]), generator=torch.Generator().manual_seed(seed))
    course = arm.penalty(optimizer, steps)
    arm.model.train()
    for step in range(steps):
        if course is not None:
            course.before_forward()
        at = order[(step * BATCH + torch.arange(BATCH)) % len(order)]
        logits = arm.model(number, task.train["ids"][at], task.train["mask"][at])
        nn.functional.cross_entropy(logits, task.train["label"][at]).backward()
        if course is not None:
            course.before_update()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        if course is not None:
            course.after_update()
        schedule.step()
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def right(model: Encoder, number: int, task: Task) -> float:
    model.eval()
    found = [
        (model(number, ids, mask).argmax(1) == label)
        for ids, mask, label in zip(*(task.test[k].split(64) for k in ("ids", "mask", "label")), strict=True)
    ]
    return float(torch.cat(found).double().mean())


def row(name: str, tasks: list[Task], steps: int, seed: int, scratch: Path) -> dict[str, Any]:
    """Accuracies [after task][of task], of those that were learnt by then."""
    begun = time.process_time()
    torch.manual_seed(seed)
    model = Encoder([task.classes for task in tasks])
    arm, after = Arm(name, model, scratch), []
    for number, task in enumerate(tasks):
        optimizer = learn(arm, number, task, steps, seed)
        if name == "apart":  # each task's own adapter answers for it
            after.append([*(after[-1] if after else []), right(model, number, task)])
        else:
            after.append([right(model, n, tasks[n]) for n in range(number + 1)])
        arm.end(optimizer)
    return {"arm": name, "seed": seed, "after": after, "cpu_seconds": round(time.process_time() - begun, 1)}


def figures(made: dict[str, Any]) -> dict[str, float]:
    """Average accuracy and backward transfer of a row."""
    last, own = made["after"][-1], [each[-1] for each in made["after"]]
    moved = [a - b for a, b in zip(last[:-1], own[:-1], strict=True)]
    return {"accuracy": statistics.fmean(last), "transfer": statistics.fmean(moved)}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| | {' | '.join(TASKS)} | average | backward transfer | by seed |"
    yield "|---|" + "---|" * (len(TASKS) + 3)
    for arm in ARMS:
        if those := [r for r in rows if r["arm"] == arm]:
            each = [statistics.fmean(r["after"][-1][n] for r in those) for n in range(len(TASKS))]
            mean = [statistics.fmean(figures(r)[k] for r in those) for k in ("accuracy", "transfer")]
            seeds = ", ".join(f"{figures(r)['accuracy']:.3f}" for r in those)
            numbers = " | ".join(f"{x:.3f}" for x in (*each, mean[0]))
            yield f"| `{arm}` | {numbers} | {mean[1]:+.3f} | {seeds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=200, help="test rows of each task")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what is there, and make nothing")
    args = parser.parse_args()
    if args.short:
        vars(args).update(SHORT)
    torch.set_num_threads(1)
    how = {"tasks": list(TASKS), "steps": args.steps, "test_rows": args.rows}
    rows = kept(args.json, how)
    there = {(r["arm"], r["seed"]) for r in rows}
    wanted = [(a, s) for s in args.seeds for a in args.arms if (a, s) not in there and not args.table]
    if wanted:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
        tasks = [Task(name, tokenizer, args.steps * BATCH, args.rows) for name in TASKS]
    for arm, seed in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(row(arm, tasks, args.steps, seed, Path(scratch)))
        print(arm, seed, figures(rows[-1]), rows[-1]["cpu_seconds"], flush=True)
        if args.json:
            record(args.json, {**how, "rows": rows})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
