"""What should worry whoever reads the report of a training: losses that ran away, answers that are all the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .run import REPORT

RAN_AWAY = 2.0  # times the loss at the beginning
OF_THE_LOSS = ("the training loss rose", "on the validation rows the loss")  # see `doubts`
ANSWERS = "the model answers no better than with one class for all"


def diverged(report: Mapping[str, Any]) -> str | None:
    """How the training of this report failed, in words; None where it did not: a number that is none, or a loss that
    ended far above where it began."""
    before, after = report.get("before") or {}, report.get("after") or {}
    strange = [f"{k} is {_said(v)}" for k, v in after.items() if not _finite(v)]
    losses = [loss for _, loss in report.get("losses", [])]
    strange += [f"the loss was {_said(loss)}" for loss in losses if not _finite(loss)][:1]
    strange += ["the adapter was not finite"] if report.get("state") == "diverged" else []
    if strange:
        return f"{strange[0]}; {_advice(report)}"
    pairs = [(before.get("loss"), after.get("loss")), (losses[0], losses[-1]) if len(losses) > 1 else (None, None)]
    for first, last in pairs:
        if first is not None and last is not None and last > RAN_AWAY * max(first, math.log(2)):
            return f"the loss went from {first:.4g} to {last:.4g}; {_advice(report)}"
    return None


def worries(report: Mapping[str, Any]) -> list[str]:
    """All that should worry, each "headline: detail", what the report itself lists included."""
    found = list(dict.fromkeys(str(text) for text in report.get("warnings", [])))
    failed = diverged(report)
    if failed:  # which says of the loss all that there is to say
        found = [text for text in found if not text.startswith(OF_THE_LOSS)]
        found.append(f"the training diverged: {failed}")
    if "warnings" not in report and (report.get("after") or {}).get("mcc") == 0:  # a report of an earlier version
        found.append(f"one class: Matthews' correlation is 0, {ANSWERS}")
    return found


def _finite(value: Any) -> bool:
    """Reports hold None in the place of NaN and infinity."""
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


def _said(value: Any) -> str:
    return "not finite" if value is None else str(value)


def reported(path: Path) -> dict[str, Any]:
    """The report that a training left in a directory; empty where there is none."""
    try:
        found = json.loads((path / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _advice(report: Mapping[str, Any]) -> str:
    run = report.get("run")
    rate = f" (it was {run['lr']:g})" if isinstance(run, Mapping) and isinstance(run.get("lr"), float) else ""
    return f"lower the learning rate{rate}"
