"""What a fine-tuning costs, whole steps on real rows: `undula train` against PEFT in transformers' Trainer and TRL.

    python bench/finetune.py --json bench/results/finetune.json         # everything: give it an hour
    python bench/finetune.py --case docstrings --json ...               # one case: about five minutes of two cores
    python bench/finetune.py --quick                                    # two cases, few steps, no memory: two minutes

All ways train the same rows in the same number of steps from the same adapter (PEFT loads the one that ours begins
with), by the same rate, schedule, clipping and optimiser.  What is timed is the whole call that trains: reading rows,
collating, steps, logging, a checkpoint in the end.  All rows were tokenised before: the peers' by this program, our
own by the look at them that every run begins with.  Ways take turns in one process; a round begins at the first adapter
again and draws its own order of rows, the first is for warmth.  Peers are as their users get them: batches in the order
drawn, each padded to its longest row.  Memory: the largest resident set while it trains, of a process that does nothing
else.

The limit is arithmetic alone: every frozen matrix forward and to its input's gradient (4 operations for a parameter and
a real token; 2 in the first layer, whose input wants no gradient), the vocabulary's matrix on rows whose label counts,
at the rate of one 1024 x 1024 x 1024 product in the same round and type.  Attention, norms, factors, poolers, heads
that train and the optimiser are not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import resident
import torch
from record import record

import undula
from undula.kernels.units import has_bfloat16
from undula.train import fit
from undula.train.checkpoints import restore
from undula.train.prepared import prepare
from undula.train.quality import quality_of
from undula.train.recipe import Recipe
from undula.train.tasks.causal_lm import CausalLM
from undula.train.tasks.classification import Classification
from undula.train.tasks.image_classification import ImageClassification
from undula.train.tasks.shown import IGNORED
from undula.train.tasks.task import Task

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOSS = 0.02  # by how much two ways' losses may differ, of themselves: the order of the rows is a way's own
HELD = 24  # rows that the loss afterwards is taken on


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained on what."""

    model: str
    data: str
    task: Task
    batch: int
    steps: int
    lr: float = 1e-3
    where: Any = "all-linear"
    language: bool = False

    def run(self, out: Path, dtype: str, seed: int = 0, plain: bool = False) -> undula.Run:
        """The run that all ways are variants of; a single checkpoint, and no evaluation between."""
        way: dict[str, Any] = {"plain": True} if plain and HAS_PLAIN else {}
        return undula.Run(
            **way,
            model=f"bundled:{self.model}", data=f"bundled:{self.data}", task=self.task, method=undula.LoRA(r=8),
            where=self.where, lr=self.lr, batch=self.batch, epochs=1.0, train_rows=self.batch * self.steps,
            eval_rows=HELD, eval_every=0, save_every=self.steps, dtype=dtype, seed=seed, out=out,
        )  # fmt: skip


HAS_PLAIN = any(f.name == "plain" for f in dataclasses.fields(Recipe))
CONVOLUTIONS = ("stem", "expand", "project", "top")
CASES = {
    "docstrings": Case("smollm2", "docstrings", CausalLM(generate=0), 4, 8, language=True),
    "summaries": Case("smollm2", "debian-synopsis", CausalLM(generate=0), 4, 8, language=True),
    "wordnet": Case("minilm", "wordnet", Classification(), 16, 16),
    "reviews": Case("minilm", "rotten-tomatoes", Classification(), 16, 16),
    "images": Case("efficientnet-lite0", "fashion-mnist", ImageClassification(size=64), 32, 8, 3e-3, CONVOLUTIONS),
}
WAYS = ("undula", "plain", "attach", "peft", "trl")
CALLED = {
    "undula": "undula train", "plain": "undula train --plain", "attach": "undula.attach, Trainer",
    "peft": "PEFT, Trainer", "trl": "PEFT, TRL SFTTrainer",
}  # fmt: skip


