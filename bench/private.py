"""Privacy for real: what noise costs, which aggregation bears it, and what an attack on losses learns with and without.

    python bench/private.py --case rounds --rates 0.01 --json bench/results/private-rounds.json  # half an hour
    python bench/private.py --case attack --rates 0.003 --json bench/results/private-attack.json  # some minutes
    python bench/private.py --case attack --table bench/results/private-attack.json  # as Markdown; measures nothing
    python bench/private.py --case rounds --short                                    # a miniature, to see that it runs

MiniLM on WordNet, LoRA at query and value.  "attack": one party with few rows trains on them for long by AdamW, without
noise and with DP-SGD at several epsilons; the loss-threshold attack then asks of those rows and as many others, drawn
from the same, who was in.  Beside it the same attack among rows of one class, and by the counts of classes alone.
"rounds": is it a THING or not, two classes made of WordNet's twenty; five clients with even parts, FedIT (both
factors), FFA and FedSVD (B alone), without noise and with the same epsilons over all rounds.
Each of several --rates is a row of its own: none is chosen, since all other rows are those that are measured on.
Noise is the system's: no run comes twice.  Rows that the file holds are not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from record import kept, record
from torch import Tensor

import undula
from undula.bundled import dataset
from undula.federated import DPSGD, FFA, Aggregation, FedIT, FedSVD
from undula.federated.messages import ROWS
from undula.federated.private import membership, most
from undula.federated.private.losses import row_losses
from undula.federated.rounds import clients_of, go
from undula.federated.rows import Rows
from undula.federated.server import Server
from undula.federated.spec import Federation
from undula.federated.split import Even
from undula.observe.listen import evaluating
from undula.optim.schedules import Constant
from undula.train import Classification, Recipe
from undula.train.tasks.task import Examples

EPSILONS, DELTA, CLIP = (0.0, 6.0, 3.0, 1.0), 1e-4, 1.0  # 0: without noise
HOWS: dict[str, Aggregation] = {"FedIT": FedIT(), "FFA": FFA(), "FedSVD": FedSVD()}
SIZES = {
    "attack": {"rows": 200, "others": 200, "clients": 1, "rounds": 1, "steps": 150, "batch": 32},
    "rounds": {"rows": 5600, "others": 400, "clients": 5, "rounds": 6, "steps": 2, "batch": 256},
}
SHORT = {"rows": 120, "others": 40, "steps": 1, "batch": 16}

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


def asked(data: Path, epsilon: float, lr: float, how: Aggregation, of: dict[str, int]) -> Federation:
    recipe = Recipe(
        model="bundled:minilm", data=str(data), task=Classification(max_length=16), method=undula.LoRA(r=4),
        where=("query", "value"), lr=lr, max_steps=of["steps"], batch=of["batch"], eval_rows=10_000,
        schedule=Constant(), warmup=0.0,
    )  # fmt: skip
    noise = DPSGD(epsilon=epsilon, delta=DELTA, clip=CLIP, accountant="rdp") if epsilon else None
    return Federation(recipe, of["rounds"], how=how, privacy=noise, split=Even(of["clients"]))


def run(f: Federation, work: Path) -> Server:
    """Raises RuntimeError where a client failed or a round changed nothing: its figures would be of something else."""
    rows = Rows(f)
    server = Server(f, Path(tempfile.mkdtemp(dir=work)), rows)
    go(server, clients_of(server, rows))
    for each in server.records[1:]:
        if "stayed" in each or any("failed" in client for client in each["clients"].values()):
            raise RuntimeError(f"round {each['round']} is not whole: {each}")
    return server


def told(server: Server) -> dict[str, Any]:
    """accuracy, loss: of the rows that are measured on.  Of privacy all that its epsilon follows from, of the client
    with the fewest rows, which takes them at the highest rate."""
    f, last = server.federation, server.records[-1]
    figures = {"accuracy": last["server"]["accuracy"], "loss": last["server"]["loss"], "measured_on": len(server.held)}
    rows, name = min((client[ROWS], name) for name, client in last["clients"].items())
    figures |= {"rows": rows, "steps": f.planned[name] * f.recipe.max_steps, "batch": f.recipe.batch}
    if f.privacy is not None:
        figures |= {"spent": last["privacy"]["epsilon"], "noise": f.privacy.noise_of(f, name, rows)}
    return figures


def in_classes(members: Tensor, others: Tensor, of_members: Tensor, of_others: Tensor) -> float:
    """The attack's area over the pairs of a member and another of one class, where counts of classes tell nothing.
    members (m,), others (n,): losses; of_members, of_others: the classes of their rows."""
    pairs = of_members[:, None] == of_others
    lower = (members[:, None] < others).double() + (members[:, None] == others).double() / 2
    return float(lower[pairs].mean())


def seen(server: Server, adapter: Any, members: Examples) -> dict[str, Any]:
    """What the attack finds with this adapter: in all, in classes, and by the counts of classes among members alone."""
    server.desk.put(adapter)
    parts, losses = (members, server.held), []
    with evaluating(server.desk.model), torch.no_grad():
        for part in parts:
            some = torch.arange(len(part)).split(64)
            losses.append(torch.cat([row_losses(server.desk.model, part, at.tolist()) for at in some]))
    classes = [torch.tensor(part.rows["label"][:]) for part in parts]
    counts = classes[0].bincount(minlength=int(torch.cat(classes).max()) + 1).double()
    by_counts = membership(-counts[classes[0]], -counts[classes[1]]).auc
    return {**asdict(membership(*losses)), "in_classes": in_classes(*losses, *classes), "by_counts": by_counts}


def attacked(f: Federation, work: Path, epsilon: float) -> dict[str, Any]:
    """Of one party; the rows that are measured on were not in.  before: the same attack on the adapter as it began,
    which nobody's rows are in."""
    server = run(f, work)
    members = server.desk.examples(Rows(f).client(f.names[0]).train)
    found = {name: seen(server, a, members) for name, a in (("before", server.desk.first), ("attack", server.adapter))}
    return {**told(server), **found, "most": most(epsilon, DELTA) if epsilon else 1.0}


