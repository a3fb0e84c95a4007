"""Privacy for real: what noise costs, which aggregation bears it, and what an attack on losses learns with and without.

    python bench/private.py --case rounds --rates 0.01 --json bench/results/private-rounds.json  # half an hour
    python bench/private.py --case attack --rates 0.003 --json bench/results/private-attack.json  # some minutes

MiniLM on WordNet, LoRA at query and value.  "attack": one party with few rows trains on them for long by AdamW, without
noise and with DP-SGD at several epsilons; the loss-threshold attack then asks of those rows and as many others, drawn
from the same, who was in.
"rounds": is it a THING or not, two classes made of WordNet's twenty; five clients with even parts, FedIT (both
factors), FFA and FedSVD (B alone), without noise and with the same epsilons over all rounds.  Of several --rates the
one with the best accuracy at the end is taken, for each way and each epsilon, on the rows that are measured on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import record

import undula
from undula.bundled import dataset
from undula.federated import DPSGD, FFA, Aggregation, FedIT, FedSVD
from undula.federated.private import attack, most
from undula.federated.rounds import clients_of, go
from undula.federated.rows import Rows
from undula.federated.server import Server
from undula.federated.spec import Federation
from undula.federated.split import Even
from undula.optim.schedules import Constant
from undula.train import Classification, Recipe

EPSILONS, DELTA, CLIP = (None, 6.0, 3.0, 1.0), 1e-4, 1.0
Rates = tuple[float, ...]
HOWS: dict[str, Aggregation] = {"FedIT": FedIT(), "FFA": FFA(), "FedSVD": FedSVD()}


THINGS = ("animal", "artifact", "body", "food", "location", "object", "person", "plant", "substance")


def small(work: Path, train: int, held: int, two: bool = False) -> Path:
    """So many rows of WordNet, as a folder: both parts of its training rows, so that nothing but having been in tells
    them apart (the classes of its own parts are not as frequent).  two: of the classes "other" and "thing"."""
    folder = work / f"data-{train}-{held}"
    if not folder.is_dir():
        rows = dataset("wordnet")
        mixed = rows["train"].shuffle(seed=0)
        if two:
            kinds = mixed.features["label"].names
            names = ["thing" if kinds[i].removeprefix("noun.") in THINGS else "other" for i in mixed["label"]]
            mixed = mixed.remove_columns("label").add_column("label", names).class_encode_column("label")
        parts = {"train": mixed.select(range(train)), "validation": mixed.select(range(train, train + held))}
        type(rows)(parts).save_to_disk(folder)
    return folder


def asked(data: Path, epsilon: float | None, lr: float, steps: int, batch: int, **federated: Any) -> Federation:
    recipe = Recipe(
        model="bundled:minilm", data=str(data), task=Classification(max_length=16), method=undula.LoRA(r=4),
        where=("query", "value"), lr=lr, max_steps=steps, batch=batch, eval_rows=10_000,
        schedule=Constant(), warmup=0.0,
    )  # fmt: skip
    how = None if epsilon is None else DPSGD(epsilon=epsilon, delta=DELTA, clip=CLIP, accountant="rdp")
    return Federation(recipe, privacy=how, **federated)


def run(f: Federation, out: Path) -> Server:
    rows = Rows(f)
    server = Server(f, out, rows)
    go(server, clients_of(server, rows))
    return server


def told(server: Server) -> dict[str, Any]:
    last = server.records[-1]
    privacy = last.get("privacy") or {}
    return {"accuracy": last["server"]["accuracy"], "loss": last["server"]["loss"], "epsilon": privacy.get("epsilon")}


def attacked(work: Path, rows: int, steps: int, rates: Rates) -> dict[str, Any]:
    """{epsilon: {accuracy, loss, epsilon, before, attack, most}} of one party; the held rows are those that were not
    in.  before: the same attack on the adapter as it began, which nobody's rows are in."""
    data, found = small(work, rows, rows), {}
    for epsilon in EPSILONS:
        best = None
        for lr in rates:
            f = asked(data, epsilon, lr, steps, 32, rounds=1, split=Even(1))
            server = run(f, Path(tempfile.mkdtemp(dir=work)))
            members = server.desk.examples(Rows(f).client(f.names[0]).train)
            seen = {}
            for name, adapter in (("before", server.desk.first), ("attack", server.adapter)):
                server.desk.put(adapter)
                seen[name] = asdict(attack(server.desk.model, members, server.held))
            figures = {**told(server), "lr": lr, **seen}
            if best is None or figures["accuracy"] > best["accuracy"]:
                best = figures
        assert best is not None
        found[str(epsilon)] = {**best, "most": most(epsilon, DELTA) if epsilon else 1.0}
        print("attack", epsilon, found[str(epsilon)], flush=True)
    return found


def in_rounds(
    work: Path,
    epsilons: Sequence[float | None],
    rates: Rates,
    rows: int,
    clients: int,
    rounds: int,
    steps: int,
    batch: int,
) -> Iterator[dict[str, Any]]:
    """{way: {epsilon: {accuracy, loss, epsilon, lr}}} so far, after each."""
    data, found = small(work, rows, 400, two=True), dict[str, Any]()
    for epsilon, (name, how) in itertools.product(epsilons, HOWS.items()):
        each = []
        for lr in rates:
            f = asked(data, epsilon, lr, steps, batch, rounds=rounds, how=how, split=Even(clients))
            each.append({**told(run(f, Path(tempfile.mkdtemp(dir=work)))), "lr": lr})
        found.setdefault(name, {})[str(epsilon)] = max(each, key=lambda figures: figures["accuracy"])
        print(name, epsilon, found[name][str(epsilon)], flush=True)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("attack", "rounds", "both"), default="both")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--epsilons", type=float, nargs="*", help="of the rounds; 0: without noise")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    epsilons = EPSILONS if args.epsilons is None else tuple(epsilon or None for epsilon in args.epsilons)
    warnings.simplefilter("ignore")
    begun, figures = time.process_time(), dict[str, Any](delta=DELTA, clip=CLIP)

    def keep() -> None:
        if args.json:
            record(args.json, figures | {"cpu_seconds": round(time.process_time() - begun, 1)})

    with tempfile.TemporaryDirectory() as scratch:
        work, rates = Path(scratch), tuple(args.rates)
        if args.case != "rounds":
            figures["attack"] = attacked(work, 200, 150, rates)
        if args.case != "attack":
            for figures["rounds"] in in_rounds(
                work, epsilons, rates, rows=5600, clients=5, rounds=6, steps=2, batch=256
            ):
                keep()
    keep()
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
