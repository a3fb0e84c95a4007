"""What three policies make of one load, in virtual time: shares, waiting, adapters read; and how fast they decide.

    python bench/policies.py --json bench/results/policies.json --plot docs/policies.svg

The load: one key asks for several times its share all the time, four stay below theirs, one sends a burst; their
adapters are drawn by Zipf's law from sixty.  `queues.py` beside this one is the server: its times are a formula's, the
policies, the admission and the room for adapters are the library's own.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import queues
from record import record

from undula.observe import drawing as D
from undula.serve.policy import ClusterByAdapter, FairShare, Fcfs, Policy, Ticket

POLICIES = {"Fcfs": Fcfs, "FairShare": FairShare, "ClusterByAdapter": lambda: ClusterByAdapter(5.0)}
MODEST = tuple(f"modest {i}" for i in range(1, 5))
KEYS = ("greedy", *MODEST, "burst")
SECONDS, ADAPTERS, BURST = 120.0, 60, 300


def load(seed: int) -> list[queues.Arrival]:
    """More than can be served while it comes."""
    rng = random.Random(seed)
    asked = [("greedy", t) for t in queues.poisson(rng, 10.0, SECONDS)] + [("burst", SECONDS / 2)] * BURST
    asked += [(key, t) for key in MODEST for t in queues.poisson(rng, 0.8, SECONDS)]
    return [
        queues.request(rng, when, key, queues.zipf(rng, ADAPTERS), n) for n, (key, when) in enumerate(sorted(asked))
    ]


def moderate(seed: int) -> list[queues.Arrival]:
    """Nearly what can be served."""
    rng = random.Random(seed)
    times = queues.poisson(rng, 5.2, 2 * SECONDS)
    return [
        queues.request(rng, when, KEYS[n % len(KEYS)], queues.zipf(rng, ADAPTERS), n) for n, when in enumerate(times)
    ]


def simulated(policy: Policy, seed: int, adapters: int) -> queues.Course:
    server = queues.Server(policy, queues.Machine(adapters=adapters), patience=1.0)
    if adapters >= ADAPTERS:
        server.adapters.warm(f"a{i}" for i in range(ADAPTERS))
    return server.run(load(seed))


def figures(course: queues.Course) -> dict[str, object]:
    """Waits in seconds to the first token; tokens that each key had got when the last requests came."""
    got = dict.fromkeys(KEYS, 0)
    for when, key, _, tokens in course.charges:
        got[key] += tokens * (when <= SECONDS)
    waits = {key: course.wait(key) for key in KEYS}
    return {
        "requests": len(course.jobs),
        "adapters read": course.loads,
        "overtaken by s": round(course.overtaken(), 2),
        "wait p50 s": {key: round(queues.quantile(w, 0.5), 2) for key, w in waits.items()},
        "wait p95 s": {key: round(queues.quantile(w, 0.95), 2) for key, w in waits.items()},
        "tokens": got,
    }


def deciding(waiting: int) -> dict[str, float]:
    """Milliseconds of one `order` with so many waiting."""
    rng = random.Random(0)
    tickets = [
        Ticket(str(i), f"a{rng.randint(0, 500)}", f"k{rng.randint(0, 50)}", 100, float(i), bytes=i % 2)
        for i in range(waiting)
    ]
    found = {}
    for name, make in POLICIES.items():
        policy, times = make(), []
        for _ in range(5):
            start = time.perf_counter()
            policy.order(tickets, tickets[:32], 1e9 if name == "Fcfs" else float(waiting))
            times.append(time.perf_counter() - start)
        found[name] = round(1e3 * min(times), 3)
    return found


def targets(found: dict[str, dict], courses: dict[str, queues.Course]) -> dict[str, bool]:
    fair, first = found["FairShare"], found["Fcfs"]
    modest = [max(f["wait p95 s"][key] for key in MODEST) for f in (fair, first)]
    return {
        "everyone is served": len({f["requests"] for f in found.values()}) == 1,
        "nobody is overtaken by Fcfs with all adapters in memory": first["overtaken by s"] == 0,
        "p95 of the modest keys: FairShare <= 0.2 of Fcfs": modest[0] <= 0.2 * modest[1],
        "the greedy key loses nothing that nobody else wants: same end to 5 %": (
            courses["FairShare"].end <= 1.05 * courses["Fcfs"].end
        ),
    }


def plotted(courses: dict[str, queues.Course]) -> bytes:
    """Tokens by key over time, of each policy."""
    width, height, left, top, gap = 250.0, 210.0, 52.0, 46.0, 34.0
    colours = {"greedy": D.LIGHT["loss"], "burst": D.LIGHT["open"]}
    with D.styled():
        figure = D.blank(left + 3 * width + 2 * gap + 110, top + height + 44)
        most = max(line[-1][1] for c in courses.values() for line in (c.service(key) for key in KEYS)) / 1e3
        end = max(c.end for c in courses.values())
        for i, (name, course) in enumerate(courses.items()):
            axis = D.axes(figure, left + i * (width + gap), top, width, height)
            axis.set(xlim=(0, end), ylim=(0, 1.05 * most))
            axis.grid(axis="y")
            axis.set_xlabel("seconds")
            axis.annotate(name, (0, 1), (0, 22), "axes fraction", "offset points", color=D.LIGHT["ink"], weight="bold")
            wait = max(queues.quantile(course.wait(key), 0.95) for key in MODEST)
            said = f"modest keys: p95 of waiting {wait:.1f} s"
            axis.annotate(said, (0, 1), (0, 8), "axes fraction", "offset points", color=D.LIGHT["pale"])
            for key in KEYS:
                x, y = zip(*[(when, n / 1e3) for when, n in course.service(key)][::8], strict=True)
                axis.plot(x, y, color=colours.get(key, D.LIGHT["win"]), label=key.split()[0])
        seen = {label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        axis.legend(seen.values(), seen, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
        figure.axes[0].set_ylabel("1,000 tokens computed")
        return D.rendered(figure, "svg", "Tokens computed for each key over time, under three policies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    courses = {name: simulated(make(), asked.seed, ADAPTERS) for name, make in POLICIES.items()}
    warm = {name: figures(course) for name, course in courses.items()}
    tight = {name: figures(simulated(make(), asked.seed, 10)) for name, make in POLICIES.items()}
    small = queues.Machine(adapters=10, running=8)
    calm = {
        name: figures(queues.Server(make(), small, patience=1.0).run(moderate(asked.seed)))
        for name, make in POLICIES.items()
    }
    met = targets(warm, courses)
    met["ClusterByAdapter reads fewer adapters than Fcfs under a load that can be served"] = (
        calm["ClusterByAdapter"]["adapters read"] < calm["Fcfs"]["adapters read"]
    )
    found = {
        "all adapters in memory": warm,
        "room for 10 of 60 adapters": tight,
        "moderate load, 8 run at a time, room for 10 of 60": calm,
        "order of 1000, ms": deciding(1000),
        "targets": met,
        "targets_met": all(met.values()),
    }
    for part in list(found)[:3]:
        print(part)
        for name, f in found[part].items():
            waits = {key: f["wait p95 s"][key] for key in ("greedy", "modest 1", "burst")}
            print(f"  {name:17} p95 wait {waits}, {f['adapters read']} read, overtaken by {f['overtaken by s']} s")
    print("targets:", *(f"{'met   ' if ok else 'MISSED'} {what}" for what, ok in met.items()), sep="\n  ")
    if asked.plot:
        asked.plot.write_bytes(plotted(courses))
    if asked.json:
        record(asked.json, found)
    sys.exit(not found["targets_met"])


if __name__ == "__main__":
    main()