def made(args: argparse.Namespace, of: dict[str, int], there: list[dict[str, Any]], work: Path) -> Iterator[Any]:
    """A row for each (epsilon, way, rate) that is not there."""
    done = {(row["epsilon"], row["way"], row["lr"]) for row in there}
    data = small(work, of["rows"], of["others"], two=args.case == "rounds")
    hows = HOWS if args.case == "rounds" else {"alone": FedIT()}
    for what in ((e, way, lr) for e in args.epsilons for way in hows for lr in args.rates):
        if what in done:
            continue
        epsilon, way, lr = what
        f = asked(data, epsilon, lr, hows[way], of)
        figures = attacked(f, work, epsilon) if args.case == "attack" else told(run(f, work))
        yield {"way": way, "epsilon": epsilon, "lr": lr, **figures}


def table(case: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| way | rate | epsilon | accuracy | loss |" + (" attack | in classes | most |" if case == "attack" else "")
    yield "|---|---:|---:|---:|---:|" + ("---|---:|---:|" if case == "attack" else "")
    for row in rows:
        line = f"| {row['way']} | {row['lr']:g} | {row['epsilon']:g} | {row['accuracy']:.3f} | {row['loss']:.3f} |"
        if case == "attack":
            a = row["attack"]
            line += f" {a['auc']:.3f} [{a['low']:.3f}, {a['high']:.3f}] | {a['in_classes']:.3f} | {row['most']:.3f} |"
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=SIZES, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS, help="0: without noise")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="show what is in this file, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(args.case, json.loads(args.table.read_text(encoding="utf-8"))["rows"])))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    of = SIZES[args.case] | (SHORT if args.short else {})
    how = {"case": args.case, "delta": DELTA, "clip": CLIP, "of": of}
    rows = kept(args.json, how)
    with tempfile.TemporaryDirectory() as scratch:
        for row in made(args, of, list(rows), Path(scratch)):
            rows.append(row)
            print(row, flush=True)
            if args.json:
                record(args.json, {**how, "rows": rows})
    print("\n".join(table(args.case, rows)))


if __name__ == "__main__":
    main()
