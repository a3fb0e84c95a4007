"""Studies: which adapter is best for a model and a budget, compared honestly.

undula.study("STUDY.toml", out="runs")      # the verb: runs what is left, and reports
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.extras import told
from .drive import (
    Estimate,
    Finished,
    View,
    counted,
    estimate,
    report,
    run,
    warnings,
)
from .executors import Executor, Local
from .outcome import FINAL, SWEEP, ChosenRate, Outcome
from .read import Faults, parse, read, text_of
from .spec import (
    Arm,
    Base,
    Budget,
    Rows,
    Study,
    Sweep,
    Training,
)

__all__ = [
    "FINAL",
    "SWEEP",
    "Arm",
    "Base",
    "Budget",
    "ChosenRate",
    "Estimate",
    "Executor",
    "Faults",
    "Finished",
    "Local",
    "Outcome",
    "Rows",
    "Study",
    "Sweep",
    "Training",
    "View",
    "counted",
    "estimate",
    "parse",
    "read",
    "report",
    "run",
    "warnings",
]


_counted, _estimate, _parse, _read, _report, _run, _warnings = counted, estimate, parse, read, report, run, warnings


class _Study(types.ModuleType):
    """This package is also the verb: `undula.study(path)`."""

    if TYPE_CHECKING:  # what a checker, for which `undula.study` is an object of this class, finds on it
        from .drive import Estimate, Finished, View
        from .executors import Executor, Local
        from .outcome import ChosenRate, Outcome
        from .read import Faults
        from .spec import (
            Arm,
            Base,
            Budget,
            Rows,
            Study,
            Sweep,
            Training,
        )

        counted = staticmethod(_counted)
        estimate = staticmethod(_estimate)
        parse = staticmethod(_parse)
        read = staticmethod(_read)
        report = staticmethod(_report)
        run = staticmethod(_run)
        warnings = staticmethod(_warnings)

    @told
    def __call__(
        self,
        study: Study | str | Path,
        out: str | Path | None = None,
        *,
        executor: Executor | None = None,
        view: View | None = None,
        retry_failed: bool = False,
    ) -> Finished:
        if isinstance(study, Study):
            if out is None:
                raise ValueError("say where the runs are kept: undula.study(study, out=...)")
            return run(study, out, executor=executor, view=view, retry_failed=retry_failed)
        path = Path(study)
        about = {"study file": text_of(path)} if path.is_file() else None
        out = Path(path.stem + "-study") if out is None else out
        return run(read(path), out, executor=executor, view=view, about=about, retry_failed=retry_failed)


_Study.__call__.__doc__ = run.__doc__
sys.modules[__name__].__class__ = _Study
