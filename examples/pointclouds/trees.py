"""Trees in made-up forest scans of 10 to 1,000 points per m2: adapters for each sensor, or one augmented model?

    python examples/pointclouds/trees.py                       # 7 minutes of CPU; runs/trees.svg, .json
    python examples/pointclouds/trees.py --wide                # networks of half and twice the channels too
    python examples/pointclouds/trees.py --quick               # does everything run?

A U-Net learns on dense scans.  Then, for each coarser density, an adapter learns on scans of that density, or all of
the network does; against it one model that sees randomly thinned scans, for as many steps as the first alone and for as
many as all of them together.  What has run is kept in --work, and a run that was stopped goes on from there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import forest as draw
from fitting import arguments, check_size, fit, kept, record
from forest import DENSEST, Plot, plot, thinned
from instances import CLUSTERINGS, clusters, f1, matched, said
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from unet import Cloud, TreeNet, loss

import undula

TRAINING, VALIDATION, TEST = 0, 10_000, 20_000  # numbers of plots, from here on
BASE_RATE = 5e-3
RATES = {"adapters": (3e-3, 1e-2), "networks": (1e-3, 3e-3)}  # tried for each of them
HEADS = ["semantic", "offset", "embedding"]
DENSE, LONG = "dense scans", "thinned, as many steps"


@dataclass(frozen=True)
class Size:
    widths: tuple[int, ...] = (8,)  # channels of the finest level
    seeds: tuple[int, ...] = (2,)  # of each width
    densities: tuple[int, ...] = (10, 30, 100, 300)
    steps: int = 240  # of a network
    more: int = 60  # of an adapter, or of the network once more, for each density
    rank: int = 4
    plots: int = 40
    validation: int = 4
    test: int = 10


WIDE = Size((4, 8, 16), (1, 2, 1))
QUICK = Size((8,), (1,), (30,), 3, 2, 2, 2, 1, 1)


@dataclass(frozen=True)
class Ground:
    """What models learn from and are measured on: plots at their full density, thinned when they are asked for."""

    training: list[Plot]
    validation: dict[int, list[tuple[Cloud, Plot]]]
    test: dict[int, list[tuple[Cloud, Plot]]]

    @classmethod
    def made(cls, size: Size) -> Ground:
        def at(first: int, number: int) -> dict[int, list[tuple[Cloud, Plot]]]:
            whole = [plot(first + i) for i in range(number)]
            rng = np.random.default_rng(first)
            thin = {d: [thinned(p, d, rng) for p in whole] for d in (*size.densities, DENSEST)}
            return {d: [(Cloud(p), p) for p in each] for d, each in thin.items()}

        training = [plot(TRAINING + i) for i in range(size.plots)]
        return cls(training, at(VALIDATION, size.validation), at(TEST, size.test))


def trained(
    model: TreeNet,
    parameters: Any,
    ground: Ground,
    densities: Sequence[int],
    steps: int,
    lr: float,
    seed: int,
    told: str,
) -> float:
    """Steps over one plot each, thinned to a density drawn from these; the seconds of CPU."""
    rng = np.random.default_rng(seed)

    def step_loss(_: int) -> torch.Tensor:
        chosen = ground.training[rng.integers(len(ground.training))]
        return loss(model.train(), [Cloud(thinned(chosen, rng.choice(densities), rng))])

    return fit(parameters, step_loss, steps, lr, told)["cpu_seconds"]


def network(name: str, width: int, seed: int, folder: Path, made: Callable[[TreeNet], None]) -> TreeNet:
    """A network from the folder; made and put there where it is not."""
    torch.manual_seed(seed)
    model, file = TreeNet(width), folder / f"{name.replace(' ', '-')}-{width}-{seed}.safetensors"
    if not file.is_file():
        made(model)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model


def learned(name: str, width: int, seed: int, folder: Path, ground: Ground, size: Size) -> TreeNet:
    """The network that saw dense scans, or one of those that saw all densities."""
    every = (*size.densities, DENSEST)
    densities, steps = {
        DENSE: ((DENSEST,), size.steps),
        "thinned": (every, size.steps),
        LONG: (every, size.steps + len(size.densities) * size.more),
    }[name]

    def made(model: TreeNet) -> None:
        trained(model, model.parameters(), ground, densities, steps, BASE_RATE, seed, f"{name}, {width}")

    return network(name, width, seed, folder, made)


def score(model: TreeNet, ground: Ground, density: int) -> dict[str, Any]:
    """F1 over the test plots of a density, with the clustering that is best on its validation plots."""
    heads = [(said(model, cloud), cloud, p) for cloud, p in ground.validation[density]]
    tried = [f1([matched(clusters(h, c, how), p.instance) for h, c, p in heads]) for how in CLUSTERINGS]
    best = CLUSTERINGS[int(np.argmax(tried))]
    counts = [matched(clusters(said(model, c), c, best), p.instance) for c, p in ground.test[density]]
    return {"density": density, "validation": max(tried), "F1": f1(counts), "clustering": vars(best)}


def moved(
    kind: str, density: int, lr: float, width: int, seed: int, folder: Path, ground: Ground, size: Size
) -> dict[str, Any]:
    """The network of dense scans, moved to another density by an adapter or as a whole."""
    model = learned(DENSE, width, seed, folder, ground, size)
    torch.manual_seed(seed)
    parameters = list(model.parameters())
    if kind == "adapters":
        adapter = undula.attach(model, undula.LoRA(r=size.rank), "all-linear", exclude=HEADS, full=HEADS)
        parameters = list(adapter.parameters())
    seconds = trained(model, parameters, ground, (density,), size.more, lr, seed, f"{kind}, {density}")
    row = {"trained": sum(p.numel() for p in parameters), "lr": lr, "cpu_seconds": seconds}
    if kind == "adapters":
        row["merge error"] = max(undula.merge(model).values())
    return row | score(model, ground, density)


def rows_of(width: int, seed: int, folder: Path, ground: Ground, size: Size) -> list[dict[str, Any]]:
    """All models of a width and a seed at all densities."""
    about = {"width": width, "seed": seed}
    rows = []
    for name in (DENSE, "thinned", LONG):
        model = learned(name, width, seed, folder, ground, size)
        number = sum(p.numel() for p in model.parameters())
        rows += [
            {"model": name, "trained": number, **about, **score(model, ground, d)} for d in (*size.densities, DENSEST)
        ]
    for kind, rates in RATES.items():
        for density in size.densities:
            tried = [moved(kind, density, lr, width, seed, folder, ground, size) for lr in rates]
            name = f"dense + {kind}, one a density"
            rows.append({"model": name, **about, **max(tried, key=lambda row: row["validation"])})
    return rows


def targets(rows: list[dict[str, Any]], size: Size) -> dict[str, bool]:
    """What was aimed at, and whether it is so, of networks of each width; means over seeds."""

    def mean(model: str, width: int, densities: Sequence[int] = size.densities) -> float:
        of = (width, model)
        return statistics.mean(r["F1"] for r in rows if (r["width"], r["model"]) == of and r["density"] in densities)

    adapters, networks = (f"dense + {kind}, one a density" for kind in RATES)
    found, sparsest = {}, size.densities[:1]
    for w in size.widths:
        found |= {
            f"{w}: thinned scans teach more than dense ones of the sparsest": mean("thinned", w, sparsest)
            > mean(DENSE, w, sparsest),
            f"{w}: an adapter for each density is above the dense network alone": mean(adapters, w) > mean(DENSE, w),
            f"{w}: and within 0.02 of a network for each density": mean(adapters, w) >= mean(networks, w) - 0.02,
            f"{w}: and above one thinned network of as many steps": mean(adapters, w) > mean(LONG, w),
        }
    return found


def told(rows: list[dict[str, Any]], size: Size, console: Console) -> None:
    every = (*size.densities, DENSEST)
    table = Table("channels", "model", *(f"{d:,} per m2" for d in every), title="F1 of trees, means over seeds")
    for width in size.widths:
        own = [row for row in rows if row["width"] == width]
        for name in dict.fromkeys(row["model"] for row in own):
            at = {d: [r["F1"] for r in own if r["model"] == name and r["density"] == d] for d in every}
            table.add_row(str(width), name, *(f"{statistics.mean(f):.3f}" if f else "" for f in at.values()))
    console.print(table)


def shown(folder: Path, ground: Ground, size: Size) -> list[tuple[str, Any, Any]]:
    """One test plot of 100 points per m2 (or the coarsest that there is): true trees, and those found."""
    density = 100 if 100 in size.densities else size.densities[0]
    cloud, p = ground.test[density][0]
    model = learned(LONG, size.widths[-1], 1, folder, ground, size)
    tree = clusters(said(model, cloud), cloud, CLUSTERINGS[1])
    few = slice(0, 1500)
    return [
        (f"true, {density} per m2", p.points[few], p.instance[few]),
        (f"found ({size.widths[-1]} channels)", p.points[few], tree[few]),
    ]


def main() -> None:
    given = arguments(__doc__, "trees", wide="4 and 16 channels too, one seed of each")
    size = QUICK if given.quick else WIDE if given.wide else Size()
    folder = given.work
    check_size(folder, vars(size), free=("widths", "seeds"))
    ground = Ground.made(size)
    rows = []
    for width, seeds in zip(size.widths, size.seeds, strict=True):
        for seed in range(1, seeds + 1):
            file = folder / f"rows-{width}-{seed}.json"
            rows += kept(file, lambda width=width, seed=seed: rows_of(width, seed, folder, ground, size))
    told(rows, size, Console(width=120))
    record(given.json, {"size": vars(size), "rows": rows, "targets_met": targets(rows, size)})
    draw(given.figure, {"rows": rows}, shown(folder, ground, size))
    print(f"{given.json} and {given.figure} are written")


if __name__ == "__main__":
    main()
