"""How near `undula tune` comes to the rate that a sweep chose, over the sweeps of the stored studies.

    python bench/tune.py --json bench/results/tune.json                  # about 25 minutes of one core
    python bench/tune.py --work runs/tune --table                        # shares of what was measured so far

The stores are read from the history of git (bench/results/README.md): of each arm the rates that were swept, and the
validation metric at each.  A rate is found for as many arms as `--most` says, spread evenly over studies and data, on
the rows and with the seed of its sweep; what was measured is kept in `--work` and not measured again.

near: within half a decade of the best rate.  good: the metric at the rate, on a line between the two swept ones beside
it (in log rate), is within one standard error sqrt(p (1 - p) / rows) of the best; beyond the swept rates it is not.
cost: batches forwards and backwards (a forward pass alone is a third) as a share of those of all runs of the sweep,
whose evaluations are left out.  The constants of `train.tuning` were chosen on the arms of CHOSEN; `others` are the
rest, by which nothing was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import record

STUDIES = Path(__file__).parent / "results" / "studies"
CHOSEN = {  # the arms by which the constants of `train.tuning` were chosen
    "nonlinear, bundled:wordnet, AuroRA r=2, seed 0",
    "nonlinear, bundled:wordnet, LoRA r=8, seed 0",
    "nonlinear, bundled:wordnet, SineLoRA r=8 Sine, seed 0",
    "nonlinear, bundled:wordnet, AuroRAStatic r=8, seed 0",
    "nonlinear-one-rate, bundled:wordnet, LoRA r=8, seed 0",
    "nonlinear-one-rate, bundled:rotten-tomatoes, LoRA r=8, seed 0",
    "nonlinear-one-rate, bundled:debian-section, LoRA r=8, seed 0",
    "nonlinear-r2, bundled:wordnet, LoRAN r=2 SiLU, seed 0",
    "vision, bundled:fashion-mnist, LoRA r=8, seed 0",
    "vision, bundled:fashion-mnist, full, seed 0",
    "vision, bundled:fashion-mnist, AuroRAStatic r=2, seed 0",
}
HALF = 0.5 + 1e-3  # decades; rates have three digits
TARGETS = {"near": 0.8, "good": 0.6, "cost": 0.15}
Arm = dict[str, Any]


def stored(study: str) -> Iterator[tuple[dict[str, Any], str, dict[str, Any] | None]]:
    """(trial, state, result) of each run of a study, from the commit that its list names."""
    folder = STUDIES / study
    commit = json.loads((folder / "archive.json").read_text(encoding="utf-8"))["commit"]
    place = f"{commit}:bench/results/studies/{study}/runs.sqlite"
    content = subprocess.run(["git", "show", place], capture_output=True, check=True, cwd=STUDIES).stdout
    with tempfile.NamedTemporaryFile(suffix=".sqlite") as file:
        file.write(content)
        file.flush()
        for trial, state, result in sqlite3.connect(file.name).execute("select trial, state, result from runs"):
            yield json.loads(trial), state, json.loads(result) if state == "done" else None


def sweeps() -> list[Arm]:
    """Every sweep of every study: an arm on some data with a seed, {rate: metric or None}."""
    found: dict[str, Arm] = {}
    for study in sorted(p.name for p in STUDIES.iterdir() if (p / "archive.json").is_file()):
        for trial, _, result in stored(study):
            if trial["tested"]:
                continue
            run = {k: v for k, v in trial["run"].items() if k != "lr"}
            key = json.dumps([run, trial["rows"]], sort_keys=True)
            arm = found.setdefault(key, {"key": key, "study": study, "trial": trial, "scores": {}})
            arm["scores"][trial["run"]["lr"]] = None if result is None else result["validation"]
    return [arm for arm in found.values() if sum(v is not None for v in arm["scores"].values()) > 1]


def sampled(arms: list[Arm], most: int) -> list[Arm]:
    """So many, evenly over studies, data and arms in their order.  Quantised bases are left out."""
    kept = [arm for arm in arms if not arm["trial"]["run"].get("bits")]
    groups: dict[tuple[str, str], list[Arm]] = {}
    for arm in kept:
        groups.setdefault((arm["study"], arm["trial"]["rows"]["label"]), []).append(arm)
    spread = [(i / len(group), arm) for group in groups.values() for i, arm in enumerate(_shuffled(group))]
    return [arm for _, arm in sorted(spread, key=lambda pair: pair[0])[:most]]


def _shuffled(group: list[Arm]) -> list[Arm]:
    """First each second, then the others, and so on: any first part of it is spread over the arms."""
    order = sorted(range(len(group)), key=lambda i: int(f"{i:010b}"[::-1], 2))
    return [group[i] for i in order]


def measured(arm: Arm, sources: Any) -> dict[str, Any]:
    """What `tune` finds for an arm, and what that took."""
    from undula.study.guess import proposed
    from undula.study.trial import Trial

    told = {**arm["trial"], "run": arm["trial"]["run"] | {"lr": 1.0}}
    trial = Trial.decode({k: v for k, v in told.items() if k != "protocol"})
    begun = time.process_time()
    found = proposed(trial, sources).encode()
    return {"key": arm["key"], "found": found | {"cpu_seconds": round(time.process_time() - begun, 2)}}


def at(scores: dict[float, float], rate: float) -> float | None:
    """The metric at a rate, on a line between those beside it; None beyond all of them."""
    rates = sorted(scores)
    for low, high in itertools.pairwise(rates):
        if low <= rate <= high:
            part = math.log(rate / low) / math.log(high / low)
            return scores[low] + part * (scores[high] - scores[low])
    return scores.get(rate)


def judged(arm: Arm, rate: float) -> dict[str, Any]:
    """near, good (None where the metric has no standard error that is known)."""
    less = arm["trial"]["run"]["task"]["is"] == "CausalLM"
    scores = {lr: v for lr, v in arm["scores"].items() if v is not None}
    sign = -1 if less else 1
    best = max(scores, key=lambda lr: (sign * scores[lr], -lr))
    here, p = at(scores, rate), scores[best]
    error = None if less else math.sqrt(p * (1 - p) / arm["trial"]["rows"]["validation"])
    good = None if error is None else here is not None and here >= p - error
    return {"near": abs(math.log10(rate / best)) <= HALF, "good": good, "best": best}


def cost(arm: Arm, found: dict[str, Any], curvature: bool) -> float:
    """Of a proposal, as a share of the sweep's; the curvature's batches are left out where it is not looked at."""
    from undula.train.tuning import PRODUCTS

    run = arm["trial"]["run"]
    batches = found["gradients"] + found["losses"] / 3 - (0 if curvature else 2 * PRODUCTS)
    return batches / (len(arm["scores"]) * run["max_steps"] * run["accumulate"])


def proposals() -> dict[str, tuple[Callable[[dict[str, Any]], float], bool]]:
    """{name: (the rate by what was found, whether the curvature is needed)}."""
    from undula.train import tuning

    def by_range(f: dict[str, Any]) -> float:
        return tuning.BELOW * f["lowest"]

    def by_curvature(f: dict[str, Any]) -> float:
        return tuning.ABOVE * f["edge"]

    return {
        "range test and curvature": (lambda f: math.sqrt(by_range(f) * by_curvature(f)), True),
        "range test alone": (by_range, False),
        "curvature alone": (by_curvature, True),
        "constant 1e-3": (lambda f: 1e-3, False),
        "constant 3e-3": (lambda f: 3e-3, False),
    }


def shares(arms: list[Arm], records: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    made = {}
    for name, (propose, curvature) in proposals().items():
        judgements = [judged(arm, propose(records[arm["key"]])) for arm in arms]
        good = [j["good"] for j in judgements if j["good"] is not None]
        costs = [cost(arm, records[arm["key"]], curvature) for arm in arms]
        made[name] = {
            "near": statistics.fmean(j["near"] for j in judgements),
            "good": statistics.fmean(good),
            "cost": 0.0 if name.startswith("constant") else statistics.fmean(costs),
        }
    return made


def ratios(arms: list[Arm], records: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Medians of log10 of the best rate over what was found: what the constants would be on these arms."""
    best = [(math.log10(judged(arm, 1.0)["best"]), records[arm["key"]]) for arm in arms]
    return {name: statistics.median(b - math.log10(f[name]) for b, f in best) for name in ("lowest", "edge")}


