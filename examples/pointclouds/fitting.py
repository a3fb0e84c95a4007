"""What both scripts share: a training loop, rows kept as they come, and records like those of bench/."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from record import record

__all__ = ["arguments", "check_size", "fit", "kept", "record"]


def arguments(what: str, name: str, wide: str = "") -> argparse.Namespace:
    """`--work`, `--json`, `--figure` and `--quick`, and `--wide` where it is told what that does; torch is set to one
    thread."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default, told in (
        ("--work", f"runs/{name}", "what has run"),
        ("--json", f"runs/{name}.json", "the record"),
        ("--figure", f"runs/{name}.svg", "the picture"),
    ):
        parser.add_argument(option, type=Path, default=Path(default), help=f"{told} (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps only; all is kept under quick-... then")
    if wide:
        parser.add_argument("--wide", action="store_true", help=wide)
    given = parser.parse_args()
    if given.quick:  # what whole runs left stays
        given.work, given.json, given.figure = (
            path.with_name(f"quick-{path.name}") for path in (given.work, given.json, given.figure)
        )
    torch.set_num_threads(1)
    return given


def fit(
    parameters: Iterable[nn.Parameter], step_loss: Callable[[int], Tensor], steps: int, lr: float, told: str
) -> dict[str, Any]:
    """AdamW at `lr`, a tenth of warm-up, then a cosine down to zero; gradients clipped at norm 5.  Returns the mean
    loss of the last tenth and the seconds of CPU."""
    trained = list(parameters)
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    begun, losses = time.process_time(), []
    for step in track(range(steps), told, disable=not sys.stdout.isatty()):
        loss = step_loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return {"loss": sum(last) / len(last), "cpu_seconds": round(time.process_time() - begun, 1)}


def kept(file: Path, made: Callable[[], Any]) -> Any:
    """What the file holds; made, and written whole or not at all, where there is none."""
    if not file.is_file():
        found = made()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def check_size(folder: Path, size: dict[str, Any], free: Iterable[str]) -> None:
    """Raises SystemExit where the folder holds runs of another size; says there which size it is for.  What is `free`
    says how many runs there are, and changes none."""
    now = {k: v for k, v in json.loads(json.dumps(size)).items() if k not in free}
    held = kept(folder / "size.json", lambda: now)
    if odd := [k for k, v in now.items() if held.get(k) != v]:
        raise SystemExit(f"{folder} holds runs of another size ({', '.join(odd)}): name another --work")
