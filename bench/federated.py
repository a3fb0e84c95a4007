"""Federations for real: what aggregations, methods and sparse messages do, beside one central model and clients alone.

    python bench/federated.py --short --json bench/results/federated-short.json    # about twenty minutes of one core
    python bench/federated.py --case wordnet --json bench/results/federated.json   # three seeds, longer: hours
    python bench/federated.py --case reviews --json bench/results/federated-reviews.json
    python bench/federated.py --case images --json bench/results/federated-images.json
    python bench/federated.py --short --work runs/federated                        # goes on there after a kill
    python bench/federated.py --short --settings 10/0.5 --ways "FLASC" "FedIT"     # a few ways alone
    python bench/federated.py --table bench/results/federated-short.json           # as Markdown; measures nothing

A data set's training rows are divided among clients by Dirichlet(alpha); in each round some of them take a few steps
from the server's adapter.  Of each way: the metrics after each round on the validation rows, the bytes of the numbers
that were sent, the bias |D - dW| / |D|, and what clients have on rows of their own.  "central" is one client with all
rows and as many steps in all; "alone" is each client by itself with as many steps as it takes in the rounds on average.
One learning rate for all ways: it was not tuned for any.  FLASC's server has a rate of its own (RATE); "start" is its
`from_start`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from record import mean as with_error
from record import once, record

import undula
from undula.bundled import dataset
from undula.core.method import Method
from undula.federated import FAIR, FFA, FLASC, Aggregation, Exact, FedIT, FedSVD
from undula.federated.client import Client
from undula.federated.messages import replied
from undula.federated.report import spread
from undula.federated.rounds import clients_of, go
from undula.federated.rows import Rows
from undula.federated.server import Server
from undula.federated.spec import Federation
from undula.federated.split import Dirichlet, Even
from undula.optim.schedules import Constant
from undula.train import Classification, ImageClassification, Recipe
from undula.train.tasks.task import Task


@dataclass(frozen=True)
class Case:
    model: str
    data: str
    task: Task
    where: Any
    rows: int
    held: int
    lr: float
    head_lr: float
    rounds: int
    steps: int
    batch: int
    chosen: int  # clients in a round
    seeds: int


CONVOLUTIONS = ("stem", "expand", "project", "top")
TEXTS, IMAGES = Classification(max_length=32), ImageClassification(size=64)
CASES = {
    "wordnet": Case("minilm", "wordnet", TEXTS, ("query", "value"), 20_000, 2000, 3e-3, 3e-3, 60, 10, 16, 5, 3),
    "reviews": Case("minilm", "rotten-tomatoes", replace(TEXTS, max_length=64), ("query", "value"), 8000, 1000, 3e-3,
                    3e-3, 40, 10, 16, 5, 3),
    "images": Case("efficientnet-lite0", "fashion-mnist", IMAGES, CONVOLUTIONS, 10_000, 1000, 3e-3, 1e-2, 40, 8, 16, 5,
                   3),
}  # fmt: skip
SHORT = {"rows": 4000, "held": 300, "rounds": 10, "steps": 5, "seeds": 1}
LORA = undula.LoRA(r=4)
# Of FLASC's server: in ten rounds the first is the better at a quarter, and diverges at a sixteenth.
RATE, SLOWER = 3e-2, 1e-2
HOWS: dict[str, Aggregation] = {
    "FedIT": FedIT(), "FFA": FFA(), "FedSVD": FedSVD(), "FAIR": FAIR(), "Exact": Exact(), "FLASC": FLASC(lr=RATE),
    "FLASC 1/16": FLASC(down=1 / 16, up=1 / 16, lr=SLOWER), "FLASC start": FLASC(lr=RATE, from_start=True),
    "FLASC start 1/16": FLASC(down=1 / 16, up=1 / 16, lr=SLOWER, from_start=True),
}  # fmt: skip
NONLINEAR: dict[str, tuple[Aggregation, Method]] = {
    "FedIT AuroRA": (FedIT(), undula.AuroRA(r=4)),
    "FFA AuroRA": (FFA(), undula.AuroRA(r=4)),
    "FLASC AuroRA": (FLASC(lr=RATE, from_start=True), undula.AuroRA(r=4)),
    "FedIT LoRAN": (FedIT(), undula.LoRAN(r=4)),
    "FLASC LoRAN": (FLASC(lr=RATE, from_start=True), undula.LoRAN(r=4)),
}
ALONE, CENTRAL = "alone", "central"
SETTINGS = {f"{clients}/{alpha}": (clients, alpha) for clients, alpha in ((10, 0.5), (10, 0.1), (50, 0.1), (50, 0.5))}


def ways(clients: int, alpha: float, short: bool) -> dict[str, tuple[Aggregation, Method]]:
    """What is run in a setting: all in the first two, of others a part in the short form."""
    found = {name: (how, LORA) for name, how in HOWS.items()}
    if short and clients == 50:
        return {name: found[name] for name in (("FedIT", "FFA", "FedSVD") if alpha == 0.1 else ())}
    return found | (NONLINEAR if alpha == 0.5 or not short else {})


def small(case: Case, work: Path) -> Path:
    """The rows that all runs share, as a folder."""
    if not (work / "data").is_dir():
        rows = dataset(case.data)
        held = rows["validation" if "validation" in rows else "test"]
        parts = {"train": (rows["train"], case.rows), "validation": (held, case.held)}
        made = {n: part.shuffle(seed=0).select(range(min(most, len(part)))) for n, (part, most) in parts.items()}
        type(rows)(made).save_to_disk(work / "data")
    return work / "data"


def asked(case: Case, data: Path, method: Method, seed: int, **federated: Any) -> Federation:
    recipe = Recipe(
        model=f"bundled:{case.model}", data=str(data), task=case.task, method=method, where=case.where, lr=case.lr,
        head_lr=case.head_lr, max_steps=case.steps, batch=case.batch, eval_rows=case.held, schedule=Constant(),
        warmup=0.0, seed=seed,
    )  # fmt: skip
    return Federation(recipe, case.rounds, **federated)


def rounds_of(f: Federation, out: Path) -> dict[str, Any]:
    """The figures of a federation."""
    rows = Rows(f)
    server = Server(f, out, rows, resume=out.is_dir())
    go(server, clients_of(server, rows))
    records, metric = server.records, server.desk.run.task.headline
    biases = [r["bias"]["mean"] for r in records if "bias" in r]
    counted = [c for r in records[1:] for c in r["clients"].values()]
    return {
        "accuracy": [r["server"][metric] for r in records],
        "loss": [r["server"]["loss"] for r in records],
        "down": [r["down"] for r in records[1:]],
        "up": [r["up"] for r in records[1:]],
        "bias": fmean(biases) if biases else None,
        "failed": sum("failed" in c for c in counted),
        "spread": spread(records[-1]["spread"], metric),
        "trains": server.adapter.num_parameters(),
    }


def alone(f: Federation, out: Path, most: int) -> dict[str, Any]:
    """Of clients by themselves, at most so many: the metrics on the server's rows."""
    rows = Rows(f)
    server = Server(f, out, rows, resume=out.is_dir())
    brief, found = server.brief(), []
    for name in f.names[:most]:
        client = Client(f, name, rows, server.desk)
        arrays, _ = client.train(1, dict(brief))
        found.append(server.desk.score(replied(arrays, server.desk.first, f.how, name), server.held))
    metric = server.desk.run.task.headline
    each = {str(i): score for i, score in enumerate(found)}
    means = {k: [fmean(s[name] for s in found)] for k, name in (("accuracy", metric), ("loss", "loss"))}
    return {**means, "clients": spread(each, metric)}


