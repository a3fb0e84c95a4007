"""What the rows of shots.py say: differences of arms, a table, a figure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from undula.study.statistics import spread

SETS, METHODS, OPTIMISERS = ("fashion", "emoji"), ("lora", "block-2", "block-4"), ("adamw", "sam", "conflict")
Arm = tuple[str, str, float]  # method, optimiser, rate
SLOW, FAST = 3e-3, 1e-2
ARMS: tuple[Arm, ...] = (
    *(("lora", how, lr) for how in ("adamw", "sam") for lr in (SLOW, FAST)),
    *((method, "adamw", lr) for method in ("block-2", "block-4") for lr in (SLOW, FAST)),
    ("block-4", "sam", FAST),
)
RHO = 0.5  # of SAM in all rows but the sweep's
SHOTS, FIGURES = (1, 2, 4, 8, 16), ("base", "new", "H")


def pairwise(rows: list[dict[str, Any]], name: str, one: Arm, other: Arm) -> dict[str, Any]:
    """H, base and new of one arm less those of another, by seed over the shots that all seeds have; Student's interval
    of H's."""
    seeds = sorted({r["seed"] for r in rows})
    both = [{(r["seed"], r["shots"]): r for s in SHOTS for r in arm(rows, name, s, of)} for of in (one, other)]
    shots = [k for k in SHOTS if all((s, k) in each for s in seeds for each in both)]
    gains = {f: [statistics.fmean(both[0][s, k][f] - both[1][s, k][f] for k in shots) for s in seeds] for f in FIGURES}
    told = spread(gains["H"])
    return {"set": name, "arm": said(one), "beside": said(other), "gain": told.mean, "low": told.low, "high": told.high,
            "base": statistics.fmean(gains["base"]), "new": statistics.fmean(gains["new"]), "shots": shots}  # fmt: skip


def said(of: Arm) -> str:
    return f"{of[0]}, {of[1]}, {of[2]:g}"


def complete(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the arms, of draws that all arms have."""
    own = [r for r in rows if r["kind"] == "row" and (r["method"], r["optimiser"], r["lr"]) in ARMS]
    count = Counter((r["set"], r["shots"], r["seed"]) for r in own)
    return [r for r in own if count[r["set"], r["shots"], r["seed"]] == len(ARMS)]


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """Differences of the arms, and whether what was aimed at, or what the papers claim, is so."""
    rows = complete(found["rows"])
    sets, zero, lora = sorted({r["set"] for r in rows}), found["zero_shot"], ("lora", "adamw")
    blocks = [
        pairwise(rows, s, (m, "adamw", lr), (*lora, lr)) for m in METHODS[1:] for lr in (SLOW, FAST) for s in sets
    ]
    flat = [pairwise(rows, s, of, (of[0], "adamw", of[2])) for of in ARMS if of[1] == "sam" for s in sets]
    slower = [pairwise(rows, s, ("lora", "sam", FAST), (*lora, SLOW)) for s in sets]
    over, most = {}, max(r["shots"] for r in rows)
    for name in sets:
        told = spread([r["H"] - zero[name][str(r["seed"])]["H"] for r in arm(rows, name, most, (*lora, SLOW))])
        over[name] = {"gain": told.mean, "low": told.low, "high": told.high}
    met = {
        f"LoRA with {most} shots is above zero-shot in H on every set": all(g["gain"] > 0 for g in over.values()),
        "Block-LoRA of 4 blocks is LoRA of rank 2 with B's rate times 4: logits within 0.01": found["twin"] < 0.01,
        "Block-LoRA's H at LoRA's rate is LoRA's less 0.01, or more": all(g["gain"] > -0.01 for g in blocks),
        "SAM's reference raises LoRA's H at its rate on every set": all(
            g["gain"] > 0 for g in flat if g["arm"].startswith("lora")
        ),
        "and above that of AdamW at the lower rate": all(g["gain"] > 0 for g in slower),
    }
    return {"gains": blocks + flat + slower, "over_zero_shot": over, "targets_met": met}


def arm(rows: list[dict[str, Any]], name: str, shots: int, of: Arm) -> list[dict[str, Any]]:
    """Its rows, one of each seed."""
    return [r for r in rows if (r["set"], r["shots"], r["method"], r["optimiser"], r["lr"]) == (name, shots, *of)]


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(r[key] for r in rows)


def table(found: dict[str, Any]) -> Iterator[str]:
    rows = complete(found["rows"])
    most = max(Counter((r["set"], r["shots"]) for r in rows).values())
    for name in sorted({r["set"] for r in rows}):
        shown = [k for k in SHOTS if len([r for r in rows if (r["set"], r["shots"]) == (name, k)]) == most]
        zero = list(found["zero_shot"][name].values())
        yield f"\n{name}: base / new / H; zero-shot " + " / ".join(f"{mean(zero, k):.3f}" for k in FIGURES)
        yield f"| | {' | '.join(map(str, shown))} shots |\n|---|" + "---|" * len(shown)
        for of in ARMS:
            cells = [" / ".join(f"{mean(arm(rows, name, k, of), f):.3f}" for f in FIGURES) for k in shown]
            yield f"| `{of[0]}`, {of[1]}, {of[2]:g} | {' | '.join(cells)} |"
    for g in found["gains"]:
        sure = "" if g["low"] is None else f" [{g['low']:+.3f}, {g['high']:+.3f}]"
        parts = f"base {g['base']:+.3f} new {g['new']:+.3f} H {g['gain']:+.3f}{sure}"
        yield f"{g['set']}: {g['arm']} less {g['beside']}: {parts}"


def plot(found: dict[str, Any], path: Path) -> None:
    """Taught against new classes: each arm a course from 1 to 16 shots, beginning at zero-shot."""
    from undula.observe import drawing as D

    rows = complete(found["rows"])
    sets = sorted({r["set"] for r in rows})
    with D.styled():
        figure = D.blank(330 * len(sets) + 190, 300)
        for i, name in enumerate(sets):
            axes = D.axes(figure, 50 + 330 * i, 40, 270, 210)
            zero = list(found["zero_shot"][name].values())
            axes.plot([mean(zero, "base")], [mean(zero, "new")], "s", color=D.LIGHT["back"], label="zero-shot")
            for method, how, lr in ARMS:
                own = [r for k in SHOTS if (r := arm(rows, name, k, (method, how, lr)))]
                x, y = ([mean(r, f) for r in own] for f in ("base", "new"))
                colour = D.LIGHT["win" if how == "sam" else "loss"]
                style = {"lora": "-", "block-2": "--", "block-4": ":"}[method] + ("o" if lr == SLOW else "x")
                axes.plot(x, y, style, color=colour, markersize=4, label=f"{method}, {how}, {lr:g}")
            axes.set_xlabel("accuracy on taught classes, 1 to 16 shots")
            axes.set_title(f"{name}: accuracy on new classes", loc="left")
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
        title = "Accuracy on taught and new classes from 1 to 16 shots, by method, optimiser and learning rate"
        path.write_bytes(D.rendered(figure, "svg", title))
