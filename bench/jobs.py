"""What many jobs on one base cost, whole steps: together in one engine against one after the other.

    python bench/jobs.py --json bench/results/jobs.json     # SmolLM2 and MiniLM, N = 2 to 16: half an hour
    python bench/jobs.py --quick --clock cpu                # SmolLM2, N = 8, two sizes: about three minutes

Every job takes the same steps in two ways that take turns: `together`, in the way that the planner keeps after it has
tried some (those rounds are not in the time); `one by one`, the Trainer as `undula train` has it, a job alone, its time
for N of them.  `engine apart` is what the planner saw of one job after the other in the engine.  A size is the tokens
of a job's step; rows are cut to it.  Ratios are of the medians, with the smallest and largest of the rounds.  One by
one has the fast step that `undula train` takes, and none of its starts: to read the base N times is not in its time.
Memory: the largest resident set, while it trains, of a process that trains N jobs or one in the engine, and does no
more than that.  One thread unless --threads says more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import resident
import torch
from record import record
from transformers import TrainerCallback

import undula
from undula.jobs.engine import Engine
from undula.jobs.packing import FRUGAL
from undula.jobs.planner import apart, together
from undula.jobs.trial import APART, Tried
from undula.train import CausalLM, Classification, Run
from undula.train.prepared import prepare
from undula.train.trainer import trainer

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box")
STEPS = 2  # of one job alone, each time
TARGETS = ((16, 64, 1.5), (65, 128, 1.2))  # at N = 8: tokens of a job's step from, to, times as fast at least
NEVER_BELOW, MEMORY = 0.95, 1.3


def rows_of(kind: str, tokens: int, folder: Path) -> tuple[str, Any, int]:
    """(file, task, batch) of rows that come to about so many tokens in a step."""
    batch = 2 if tokens <= 32 else 4
    path = folder / f"{kind}-{tokens}.jsonl"
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(2 * tokens // batch)) for i in range(64)]
    if kind == "smollm2":
        lines = [{"text": text} for text in texts]
        task: Any = CausalLM(generate=0, max_length=tokens // batch)
    else:
        lines = [{"text": text, "label": "even" if i % 2 else "odd"} for i, text in enumerate(texts)]
        task = Classification(max_length=tokens // batch)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path), task, batch


def runs_of(kind: str, count: int, tokens: int, folder: Path) -> dict[str, Run]:
    data, task, batch = rows_of(kind, tokens, folder)
    place = tempfile.mkdtemp(dir=folder)
    return {
        f"job{i}": Run(
            model=f"bundled:{kind}", data=data, task=task, method=undula.LoRA(r=8), lr=1e-4 * (i + 1), seed=i,
            batch=batch, max_steps=1000, eval_every=0, eval_rows=1, out=Path(place) / f"job{i}",
        )
        for i in range(count)
    }  # fmt: skip


class Ticks(TrainerCallback):
    """The clock at each step, and an end after so many."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.at, self.until = clock, list[float](), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at.append(self.clock())
        control.should_training_stop = len(self.at) >= self.until


def alone(run: Run, clock: Callable[[], float]) -> Callable[[int], float]:
    """Seconds of so many steps of one job by the Trainer."""
    ready = prepare(run)

    def steps(count: int) -> float:
        ticks = Ticks(clock)
        ticks.until = count + 1
        fitter = trainer(run, ready.model, ready.train, (ticks,))
        fitter.args.save_strategy = "no"
        fitter.train()
        return ticks.at[-1] - ticks.at[0]

    return steps


