"""Studies: which adapter is best for a model and a budget, compared honestly.

    undula.study("study.toml", out="runs")      # runs what is left, and reports

Nothing else is loaded until it is called: `from undula.study.read import read`, `from undula.study.spec import Study`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.extras import needs
from ..core.turns import turn

if TYPE_CHECKING:
    from .drive import Finished
    from .spec import Study
    from .view import View

__all__ = ["study"]


@needs("study")
@turn()
def study(
    study: Study | str | Path,
    out: str | Path | None = None,
    *,
    view: View | None = None,
    retry_failed: bool = False,
    together: int | None = None,
) -> Finished:
    """Runs what is left of a study, a file or a value, whose store is OUT/runs.sqlite, and writes OUT/report.

    May be stopped at any time and called again, or called in several processes on one `out` at once: runs that have
    ended are never repeated.  A failed run is recorded with its error and does not stop the rest; `retry_failed` makes
    such runs again.  `together`: so many runs of one model at once, on one base and in the same steps (docs/study.md).
    Without `out`, that is the file's name with -study.  Raises ValueError or LookupError for a study that cannot be
    carried out, or whose data or models changed since runs in OUT were made, before any run.
    """
    from .drive import run
    from .read import read, text_of
    from .spec import Study

    if isinstance(study, Study):
        if out is None:
            raise ValueError("say where the runs are kept: undula.study(study, out=...)")
        return run(study, out, view=view, retry_failed=retry_failed, together=together)
    path = Path(study)
    about = {"study file": text_of(path)} if path.is_file() else None
    out = Path(path.stem + "-study") if out is None else out
    return run(read(path), out, view=view, about=about, retry_failed=retry_failed, together=together)
