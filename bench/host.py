"""What many adapters on one model cost: attaching the n-th, and decoding a batch whose rows have each their own.

    python bench/host.py --json bench/results/host.json

On SmolLM2-135M with LoRA r=8 on all linear layers.  Attach, select and detach are timed for the first and the last of
`--adapters`; the first of PEFT's `add_adapter` and a later one stand beside them.  Decoding is one token per row for 16
rows without a cache: the base, one adapter for all rows, and 16 different ones through `rows`; PEFT's `adapter_names`
likewise.  Entering a batch of `--rows-adapters` adapters on `--rows-layers` tiny layers is timed by itself.
Medians of ratios within one round, all variants interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import record, tell
from step import CLOCKS, base, ratios  # the benchmark beside this one

import undula

ROWS = 16


def seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def lifecycle(count: int) -> tuple[torch.nn.Module, dict[str, float]]:
    """Attaches `count` adapters; returns the model with them and what single operations cost."""
    model, _ = base("lm-4x128")
    # rank 8 where it is timed or decoded with, rank 1 between, so that a thousand fit into memory
    methods = [undula.LoRA(r=8 if min(i, count - 1 - i) < ROWS else 1) for i in range(count)]
    attach = [seconds(lambda i=i, m=m: undula.attach(model, m, name=str(i))) for i, m in enumerate(methods)]
    ends = range(5), range(count - 5, count)
    first, last = ([statistics.median(seconds(lambda i=i: undula.select(model, str(i))) for i in e)] for e in ends)
    detached = seconds(lambda: undula.detach(model, str(count - 1)))
    figures = {
        "attach first": statistics.median(attach[1:6]),
        "attach last": statistics.median(attach[-5:]),
        "select first": first[0],
        "select last": last[0],
        "detach last": detached,
    }
    return model, figures


def peft_adding(count: int) -> dict[str, float]:
    """Seconds of PEFT's first and count-th add_adapter."""
    import peft

    model, _ = base("lm-4x128")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config, adapter_name="0")
    spent = [seconds(lambda i=i: wrapped.add_adapter(str(i), config)) for i in range(1, count)]
    return {"peft add first": spent[0], f"peft add {count}th": spent[-1]}


@torch.no_grad()
def decoding(model: torch.nn.Module, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds per decoded token of 16 rows, variants interleaved."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(base("lm-4x128")[0], config, adapter_name="0").eval()
    for i in range(1, ROWS):
        theirs.add_adapter(str(i), config)
    model.eval()
    ids = torch.randint(5, 40000, (ROWS, 1))
    names = [str(i) for i in range(ROWS)]
    for i in range(ROWS):
        value = undula.adapters(model)[str(i)].copy()
        for f in value.factors.values():
            f["B"].normal_(std=0.01)
        undula.attach(model, value, name=f"frozen {i}", frozen=True)
    routed = {"16 adapters": names, "16 frozen adapters": [f"frozen {name}" for name in names]}
    variants: dict[str, Callable[[], object]] = {
        "base": lambda: model(input_ids=ids),
        "one adapter": lambda: model(input_ids=ids),
        "16 adapters": lambda: model(input_ids=ids),
        "16 frozen adapters": lambda: model(input_ids=ids),
        "peft 16 adapters": lambda: theirs(input_ids=ids, adapter_names=names),
    }
    spent: dict[str, list[float]] = {n: [] for n in variants}
    for i in range(rounds + 2):
        for n, go in variants.items():
            undula.select(model, "0" if n == "one adapter" else None)
            with undula.rows(model, routed[n]) if n in routed else _nothing():
                go()  # the first token enters the context; the ones after it are what decoding costs
                start = clock()
                go()
                if i > 1:
                    spent[n].append(clock() - start)
    return spent


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@torch.no_grad()
def entering(adapters: int, layers: int, rounds: int, frozen: bool) -> dict[str, float]:
    """Seconds of entering `rows` with as many adapters as rows on a model of many tiny layers, of the first forward
    there and of a later one, and of the base's; medians.  The adapters are live, or frozen ones in stacks."""
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(layers))).eval()
    for i in range(adapters):
        undula.attach(model, undula.LoRA(r=4), name=str(i))
        if frozen:
            undula.attach(model, undula.detach(model, str(i)), name=str(i), frozen=True)
    undula.select(model, None)
    x, names = torch.randn(adapters, 16), [str(i) for i in range(adapters)]
    spent: dict[str, list[float]] = {"base": [], "enter": [], "first forward": [], "later forward": [], "leave": []}
    for i in range(rounds + 1):
        found = {"base": seconds(lambda: model(x))}
        context = undula.rows(model, names)
        found["enter"] = seconds(context.__enter__)
        found["first forward"], found["later forward"] = (seconds(lambda: model(x)) for _ in range(2))
        found["leave"] = seconds(lambda c=context: c.__exit__(None, None, None))
        for name, value in found.items() if i else ():
            spent[name].append(value)
    return {name: statistics.median(values) for name, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--peft-adapters", type=int, default=16)
    parser.add_argument("--rows-adapters", type=int, default=256, help="of the batch that is entered")
    parser.add_argument("--rows-layers", type=int, default=210)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, figures = lifecycle(args.adapters)
    figures |= peft_adding(args.peft_adapters)
    for name, value in figures.items():
        print(f"{name:20} {value * 1e3:10.1f} ms")
    entered = {
        kind: entering(args.rows_adapters, args.rows_layers, args.rounds, kind == "frozen")
        for kind in ("live", "frozen")
    }
    for kind, spent in entered.items():
        for name, value in spent.items():
            print(f"rows, {args.rows_adapters} {kind} x {args.rows_layers} layers: {name:14} {value * 1e3:8.1f} ms")
    decoded = decoding(model, args.rounds, CLOCKS[args.clock])
    decode = {n: ratios(s, decoded["base"]) for n, s in decoded.items()}
    for n, r in decode.items():
        print(f"decode {n:18} x base {r['median']:.3f} ({r['low']:.3f}-{r['high']:.3f})")
    targets = {
        "attach last / first <= 1.5": figures["attach last"] / figures["attach first"],
        "select last / first <= 1.5": figures["select last"] / figures["select first"],
        "decode 16 frozen adapters / base <= 1.15": decode["16 frozen adapters"]["median"],
        "ms to enter rows of frozen adapters, and what its first forward takes more <= 10": 1e3
        * (entered["frozen"]["enter"] + entered["frozen"]["first forward"] - entered["frozen"]["later forward"]),
    }
    met = {n: v <= float(n.rpartition(" ")[2]) for n, v in targets.items()}
    tell(targets, met)
    if args.json:
        result = {
            "threads": args.threads,
            "clock": args.clock,
            "targets_met": all(met.values()),
            "targets": targets,
            "seconds": figures,
            "seconds of rows": entered,
            "decode / base": decode,
        }
        record(args.json, result)


if __name__ == "__main__":
    main()