def compared(kind: str, count: int, tokens: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """One size of one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = runs_of(kind, count, tokens, folder)
        engine = Engine(runs)
        engine.open()
        size = engine.base.size
        engine.rounds.clock = clock
        tried = Tried(FRUGAL, size, lambda: engine.rounds.spent, lambda: engine.round)
        single = alone(runs_of(kind, 1, tokens, folder)["job0"], clock)
        engine.rounds.planner = tried
        engine.step()
        (trial,) = tried.trials.values()
        while trial.next() is not None:
            engine.step()
        seconds: dict[str, list[float]] = {way: [] for way in ("together", "one by one")}
        for _ in range(rounds):
            engine.step()
            seconds["together"].append(engine.rounds.spent)
            seconds["one by one"].append(count * single(STEPS) / STEPS)
        way = trial.best()
        apart = min((t.seconds for t in trial.taken if t.way == APART and t.seconds), default=None)
        engine.base.close()
    median = {way: statistics.median(each) for way, each in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["together"], seconds["one by one"], strict=True)]
    return {
        "model": kind, "jobs": count, "tokens": tokens, "rounds": rounds, "seconds": median, "way": way,
        "tokens_per_second": {way: count * tokens / s for way, s in median.items()},
        "times_as_fast": median["one by one"] / median["together"], "spread": [min(ratios), max(ratios)],
        "against_engine_apart": apart and apart * count * tokens / median["together"], "tried": tried.encode(),
    }  # fmt: skip


def held(kind: str, count: int, tokens: int) -> None:
    """A process of its own: prints its largest resident set within a few steps, and how much of it is above what base
    and jobs took before them."""
    with tempfile.TemporaryDirectory() as name:
        engine = Engine(
            runs_of(kind, count, tokens, Path(name)),
            planner=lambda p: apart(p, FRUGAL) if count == 1 else together(p, FRUGAL),
        )
        engine.open()
        before = resident.begin()  # reading the base may have taken more than training does
        for _ in range(3):
            engine.step()
        print(json.dumps([resident.most(), resident.most() - before]))


def memory(kind: str, tokens: int) -> dict[str, Any]:
    asked = [[sys.executable, __file__, "--held", kind, str(n), str(tokens)] for n in (1, 8)]
    one, many = (json.loads(subprocess.run(a, capture_output=True, text=True, check=True).stdout) for a in asked)
    return {
        "model": kind, "tokens": tokens, "one": one[0], "eight": many[0], "ratio": many[0] / one[0],
        "one_above_base": one[1], "eight_above_base": many[1],
    }  # fmt: skip


def targets(found: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> dict[str, bool]:
    met = {}
    for low, high, least in TARGETS:
        mine = [f["times_as_fast"] for f in found if f["jobs"] == 8 and low <= f["tokens"] <= high]
        if mine:
            met[f"at least {least} times as fast at N = 8 with {low} to {high} tokens"] = min(mine) >= least
    met[f"never below {NEVER_BELOW}"] = all(f["times_as_fast"] >= NEVER_BELOW for f in found)
    if held:
        met[f"memory of N = 8 at most {MEMORY} of one job's"] = all(m["ratio"] <= MEMORY for m in held)
    return met


def told_of(each: dict[str, Any]) -> str:
    low, high = each["spread"]
    return (
        f"{each['model']:8} N={each['jobs']:<3} {each['tokens']:4} tokens a job and step: {each['times_as_fast']:.2f} "
        f"times as fast as one by one ({low:.2f} to {high:.2f}), "
        f"{each['against_engine_apart'] or float('nan'):.2f} as the engine apart; by {each['way']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="SmolLM2, N = 8, 16 and 128 tokens, no memory")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["smollm2", "minilm"], choices=["smollm2", "minilm"])
    parser.add_argument("--jobs", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 128, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--held", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked.threads)
    if asked.held:
        held(asked.held[0], int(asked.held[1]), int(asked.held[2]))
        return
    models = ["smollm2"] if asked.quick else asked.models
    counts, sizes = ((8,), (16, 128)) if asked.quick else (asked.jobs, asked.tokens)
    rounds = 2 if asked.quick else asked.rounds
    found: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []

    def keep() -> None:
        """After each size: a bench that is stopped keeps what it had."""
        if asked.json:
            told = {"found": found, "memory": kept, "targets_met": targets(found, kept)}
            record(asked.json, {"threads": asked.threads, "clock": asked.clock, **told})

    for kind in models if not asked.quick else ():
        kept.append(memory(kind, 64))
        print(f"{kind:8} N=8 takes {kept[-1]['ratio']:.2f} of one job's memory", flush=True)
    for count, kind, tokens in itertools.product(counts, models, sizes):
        found.append(compared(kind, count, tokens, rounds, CLOCKS[asked.clock]))
        print(told_of(found[-1]), flush=True)
        keep()
    for text, yes in targets(found, kept).items():
        print(f"{'met' if yes else 'MISSED'}: {text}")


if __name__ == "__main__":
    main()