def named(arm: Arm) -> str:
    run = arm["trial"]["run"]
    method = run["method"] or {"is": "full" if run.get("full") else "head"}
    inner = method.get("inner") or method
    rest = [f"r={inner['r']}"] if "r" in inner else []
    rest += [inner["activation"]["is"]] if inner.get("activation") else []
    return f"{arm['study']}, {arm['trial']['rows']['label']}, {' '.join([method['is'], *rest])}, seed {run['seed']}"


def report(arms: list[Arm], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    there = [arm for arm in arms if arm["key"] in records and records[arm["key"]].get("edge")]
    chosen = [arm for arm in there if named(arm) in CHOSEN]
    others = [arm for arm in there if named(arm) not in CHOSEN]
    every = {"all": there, "others": others, "chosen": chosen}
    figures = {name: shares(part, records) for name, part in every.items() if part}
    rows = [
        {"arm": named(arm), "swept": {f"{k:g}": v for k, v in sorted(arm["scores"].items())}}
        | {k: records[arm["key"]][k] for k in ("lr", "lowest", "edge", "gradients", "losses", "cpu_seconds")}
        | judged(arm, records[arm["key"]]["lr"])
        for arm in there
    ]
    mine = figures["others"][DEFAULT]
    met = {k: bool(mine[k] <= v if k == "cost" else mine[k] >= v) for k, v in TARGETS.items()}
    constant = figures["others"]["constant 1e-3"]
    met["better than 1e-3"] = mine["near"] >= constant["near"] and mine["good"] >= constant["good"]
    return {
        "arms": len(there), "of": len(arms), "default": DEFAULT, "targets": TARGETS, "targets_met": met,
        "shares": figures, "medians": {k: ratios(v, records) for k, v in every.items() if v}, "rows": rows,
    }  # fmt: skip


DEFAULT = "range test and curvature"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/tune"))
    parser.add_argument("--most", type=int, default=60, help="arms to find a rate for")
    parser.add_argument("--seconds", type=float, default=1500, help="after which no other arm is begun")
    parser.add_argument("--part", default="0/1", help="I/N: of these arms every N-th, from the I-th on")
    parser.add_argument("--table", action="store_true", help="measure nothing, tell what is there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    every = sweeps()
    asked.work.mkdir(parents=True, exist_ok=True)
    log, begun = asked.work / "found.jsonl", time.monotonic()
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    records = {each["key"]: each["found"] for each in map(json.loads, lines)}
    from undula.study.sources import Sources

    sources = Sources()
    first, of = map(int, asked.part.split("/"))
    for arm in () if asked.table else sampled(every, asked.most)[first::of]:
        if arm["key"] in records or time.monotonic() - begun > asked.seconds:
            continue
        made = measured(arm, sources)
        records[arm["key"]] = made["found"]
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(made) + "\n")
        brief = {k: made["found"][k] for k in ("lr", "lowest", "edge", "cpu_seconds")}
        print(named(arm), {f"{k:g}": v for k, v in sorted(arm["scores"].items())}, brief, flush=True)
    found = report(every, records)
    print(json.dumps({k: v for k, v in found.items() if k != "rows"}, indent=1))
    if asked.json is not None:
        record(asked.json, found)


if __name__ == "__main__":
    main()