def kept(path: Path, how: dict[str, Any], make: Any) -> dict[str, Any]:
    """What `make` gives, kept in a file with how it was made."""

    def timed() -> dict[str, Any]:
        begun = time.process_time()
        return {**make(), "cpu_seconds": round(time.process_time() - begun, 1)}

    told: dict[str, Any] = once(path, how, timed)
    print(path.stem, f"accuracy {told['accuracy'][-1]:.4f}, loss {told['loss'][-1]:.4f}, bias {told.get('bias')}, "
          f"{told['cpu_seconds']} s", flush=True)  # fmt: skip
    return told


def compared(case: Case, work: Path, short: bool, settings: Any, only: Any = ()) -> dict[str, Any]:
    """{"10 clients, alpha 0.5": {way: [figures of each seed]}}; what is there is not made again.  only: these ways."""
    data, found = small(case, work), dict[str, Any]()
    for clients, alpha in settings:
        split, many = Dirichlet(alpha, clients), {"fraction": case.chosen / clients}
        own = max(1, round(case.rounds * case.chosen / clients)) * case.steps  # steps of a client in all rounds
        by_itself, whole = replace(case, steps=own), replace(case, steps=case.steps * case.chosen)
        hows = ways(clients, alpha, short)
        told = {name: [] for name in (*hows, *((ALONE, CENTRAL) if hows else ())) if name in (only or {name})}
        for seed in range(case.seeds):
            for name, runs in told.items():
                stem = f"{clients}-{alpha:g}-{seed}-{name.replace('/', '_')}" if name != CENTRAL else f"{name}-{seed}"
                out = work / stem
                if name == ALONE:
                    f = asked(by_itself, data, LORA, seed, split=split, **many)
                elif name == CENTRAL:
                    f = asked(whole, data, LORA, seed, split=Even(1))
                else:
                    how, method = hows[name]
                    f = asked(case, data, method, seed, how=how, split=split, **many)
                make = partial(alone, f, out, 10) if name == ALONE else partial(rounds_of, f, out)
                runs.append(
                    kept(
                        work / f"{stem}.json",
                        {"of_rows": [case.rows, case.held], "run": repr(f).replace(str(work), "")},
                        make,
                    )
                )
        if told:
            found[f"{clients} clients, alpha {alpha:g}"] = told
    return found


