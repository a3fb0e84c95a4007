"""One training run as a value, and its place on disk.

OUT/run.json                    the run, and the metric before training
OUT/run.toml                    the run as `undula train --config` takes it, to repeat it
OUT/checkpoints/checkpoint-N/   adapter, optimiser, schedule and random generators at step N
OUT/adapter_*.{json,safetensors}, OUT/report.json   the end
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..io import files
from . import config
from .fields import OUTPUT, facts
from .recipe import Recipe, checked_path, recipe_of

RUN, REPORT, CHECKPOINTS = "run.json", "report.json", "checkpoints"
CONFIG = "run.toml"
VERSION = 4  # 3: every step was `plain`
# 2: nothing was measured while it trained
# 1: a validation part was made by chance alone, without regard to classes and equal inputs


@dataclass(frozen=True)
class Run(Recipe):
    """A recipe, and the directory where what comes of it goes."""

    out: Path = field(
        metadata=facts("The directory to write: adapter, report, checkpoints.", figures=False, panel=OUTPUT)
    )

    @staticmethod
    def of(recipe: Recipe, out: Path) -> Run:
        """That recipe, written there."""
        return Run(**{f.name: getattr(recipe, f.name) for f in fields(Recipe)}, out=out)

    @staticmethod
    def as_meant(name: str, value: Any) -> Any:
        """See `Settings.as_meant`."""
        return Path(checked_path(name, value)) if name == "out" else Recipe.as_meant(name, value)

    @staticmethod
    def decode(data: Mapping[str, Any], out: Path) -> Run:
        """The inverse of `encode`.  Raises LookupError or ValueError for what does not belong there."""
        return Run.of(recipe_of(data), out)

    def save(
        self,
        before: Mapping[str, float] | None,
        digest: Mapping[str, str] | None = None,
        written: Any = None,
        tuned: Mapping[str, Any] | None = None,
        rounds: str | None = None,
    ) -> None:
        """Writes OUT/run.json and, if it was one training, OUT/run.toml to repeat it.

        before: the metric before training.  digest: what tells rows and model from others.  tuned: how the rate was
        found, where it was.  rounds: of a federation, whose rows it was trained on: those of "clients", so that all of
        `data` is for measuring, or a "split" of them.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        given: dict[str, Any] = {} if digest is None else {"digest": dict(digest)}
        given |= {} if not written else {"written": written}  # what was generated before the training
        given |= {} if tuned is None else {"tuned": dict(tuned)}
        given |= {} if rounds is None else {"rounds": rounds}
        said = self.encode() | {"gradient_checkpointing": self.gradient_checkpointing}  # see `config.told_of_a_run`
        write_json(self.out / RUN, {"version": VERSION, "run": said, "before": before, **given})
        if rounds is None:
            files.write_text(self.out / CONFIG, config.written(self))

    @staticmethod
    def load(path: str | Path) -> Run:
        """The run whose directory `path` is, or of a file (see `train.config`) that says `out` too.  Raises
        FileNotFoundError, LookupError or ValueError."""
        if Path(path).is_file():
            return config.complete(path, Run)
        out = Path(path)
        with files.door(str(out / RUN)):
            data = read_run(out)
            return Run.decode(config.told_of_a_run(data), out)


def read_run(out: Path) -> dict[str, Any]:
    """The content of OUT/run.json.  Raises FileNotFoundError, or ValueError for what is malformed."""
    path = out / RUN
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in out.iterdir())[:8]) if out.is_dir() else "no such directory"
        raise FileNotFoundError(f"{out} is not the directory of a run: {RUN} is missing; found: {there or 'nothing'}")
    data = files.parsed(path.read_bytes(), str(path))
    if data.get("version") not in range(1, VERSION + 1) or not isinstance(data.get("run"), dict):
        raise ValueError(f"{path} is not a run of version 1 to {VERSION}")
    return data


def write_json(path: Path, data: Any) -> None:
    """Writes JSON to `path`: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
