"""Boxes in made-up lidar scans: a small LION learns on 64 beams, adapters move it to a sensor of 16 with few scans.

    python examples/pointclouds/detect.py          # 7 minutes of CPU; runs/detect.svg, .json
    python examples/pointclouds/detect.py --wide   # three seeds, rates chosen for each way, a base of 16 beams too
    python examples/pointclouds/detect.py --quick  # does everything run?

With --wide rates are chosen on validation scans of the 16-beam sensor, one seed each; without, they are those that were
chosen so.  Figures are of the test scans.  What has run is kept in --work; a run that was stopped goes on from there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from boxes import Sample, loss, measure, mirrored, sample
from drawing import detection
from fitting import arguments, check_size, fit, kept, record
from lion import Detector, Shape
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from scan import chunked

import undula
from undula.methods.activations import Sinter

FEATURES = 6
WHERE = ["all-linear", "head.first", "head.second"]  # linear layers, sparse kernels among them, and two convolutions
FULL = ["head.heat", "head.box"]
WAYS: dict[
    str, tuple[undula.Method | None, tuple[float, ...]]
] = {  # name: (method, rates to try, of which the first was chosen)
    "LoRA r=4": (undula.LoRA(r=4), (3e-4, 1e-3, 3e-3, 1e-2)),
    "LoRAN r=4": (undula.LoRAN(r=4, activation=Sinter(a=0.02, w=300.0)), (3e-4, 1e-3, 3e-3, 1e-2)),
    "AuroRA r=2": (undula.AuroRA(r=2), (1e-3, 3e-4, 3e-3, 1e-2)),
    "full fine-tuning": (None, (1e-4, 3e-4, 1e-3, 3e-3)),
    "from scratch": (None, (1e-2, 1e-3, 3e-3)),
}
# Numbers of scenes: of training, from here on, and of what is measured
TRAINING, FEW, VALIDATION, TEST = 1_000_000, 2_000_000, 3_000_000, 4_000_000


@dataclass(frozen=True)
class Size:
    base_steps: int = 600
    pool: int = 200  # training scenes of the base, mirrored at random
    few: int = 8  # scenes of 16 beams
    steps: int = 100
    validation: int = 24
    test: int = 48
    seeds: int = 1
    sweep: bool = False
    tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)


QUICK = Size(4, 2, 2, 2, 2, 2, tokens=(512, 1024))


def scans(first: int, number: int, beams: int) -> list[Sample]:
    return [sample(first + i, beams) for i in range(number)]


def trained(
    model: Detector, parameters: Any, pool: list[Sample], steps: int, lr: float, seed: int, told: str, at_once: int = 1
) -> dict[str, Any]:
    """Steps over scans drawn from the pool, each mirrored half of the time."""
    draws = torch.Generator().manual_seed(seed)

    def step_loss(_: int) -> torch.Tensor:
        chosen = torch.randint(len(pool), (at_once,), generator=draws).tolist()
        turned = torch.rand(at_once, generator=draws) < 0.5
        return loss(model.train(), [mirrored(pool[i]) if t else pool[i] for i, t in zip(chosen, turned, strict=True)])

    return fit(parameters, step_loss, steps, lr, told)


def base(folder: Path, beams: int, size: Size) -> Detector:
    """A detector trained on many scans of a sensor, from the folder if it is there."""
    torch.manual_seed(0)
    model, file = Detector(FEATURES), folder / f"base-{beams}.safetensors"
    if not file.is_file():
        pool = scans(TRAINING, size.pool, beams)
        trained(model, model.parameters(), pool, size.base_steps, 2e-3, 0, f"{beams} beams")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model


def adapted(way: str, lr: float, seed: int, folder: Path, size: Size, tested: list[Sample]) -> dict[str, Any]:
    """One way of learning the 16-beam sensor from the few scans of a seed, measured on `tested`."""
    method, _ = WAYS[way]
    few = scans(FEW + 1000 * seed, size.few, 16)
    model = base(folder, 64, size)
    torch.manual_seed(seed)
    adapter = None
    if method is not None:
        adapter = undula.attach(model, method, where=WHERE, full=FULL)
        parameters = list(adapter.parameters())
    else:
        model = Detector(FEATURES) if way == "from scratch" else model
        parameters = list(model.parameters())
    row = trained(model, parameters, few, size.steps, lr, seed, f"{way}, {lr:g}", at_once=2)
    row |= {"way": way, "lr": lr, "seed": seed, "trained": sum(p.numel() for p in parameters)} | measure(model, tested)
    if adapter is not None and issubclass(adapter.rung, undula.Reweight):
        row["merge error"] = max(undula.merge(model).values())
        row["AP merged"] = measure(model, tested)["AP"]
    return row


def compared(folder: Path, size: Size) -> list[dict[str, Any]]:
    """All ways: the rate by the validation scans at seed 0, where there is a sweep; then every seed on test scans."""
    validation, test = scans(VALIDATION, size.validation, 16), scans(TEST, size.test, 16)
    rows = []
    for way, (_, rates) in WAYS.items():
        name = way.replace(" ", "-")
        tried = [
            kept(folder / f"{name}-{lr:g}.json", lambda way=way, lr=lr: adapted(way, lr, 0, folder, size, validation))
            for lr in (rates if size.sweep else ())
        ]
        best = max(tried, key=lambda row: row["AP"])["lr"] if tried else rates[0]
        for seed in range(1, size.seeds + 1):
            file = folder / f"{name}-{best:g}-test-{seed}.json"
            row = kept(file, lambda way=way, lr=best, seed=seed: adapted(way, lr, seed, folder, size, test))
            rows.append(row | {"tried": {f"{r['lr']:g}": r["AP"] for r in tried}})
    return rows


def times(tokens: tuple[int, ...], width: int = 32, heads: int = 4) -> list[dict[str, float]]:
    """Seconds of CPU of a forward of the scan, and of torch's attention, over one sequence; the least of three."""
    rows = []
    for T in tokens:
        q, k, v = torch.randn(3, 1, T, heads, width // heads)
        log_a = F.logsigmoid(torch.randn(1, T, heads))
        ours = least(chunked, q, k, v, log_a)
        theirs = least(F.scaled_dot_product_attention, *(t.transpose(1, 2) for t in (q, k, v)))
        rows.append({"tokens": T, "scan": ours, "attention": theirs})
    return rows


def least(run: Callable[..., Any], *args: torch.Tensor) -> float:
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        run(*args)
        seconds.append(time.process_time() - begun)
    return min(seconds)


def without(folder: Path, size: Size) -> dict[str, dict[str, float]]:
    """The base where it learned, and on the other sensor as it is; with a sweep a model, too, that learned on many
    scans of the other."""

    def found(learned: int, beams: int) -> dict[str, float]:
        file = folder / f"base-{learned}-on-{beams}.json"
        return kept(file, lambda: measure(base(folder, learned, size), scans(TEST, size.test, beams)))

    many = {f"{size.pool} scans of 16 beams": found(16, 16)} if size.sweep else {}
    return {"base, 64 beams": found(64, 64), "base, 16 beams": found(64, 16), **many}


def targets(found: dict[str, Any]) -> dict[str, bool]:
    """What was aimed at, and whether it is so; means over seeds on the 16-beam sensor."""
    mean = {way: statistics.mean(r["AP"] for r in found["rows"] if r["way"] == way) for way in WAYS}
    adapters = [mean[way] for way, (method, _) in WAYS.items() if method is not None]
    first, last = found["times"][0], found["times"][-1]
    growth = last["tokens"] / first["tokens"]
    merged = [abs(r["AP"] - r["AP merged"]) for r in found["rows"] if "AP merged" in r]
    return {
        "every kind of adapter is above the base as it is": min(adapters) > found["without"]["base, 16 beams"]["AP"],
        "the best kind is within 0.01 of full fine-tuning": max(adapters) >= mean["full fine-tuning"] - 0.01,
        "the best kind is above training from scratch by 0.1": max(adapters) >= mean["from scratch"] + 0.1,
        "merged adapters have the AP of live ones, within 0.001": max(merged) <= 1e-3,
        "the scan's time grows as the tokens do, within a half": last["scan"] <= 1.5 * growth * first["scan"],
    }


def told(rows: list[dict[str, Any]], others: dict[str, dict[str, float]], console: Console) -> None:
    table = Table("model", "trained", "rate", "AP car", "AP pedestrian", "AP", "over seeds")
    for name, row in others.items():
        table.add_row(name, "", "", *(f"{row[k]:.3f}" for k in ("car", "pedestrian", "AP")), "")
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        mean = {k: statistics.mean(r[k] for r in own) for k in ("car", "pedestrian", "AP")}
        span = f"{min(r['AP'] for r in own):.3f} to {max(r['AP'] for r in own):.3f}"
        table.add_row(way, f"{own[0]['trained']:,}", f"{own[0]['lr']:g}", *(f"{m:.3f}" for m in mean.values()), span)
    console.print(table)


def main() -> None:
    given = arguments(__doc__, "detect", wide="three seeds, rates chosen for each way, a base of 16 beams too")
    size = QUICK if given.quick else Size()
    size = replace(size, seeds=3, sweep=True) if given.wide else size
    folder = given.work
    check_size(folder, vars(size), free=("seeds", "sweep"))
    others = without(folder, size)
    found = {
        "size": vars(size),
        "shape": vars(Shape()),
        "without": others,
        "rows": compared(folder, size),
        "times": kept(folder / "times.json", lambda: times(size.tokens)),
    }
    told(found["rows"], others, Console(width=120))
    record(given.json, found | {"targets_met": targets(found)})
    detection(given.figure, found, base(folder, 64, size), sample(TEST, 64))
    print(f"{given.json} and {given.figure} are written")


if __name__ == "__main__":
    main()
