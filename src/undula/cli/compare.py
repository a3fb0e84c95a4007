"""`undula compare`: are these trained adapters different?"""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import shell

if TYPE_CHECKING:
    from ..study.compare import Compared


def compare(
    paths: Annotated[list[Path], typer.Argument(help="Directories of `undula train`, two or more.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Write a report (HTML, Markdown, LaTeX, plots, CSV) there.")] = None,
    split: Annotated[str | None, typer.Option(help="(default: test where the data have it, else validation)")] = None,
    rows: Annotated[int | None, typer.Option(help="So many rows, the same for all. (default: all)", min=1)] = None,
    baseline: Annotated[str | None, typer.Option(help="An arm, a method or a directory. (default: LoRA)")] = None,
    to: shell.Json = None,
) -> None:
    """Compare trained adapters honestly: the same rows, seeds paired, and no verdict that the figures do not bear."""
    from ..study.compare import compare as run
    from ..train.base import quiet

    if out is not None:
        shell.fresh(out)
    with quiet():
        found = run(paths, split=split, rows=rows, baseline=baseline, say=lambda text: shell.say(text, "dim"))
    shell.write(to, _encoded(found))
    if str(to) != "-":
        _show(found)
    if out is not None:
        page = _report(found, out, _command(paths, split, rows, baseline))
        if str(to) != "-":
            shell.note(f"Saved in {page}")


def _encoded(found: Compared) -> dict[str, Any]:
    from ..study.report.words import limits, opening

    summary = found.summary
    return {
        "baseline": summary.baseline,
        "split": found.split,
        "rows": found.rows,
        "directories": {str(e.path): {"arm": e.arm, "seed": e.run.seed} for e in found.entries},
        "arms": [row.flat() for row in summary.rows],
        "row_by_row": [dataclasses.asdict(each) for each in found.row_by_row],
        "words": list(opening(summary)),
        "limits": list(limits(summary)),
    }


def _show(found: Compared) -> None:
    from ..study.report.words import opening

    summary = found.summary
    told = []
    for row in summary.rows:
        q, c = row.quality, row.against
        told.append(
            {
                "arm": row.arm,
                "seeds": q.n if q else 0,
                row.metric: q.mean if q else None,
                "parameters": row.parameters,
                "difference": c.difference if c else None,
                "interval": f"{c.low:+.4g} to {c.high:+.4g}"
                if c and c.low is not None and c.high is not None
                else None,
                "p (Holm)": c.p_holm if c else None,
                "verdict": c.verdict if c else "baseline",
            }
        )
    shell.out.print(shell.table(told, f"{found.rows:,} rows of {found.split}"))
    if found.row_by_row:
        columns = ("arm", "rows", "only_arm", "only_baseline", "difference", "low", "high", "p_holm")
        shown = [{name: getattr(each, name) for name in columns} for each in found.row_by_row]
        shell.out.print(shell.table(shown, "row by row: about these adapters, not about their methods"))
    for line in opening(summary):
        shell.note(line)


def _report(found: Compared, out: Path, command: str) -> Path:
    from ..study.report import write
    from ..study.row_by_row import sections
    from ..train.measure import versions

    run, rule = found.entries[0].run, found.summary.rule
    directories = "\n".join(f"{e.path}: {e.arm}, seed {e.run.seed}" for e in found.entries)
    about = {
        "command": command,
        "rows": f"{found.rows:,} rows of the split {found.split} of {run.data}, the same for all",
        "directories": directories,
        "task": json.dumps(run.task.encode()),
        "versions": "\n".join(f"{name} {version}" for name, version in versions().items()),
    }
    extra = sections(found.row_by_row, found.summary.baseline, f"{100 * rule.confidence:g}")
    return write(out, found.summary, f"{len(found.summary.arms)} adapters compared", about, extra=extra)


def _command(paths: list[Path], split: str | None, rows: int | None, baseline: str | None) -> str:
    options = {"--split": split, "--rows": rows, "--baseline": baseline}
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(["undula", "compare", *map(str, paths), *given])