def mean(runs: list[dict[str, Any]], name: str = "accuracy") -> float:
    """Over seeds, after the last round."""
    return fmean(run[name][-1] for run in runs)


def bytes_to(run: dict[str, Any], wanted: float) -> int | None:
    """Bytes both ways until the accuracy is first as good; None where it never is."""
    for i, value in enumerate(run["accuracy"][1:], 1):
        if value >= wanted:
            return sum(run["down"][:i]) + sum(run["up"][:i])
    return None


def answers(found: dict[str, Any]) -> dict[str, Any]:
    """The questions, of each setting, and the aims."""
    told: dict[str, Any] = {}
    for setting, runs in found.items():
        base = runs["FedIT"]
        gains = {name: round(mean(each) - mean(base), 4) for name, each in runs.items() if name != "FedIT"}
        less = {}
        for name in (n for n in runs if isinstance(HOWS.get(n), FLASC)):
            pairs = [
                (bytes_to(a, b["accuracy"][-1]) if mean([b]) > mean([own]) else None, sum(b["down"]) + sum(b["up"]))
                for a, b, own in zip(runs[name], base, runs[ALONE], strict=True)
            ]  # only where FedIT is better than clients alone: what has learned nothing is equalled by nothing
            less[name] = [None if sent is None else round(whole / sent, 2) for sent, whole in pairs]
        told[setting] = {"accuracy_over_FedIT": gains, "bytes_of_FedIT_over_bytes_at_its_accuracy": less}
    exact = [run["bias"] for runs in found.values() for name in ("FFA", "FedSVD") for run in runs.get(name, [])]
    ten = [runs for setting, runs in found.items() if setting.startswith("10 ")]
    saved = [x for t in told.values() for each in t["bytes_of_FedIT_over_bytes_at_its_accuracy"].values() for x in each]
    aims = {
        "FFA and FedSVD have no bias (below 1e-5)": max(exact) < 1e-5,
        "FedIT is better than clients alone": all(mean(runs["FedIT"]) > mean(runs["alone"]) for runs in ten),
        "FLASC is as good as FedIT with half of its bytes somewhere": any(x is not None and x >= 2 for x in saved),
        "no client failed": not any(
            run.get("failed") for runs in found.values() for each in runs.values() for run in each
        ),
    }
    return {"answers": told, "targets_met": aims}