class Way:
    """One way to train, with a model of its own in memory."""

    def __init__(self, name: str, case: Case, dtype: str, folder: Path):
        self.name, self.case, self.folder, self.rounds = name, case, folder / name, 0
        run = case.run(self.folder, dtype, plain=name != "undula")
        self.ready = prepare(run)
        self.first = folder / "first"
        if not self.first.is_dir():  # the same adapter for all
            self.ready.adapter.save(self.first, base=run.model, task=run.task.peft)
        self.model: Any = self.ready.model
        self.start: list[tuple[torch.Tensor, torch.Tensor]] = []
        if name in ("attach", "peft", "trl"):
            undula.detach(self.model)
            _as_stored(self.model)
            self.model = _adapted(name, self.model, self.first, folder / "lora")
            _keep_statistics(self.model)
            self.rows = [self.ready.train[i] for i in range(len(self.ready.train))]  # made once, by no one's clock
            self.start = [(p, p.detach().clone()) for p in self.model.parameters() if p.requires_grad]

    def train(self, clock: Callable[[], float]) -> tuple[float, float]:
        """(seconds, mean loss) of one training from the first adapter."""
        self.rounds += 1
        out = self.folder / f"round-{self.rounds}"
        run = dataclasses.replace(self.ready.run, out=out, seed=self.rounds)
        if not self.start:
            restore(self.ready.adapter, undula.Adapter.load(self.first))
            begun = clock()
            _, course = fit._fit(dataclasses.replace(self.ready, run=run), False, ())
            spent = clock() - begun
            steps, losses = course["steps"], [loss for _, loss in course["losses"]]
        else:
            with torch.no_grad():
                for p, at_first in self.start:
                    p.copy_(at_first)
            begun = clock()
            state = self._peer(run)
            spent = clock() - begun
            steps, losses = state.global_step, [e["loss"] for e in state.log_history if "loss" in e]
        if steps != self.case.steps or len(losses) != steps:
            raise AssertionError(f"{self.name} took {steps} steps, {self.case.steps} were to be taken")
        return spent, statistics.fmean(losses)

    def _peer(self, run: undula.Run) -> Any:
        from datasets import Dataset
        from transformers import Trainer, TrainingArguments

        settings: dict[str, Any] = {
            "output_dir": str(run.out), "learning_rate": run.lr, "num_train_epochs": 1, "warmup_steps": run.warmup,
            "per_device_train_batch_size": run.batch, "max_grad_norm": 1.0, "seed": run.seed, "data_seed": run.seed,
            "save_steps": run.save_every, "logging_steps": 1, "report_to": [], "disable_tqdm": True,
            "remove_unused_columns": False, "dataloader_pin_memory": False, "bf16": False,
        }  # fmt: skip
        if self.name == "attach":
            settings["save_strategy"] = "no"  # it would write the whole model
        if self.name == "trl":
            from trl import SFTConfig, SFTTrainer

            rows = Dataset.from_list([{k: r[k] for k in ("input_ids", "labels")} for r in self.rows])
            arguments = SFTConfig(  # it would compute activations twice and cast to bf16, if not told otherwise
                **settings, gradient_checkpointing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
            )
            trainer = SFTTrainer(self.model, arguments, train_dataset=rows, processing_class=self.ready.processor)
        else:
            trainer = Trainer(
                self.model,
                TrainingArguments(**settings),
                train_dataset=self.rows,  # type: ignore[arg-type]
                data_collator=self.ready.train.task.collator(self.ready.processor),  # type: ignore[arg-type]
            )
        trainer.remove_callback(_printer())
        trainer.train()
        return trainer.state

    def held(self) -> float:
        """The loss on rows that were not trained on, by the same function for all."""
        return -quality_of(self.model, self.ready.held)()


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def _adapted(name: str, model: Any, first: Path, folder: Path) -> Any:
    adapter = undula.Adapter.load(first)
    if name == "attach":
        undula.attach(model, adapter)
        return model
    from peft import PeftModel

    if not folder.is_dir():
        undula.io.export_lora(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        # B is 0, so the scale may stand where it stands in ours: outside, where it is no part of what is learned
        config["lora_alpha"] = adapter.method.alpha
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def _as_stored(model: torch.nn.Module) -> None:
    """Weights in the layout that `from_pretrained` gives them."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous()


def _keep_statistics(model: torch.nn.Module) -> None:
    """As `undula train` does: else the ways would train different functions."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is in the rows of one training."""

    tokens: int  # real ones; images for images
    labels: int
    padded: int  # tokens of batches as they come, each as long as its longest row
    operations: float  # see the module


def work(way: Way) -> Work:
    """Counted from the rows as the model gets them, and the layers that read them."""
    case, model = way.case, way.ready.model
    rows = [way.ready.train[i] for i in range(len(way.ready.train))]
    body = model.base_model
    if "pixel_values" in rows[0]:
        image = torch.as_tensor(rows[0]["pixel_values"])[None].to(model.dtype)
        return Work(len(rows), len(rows), len(rows), len(rows) * operations(body, pixel_values=image))
    lengths = [len(row["input_ids"]) for row in rows]
    padded = sum(max(lengths[i : i + case.batch]) * case.batch for i in range(0, len(rows), case.batch))
    each = operations(body, input_ids=torch.tensor([rows[0]["input_ids"]])) / lengths[0]
    if not case.language:
        return Work(sum(lengths), len(rows), padded, each * sum(lengths))
    labels = sum(sum(label != IGNORED for label in row["labels"][1:]) for row in rows)
    head = model.get_output_embeddings().weight.numel()
    return Work(sum(lengths), labels, padded, each * sum(lengths) + 4.0 * head * labels)


def operations(body: Any, **given: torch.Tensor) -> float:
    """Of an adapted model's frozen matrices, for one row: forward, and as many to an input that wants a gradient."""
    found = [0.0]

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if not module.weight.requires_grad:  # PEFT's factors are layers too
            found[0] += 2.0 * output.numel() * module.weight[0].numel() * (1 + inputs[0].requires_grad)

    kinds = torch.nn.Linear, torch.nn.Conv2d
    layers = [m for n, m in body.named_modules() if isinstance(m, kinds) and "pooler" not in n]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        body(**given)
    finally:
        for handle in handles:
            handle.remove()
    return found[0]


def rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations a second of a product of 1024 x 1024 x 1024, the best of three."""
    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(3):
        begun = clock()
        for _ in range(4):
            a @ b
        best = max(best, 4 * 2 * 1024**3 / (clock() - begun))
    return best


def timed(case: Case, names: list[str], args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Seconds, losses and rates of every round, ways in turn, after a round for warmth."""
    clock = CLOCKS[args.clock]
    found: dict[str, Any] = {"rates": [], **{n: {"seconds": [], "loss": [], "held": []} for n in names}}
    with tempfile.TemporaryDirectory() as folder:
        ways = {n: Way(n, case, dtype, Path(folder)) for n in names}
        found["work"] = work(next(iter(ways.values())))
        gc.collect()
        gc.freeze()  # each Trainer has all objects looked through when it begins: here those of every way
        for i in range(args.rounds + 1):
            found["rates"].append(rate(DTYPES[dtype], clock))
            for n in names if i % 2 else reversed(names):
                spent, loss = ways[n].train(clock)
                if i:
                    found[n]["seconds"].append(spent)
                    found[n]["loss"].append(loss)
                    found[n]["held"].append(ways[n].held())
                gc.collect()
            print(f"  round {i} of {args.rounds}", file=sys.stderr, flush=True)
    return found


def peak(case: Case, name: str, dtype: str) -> tuple[float, float]:
    """(MiB of the whole process at most while it trains, MiB above what the model takes), in this process."""
    with tempfile.TemporaryDirectory() as folder:
        way = Way(name, case, dtype, Path(folder))
        before = resident.begin()
        way.train(time.perf_counter)
        most = resident.most()
    return most / 2**20, (most - before) / 2**20


def middle(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {"median": statistics.median(ordered), "low": ordered[quarter], "high": ordered[-1 - quarter]}


def ratios(a: list[float], b: list[float]) -> dict[str, float]:
    return middle([x / y for x, y in zip(a, b, strict=True)])


def spread(faster: dict[str, float] | None) -> str:
    if faster is None:
        return ""
    return f"{faster['median']:5.2f} ({faster['low']:.2f}-{faster['high']:.2f}) x as fast as PEFT"


def report(title: str, names: list[str], found: dict[str, Any], memory: dict[str, Any], case: Case) -> dict[str, Any]:
    """One case and type as a table, printed, and as a record."""
    done: Work = found["work"]
    limits = [done.operations / rate / case.steps for rate in found["rates"][1:]]
    limit = statistics.median(limits)
    unit = "images" if done.tokens == done.labels else "tokens"
    print(
        f"\n{title}: {case.steps} steps of {case.batch} rows, {done.tokens} real {unit} ({done.padded} with padding as "
        f"they come), {done.labels} labels; limit {limit:.3f} s a step at {found['rates'][-1] / 1e9:.0f} GFLOP/s"
    )
    rows = []
    for n in names:
        row: dict[str, Any] = {"way": n, "called": CALLED[n]}
        if n in memory:
            row |= {"memory_mib": memory[n][0], "memory_above_model_mib": memory[n][1]}
        if n in found:
            spent = found[n]["seconds"]
            row |= {
                "step_seconds": middle([s / case.steps for s in spent]),
                f"{unit}_per_second": done.tokens / statistics.median(spent),
                "x limit": ratios([s / case.steps for s in spent], limits),
                "loss": middle(found[n]["loss"]),
                "held_loss": middle(found[n]["held"]),
            }
            if "peft" in found:
                row["faster than PEFT, Trainer"] = ratios(found["peft"]["seconds"], spent)
            faster, times = row.get("faster than PEFT, Trainer"), row["x limit"]["median"]
            print(
                f"  {CALLED[n]:24} {row['step_seconds']['median']:7.3f} s a step {row[f'{unit}_per_second']:7.0f} "
                f"{unit}/s  x limit {times:5.2f}  {spread(faster)}  loss {row['loss']['median']:.4f}, held out "
                f"{row['held_loss']['median']:.4f}",
                end="",
            )
        print(f"  {memory[n][0]:6.0f} MiB ({memory[n][1]:.0f} above the model)" if n in memory else "")
        rows.append(row)
    return {
        "steps": case.steps, "batch": case.batch, "real": done.tokens, "unit": unit, "with padding": done.padded,
        "labels": done.labels, "limit_seconds": limit, "gflops": statistics.median(found["rates"]) / 1e9, "ways": rows,
    }  # fmt: skip


def judged(name: str, dtype: str, made: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The aims that this case can tell of.  `met` is None where this machine has no units for it."""
    ways = {row["way"]: row for row in made["ways"]}
    ours, peft = ways.get("undula", {}), ways.get("peft", {})
    units, language = has_bfloat16(), CASES[name].language
    none = dtype == "bfloat16" and not units

    def aim(what: str, figure: float, bound: float, above: bool, applies: bool = True) -> dict[str, Any]:
        met = None if not applies else figure >= bound if above else figure <= bound
        return {"case": name, "dtype": dtype, "aim": what, "found": figure, "bound": bound, "met": met}

    if "step_seconds" in ours and "step_seconds" in peft:
        times = 5.0 if language and dtype == "bfloat16" else 2.5 if language else 1.5
        yield aim("times as fast as PEFT, Trainer", ours["faster than PEFT, Trainer"]["median"], times, True, not none)
        for loss in ("loss", "held_loss"):
            off = abs(ours[loss]["median"] / peft[loss]["median"] - 1)
            yield aim(f"{loss} as PEFT's, relative difference", off, LOSS, False)
    if "step_seconds" in ours and language:
        bound = 2.0 if dtype == "float32" else 3.0
        yield aim("times the arithmetic limit", ours["x limit"]["median"], bound, False, not none)
    if "memory_mib" in ours and "memory_mib" in peft:
        for figure, said in (("memory_mib", "whole process"), ("memory_above_model_mib", "above the model")):
            yield aim(f"memory of PEFT, Trainer's, {said}", ours[figure] / peft[figure], 0.6, False)


def quick(args: argparse.Namespace) -> None:
    args.case, args.rounds, args.no_memory = args.case or ["docstrings", "wordnet"], 2, True
    args.steps, args.length = args.steps or 2, args.length or 192


def sized(case: Case, args: argparse.Namespace) -> Case:
    """The case in the size that is asked for."""
    task = case.task
    if args.length and hasattr(task, "max_length"):
        short = {"max_completion": args.length // 4, "max_length": args.length} if case.language else {}
        task = dataclasses.replace(task, **(short or {"max_length": args.length}))
    return dataclasses.replace(case, task=task, steps=args.steps or case.steps, batch=args.batch or case.batch)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=CASES)
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=["float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int, help="tokens of a row at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true", help="peak memory alone, which other work does not disturb")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", nargs=3, metavar=("CASE", "DTYPE", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    logging.getLogger("undula").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if args.quick:
        quick(args)
    if args.peak:
        name, dtype, way = args.peak
        print(*peak(sized(CASES[name], args), way, dtype))
        return
    made, aims = {}, []
    for dtype in args.dtype:
        for name in args.case or CASES:
            case = sized(CASES[name], args)
            left = {"trl"} if not case.language else set()
            left |= set() if HAS_PLAIN else {"plain"}
            names = [n for n in args.only if n not in left]
            memory = {} if args.no_memory else {n: measured(args, name, dtype, n) for n in names}
            found = untimed(case, dtype) if args.no_time else timed(case, names, args, dtype)
            made[f"{name}, {dtype}"] = report(f"{name}, {dtype}", names, found, memory, case)
            aims += judged(name, dtype, made[f"{name}, {dtype}"])
    for a in aims:
        said = "not applicable here" if a["met"] is None else "met" if a["met"] else "MISSED"
        print(f"{said:20} {a['case']:12} {a['dtype']:9} {a['aim']:44} {a['found']:.3f} ({a['bound']})")
    if args.json:
        figures = {
            "threads": args.threads,
            "clock": args.clock,
            "bf16_units": has_bfloat16(),
            "targets_met": all(a["met"] is not False for a in aims),
            "targets": aims,
            "cases": made,
        }
        record(args.json, figures)


def untimed(case: Case, dtype: str) -> dict[str, Any]:
    """The rows alone."""
    with tempfile.TemporaryDirectory() as folder:
        done = work(Way("undula", case, dtype, Path(folder)))
    return {"work": done, "rates": [rate(DTYPES[dtype], time.perf_counter) for _ in range(2)]}


def measured(args: argparse.Namespace, name: str, dtype: str, way: str) -> tuple[float, ...]:
    command = [sys.executable, __file__, "--threads", str(args.threads)]
    for option in ("steps", "batch", "length"):
        command += [f"--{option}", str(value)] if (value := getattr(args, option)) else []
    found = subprocess.run([*command, "--peak", name, dtype, way], capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{way} of {name} in {dtype}: {found.stderr[-2000:]}")
    return tuple(float(figure) for figure in found.stdout.split()[-2:])


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
