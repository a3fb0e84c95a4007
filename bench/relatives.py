"""One real run of every method, start and allocator: MiniLM learns WordNet glosses for 300 steps.

    python bench/relatives.py --json bench/results/relatives.json               # everything, about an hour on one core
    python bench/relatives.py --only VeRA NOLA --json /tmp/two.json             # some; a file that exists is added to

Each run saves its adapter; a new process loads it, measures it again, merges it and, where the method stands on the
LowRank rung, exports it as a plain PEFT LoRA that PEFT alone reads.  The learning rates are one per method, not swept:
this table shows that each method learns, not which is best (`undula study` does that).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from record import record

import undula
from undula import Centred, LoRA, Method, ranks
from undula.core.wrapper import Wrapper
from undula.ranks import Allocator
from undula.starts import Gaussian, Kaiming, Start
from undula.train import Classification, Run

RATE, HEAD_RATE, STEPS = 3e-3, 3e-2, 300
# what does not learn well at RATE: small frozen bases want more, dense entries and large starts less
RATES = {
    **dict.fromkeys(("VeRA", "TeRA"), 3e-2),
    **dict.fromkeys(("UniLoRA", "LoRASB"), 1e-2),
    **dict.fromkeys(("LoRAXS", "rsLoRA", "SHiRA", "S2FT"), 1e-3),
    **dict.fromkeys(("SineLoRA", "AuroRAStatic", "LoRA from LoRAGA"), 3e-4),
}
ALLOCATED = (  # an allocator and what it works on; rounds, cycles and totals for so short a run
    (undula.AdaLoRA(), ranks.AdaLoRA(target=8)),
    (undula.SoRA(), ranks.SoRA()),
    (undula.GatedLoRA(r=16, open=8), ranks.ALoRA(rounds=2)),
    (undula.DyLoRA(), ranks.DyLoRA()),
    (undula.GatedLoRA(), ranks.DiffoRA()),
    (undula.GatedLoRA(), ranks.Budget(total=4 * 37)),  # MiniLM has 37 linear layers
    (LoRA(), ranks.ReLoRA(cycles=3)),
    (LoRA(), ranks.LoRASC(cycles=3)),
    (LoRA(r=1, alpha=2.0), ranks.XGBLoRA(boosters=10)),
    (LoRA(), ranks.SRLoRA()),
)


@dataclass(frozen=True)
class Entry:
    name: str
    method: Method | None
    allocator: Allocator | None = None

    @property
    def lr(self) -> float:
        return HEAD_RATE if self.method is None else RATES.get(self.name, RATE)


def entries() -> list[Entry]:
    """Everything that is registered, at its defaults: methods, starts of a LoRA (counted out), allocators."""
    plain = [m for m in undula.methods().values() if not issubclass(m, Wrapper)]
    listed = [Entry("head only", None), *(Entry(m.__name__, m()) for m in plain)]
    listed += [Entry("rsLoRA", LoRA(scaling=undula.RankStabilised()))]
    started = [s for s in Start.registry.values() if s is not Kaiming and s is not Gaussian]
    listed += [Entry(f"LoRA from {s.__name__}", Centred(LoRA(), s())) for s in started]
    return listed + [Entry(f"{type(a).__name__} (allocator)", m, a) for m, a in ALLOCATED]


def trained(entry: Entry, out: Path, steps: int) -> dict:
    """The figures of one run, and of its adapter in a new process."""
    run = Run(
        model="bundled:minilm", data="bundled:wordnet", task=Classification(max_length=32), method=entry.method,
        allocator=entry.allocator, out=out, lr=entry.lr, head_lr=HEAD_RATE, max_steps=steps, batch=16, eval_rows=1000,
        save_every=steps,
    )  # fmt: skip
    report = undula.train(run)
    losses = [loss for _, loss in report["losses"]]
    tenth = max(1, len(losses) // 10)
    figures = {
        "name": entry.name,
        "rung": report["rung"],
        "parameters": report["trainable_parameters"],
        "lr": entry.lr,
        "loss_first_tenth": sum(losses[:tenth]) / tenth,
        "loss_last_tenth": sum(losses[-tenth:]) / tenth,
        "accuracy_before": report["before"]["accuracy"],
        "accuracy": report["after"]["accuracy"],
        "seconds": report["seconds"],
    }
    checked = subprocess.run(
        [sys.executable, __file__, "--check", str(out)], capture_output=True, text=True, check=False
    )
    if checked.returncode:
        return figures | {"fault": checked.stderr.strip().splitlines()[-1]}
    return figures | json.loads(checked.stdout.splitlines()[-1])


def check(out: Path) -> dict:
    """What the saved adapter does in this process: its accuracy, and what merging and exporting change."""
    from undula.train.restored import restored

    opened = restored(out)
    found: dict = {"accuracy_loaded": opened.score()["accuracy"]}
    batch = next(opened.batches(opened.examples()))
    with torch.no_grad():
        y = opened.model(**batch).logits
        if issubclass(opened.adapter.rung, undula.LowRank) and opened.adapter.methods:
            found["export"] = exported(out, opened, batch, y)
        if issubclass(opened.adapter.rung, undula.Reweight) and opened.adapter.methods:
            undula.merge(opened.model)
            found["merge_error"] = float((opened.model(**batch).logits - y).norm() / y.norm())
    return found


def exported(out: Path, opened, batch, y: torch.Tensor) -> float:
    """Relative difference of the outputs when PEFT alone loads the exported LoRA."""
    import peft

    from undula.train.base import open_model

    undula.io.export_lora(opened.adapter, out / "lora", base=opened.folder, task=opened.run.task.peft)
    plain, _ = open_model(opened.run.model, opened.run.task, opened.run.dtype, opened.run.seed)
    model = peft.PeftModel.from_pretrained(plain, str(out / "lora")).eval()
    return float((model(**batch).logits - y).norm() / y.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of entries")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.check:
        print(json.dumps(check(args.check)))
        return
    listed = entries()
    if args.list:
        print("\n".join(e.name for e in listed))
        return
    rows = {r["name"]: r for r in json.loads(args.json.read_text())["rows"]} if args.json and args.json.exists() else {}
    for entry in listed:
        if (args.only and entry.name not in args.only) or (entry.name in rows and not args.only):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                rows[entry.name] = trained(entry, Path(scratch) / "out", args.steps)
            except Exception as error:  # the others still run; the table says which did not
                rows[entry.name] = {"name": entry.name, "fault": f"{type(error).__name__}: {error}"}
        told(rows[entry.name])
        if args.json:
            figures = {"threads": 1, "rows": list(rows.values())}
            record(args.json, figures, command=f"python bench/relatives.py --steps {args.steps} --json {args.json}")


def told(row: dict) -> None:
    if "accuracy" not in row:
        print(f"{row['name']:24} FAILED {row['fault']}", flush=True)
        return
    ends = f"merge {row.get('merge_error', math.nan):.1e}  export {row.get('export', math.nan):.1e}"
    print(
        f"{row['name']:24} {row['parameters']:>9,}  lr {row['lr']:<7g} loss {row['loss_first_tenth']:.3f} -> "
        f"{row['loss_last_tenth']:.3f}  accuracy {row['accuracy_before']:.3f} -> {row['accuracy']:.3f}  "
        f"{row['seconds']:6.1f} s  {ends}  {row.get('fault', '')}",
        flush=True,
    )


if __name__ == "__main__":
    main()