def table(found: dict[str, Any]) -> Iterator[str]:
    """Means over seeds; differences from FedIT of the same seed, with their standard error where there are several."""
    yield "| clients | way | accuracy | over FedIT | loss | bias | MB down, up | of clients' own rows: least, most |"
    yield "|---|---|---|---|---|---|---|---|"
    for setting, runs in found.items():
        for name, each in runs.items():
            over = ""
            if name != "FedIT" and "FedIT" in runs:
                gains = [mean([a]) - mean([b]) for a, b in zip(each, runs["FedIT"], strict=True)]
                over = "{:+.3f} ± {:.3f}".format(*with_error(gains)) if len(gains) > 1 else f"{gains[0]:+.3f}"
            sent = [f"{fmean(sum(r[k]) for r in each) / 1e6:.2f}" for k in ("down", "up") if k in each[0]]
            bias = "" if each[0].get("bias") is None else f"{fmean(r['bias'] for r in each):.2g}"
            ends = ("least", "most") if each[0].get("spread") else ()
            own = [f"{fmean(r['spread'][k] for r in each):.3f}" for k in ends]
            numbers = f"{mean(each):.3f} | {over} | {mean(each, 'loss'):.3f} | {bias}"
            yield f"| {setting} | {name} | {numbers} | {', '.join(sent)} | {', '.join(own)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="wordnet")
    parser.add_argument("--short", action="store_true", help="few rounds, few steps, one seed")
    parser.add_argument("--work", type=Path, help="a folder to work in, which is kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], help="clients/alpha")
    parser.add_argument("--seeds", type=int, help="so many, where others than the case's own are wanted")
    parser.add_argument("--lr", type=float, help="in the place of the case's own, but for the head")
    parser.add_argument(
        "--ways", nargs="+", choices=[*HOWS, *NONLINEAR, ALONE, CENTRAL], help="these ways alone, and no aims"
    )
    parser.add_argument("--table", type=Path, help="show what is in this file, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(json.loads(args.table.read_text(encoding="utf-8"))["settings"])))
        return
    warnings.simplefilter("ignore")
    case = replace(CASES[args.case], **(SHORT if args.short else {}))
    case = replace(case, seeds=args.seeds or case.seeds, lr=args.lr or case.lr)
    if args.short and isinstance(case.task, Classification):
        case = replace(case, task=replace(case.task, max_length=case.task.max_length // 2))
    begun = time.process_time()
    with contextlib.ExitStack() as closes:
        work = args.work or Path(closes.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        found = compared(case, work, args.short, [SETTINGS[s] for s in args.settings], args.ways)
    told = {
        "case": args.case,
        "short": args.short,
        "of": {k: v for k, v in vars(case).items() if isinstance(v, int | float | str)},
        "settings": found,
        **({} if args.ways else answers(found)),
        "cpu_seconds_of_the_last_run": round(time.process_time() - begun, 1),
    }
    print("\n".join(table(found)))
    print(json.dumps({k: told[k] for k in ("answers", "targets_met") if k in told}, indent=1))
    if args.json:
        record(args.json, told)


if __name__ == "__main__":
    main()
