"""One training run as a value, and its place on disk.

OUT/run.json                    the run, and the metric before training
OUT/checkpoints/checkpoint-N/   adapter, optimiser, schedule and random generators at step N
OUT/adapter_*.{json,safetensors}, OUT/report.json   the end
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..given import Checked
from ..io import files
from ..method import Method
from ..ranges import Bits, Count, NotNegative, PartShare, Positive, Seed32
from ..ranks import Allocator
from ..schedules import Linear, Schedule
from .task import Task

RUN, REPORT, CHECKPOINTS = "run.json", "report.json", "checkpoints"
VERSION = 2  # 1: a validation part was made by chance alone, without regard to classes and equal inputs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Run(metaclass=Checked):
    """What is trained on what, how, and where the result goes.

    model: a folder, a name on the model hub, or `bundled:NAME`; data: a JSONL, CSV, TSV or Parquet file, a folder of
    such files named after splits, of images in SPLIT/CLASS/, or saved by `datasets`, a name on the hub (`NAME:CONFIG`),
    or `bundled:NAME`.
    method None trains the task's head alone.
    """

    model: str
    data: str
    task: Task
    method: Method | None
    out: Path
    where: str | tuple[str, ...] = "all-linear"  # see where.choose
    overrides: Mapping[str, Method] = field(default_factory=dict)  # other methods by pattern, see attach
    allocator: Allocator | None = None  # who gets how much rank, when
    full: tuple[str, ...] = ()  # parameters to train in full besides the task's head
    lr: Positive = 1e-3  # at the top of the schedule
    schedule: Schedule | None = None  # after a linear warm-up; None: the allocator's own (ReLoRA's), else linearly to 0
    head_lr: Positive | None = None  # of the task's head where other parameters train too; None: lr
    epochs: Positive = 3.0
    max_steps: Count | None = None  # optimiser steps; instead of epochs
    batch: Count = 16  # rows in a step and on a device
    accumulate: Count = 1  # batches in an optimiser step: as one batch of all their rows, a short last one by its rows
    warmup: PartShare = 0.05  # share of the steps
    weight_decay: NotNegative = 0.0  # of all that trains but biases and norms: all factors too
    max_grad_norm: NotNegative | None = 1.0  # gradients of a larger norm are scaled down to it; None or 0: never
    seed: Seed32 = 0  # of the factors, a new head, the order of rows, dropout, and the validation split
    train_rows: Count | None = None  # a random sample of so many rows; None: all
    eval_rows: Count | None = 1000  # rows for the metric before and after
    save_every: Count | None = None  # steps between checkpoints; None: ten in a run
    dtype: torch.dtype = torch.float32  # of the frozen model; what trains is float32
    bits: Bits | None = None  # 4 or 8: the frozen model is quantised when it is opened (bitsandbytes)
    by_chance: bool | None = None  # how a validation part is made, see `with_validation`: True for runs of version 1
    probe_batches: Count | None = None  # that a method which starts from data looks at; None: 8
    skip_faulty: PartShare | None = None  # the share of a file's rows that may be left out for faults; None: no row

    def __post_init__(self) -> None:
        for method in (self.method, *self.overrides.values()):
            if self.allocator is not None and (method is None or not self.allocator.serves(method)):
                raise ValueError(self.allocator.refusal(method))

    @staticmethod
    def as_meant(name: str, value: Any) -> Any:
        """A path for a text, a list for a tuple and the like, in the type of the field; see `given.Checked`.  Raises
        TypeError for what is no value of one."""
        kinds = {"task": (Task, "Classification()"), "method": (Method, "LoRA(r=8)")}
        if name in kinds and not isinstance(value, kinds[name][0]) and (value is not None or name == "task"):
            kind, such = kinds[name]
            raise TypeError(f"{name} is a {kind.__name__} such as {such}, found {value!r:.80}")
        if name in ("model", "data", "out"):
            if not isinstance(value, str | os.PathLike):
                raise TypeError(f"{name} is a text or a path, found {value!r:.80}")
            return Path(value) if name == "out" else os.fspath(value)
        if name == "full":
            return (value,) if isinstance(value, str) else tuple(value)
        if name == "where":
            return tuple(value) if isinstance(value, list) else value
        if name == "dtype":
            return dtype_called(value) if isinstance(value, str) else value
        return int(value) if isinstance(value, float) and name == "max_steps" and value == value // 1 else value

    def encode(self) -> dict[str, Any]:
        """This run as JSON values, without `out`; paths that exist here are made absolute."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "out"}
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
        for name in ("model", "data"):
            data[name] = str(Path(data[name]).resolve()) if Path(data[name]).exists() else data[name]
        method = None if self.method is None else self.method.encode()
        overrides = {pattern: m.encode() for pattern, m in self.overrides.items()}
        allocator = None if self.allocator is None else self.allocator.encode()
        dtype = str(self.dtype).removeprefix("torch.")
        own: dict[str, Any] = {"method": method, "allocator": allocator, "overrides": overrides}
        if data.pop("max_grad_norm") != Run.max_grad_norm:  # options that came later: runs without them are what
            own["max_grad_norm"] = self.max_grad_norm or 0.0  # they were
        if not data["skip_faulty"]:
            del data["skip_faulty"]
        del data["schedule"]
        if self.rates() != Linear():
            own["schedule"] = self.rates().encode()
        return data | {"task": self.task.encode(), "dtype": dtype} | own

    def rates(self) -> Schedule:
        """The schedule of the learning rate that applies."""
        brought = None if self.allocator is None else self.allocator.schedule()
        return self.schedule or brought or Linear()

    @staticmethod
    def decode(data: Mapping[str, Any], out: Path) -> Run:
        """The inverse of `encode`.  Raises LookupError or ValueError for what does not belong there."""
        known = {f.name: f for f in fields(Run) if f.name != "out"}
        unknown = sorted(set(data) - set(known))
        missing = sorted(n for n in ("model", "data", "task", "method") if n not in data)
        if unknown or missing:
            what = f"has no {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
            raise LookupError(f"a run {what}; its fields are: {', '.join(known)}")
        values = dict(data)
        values["task"] = Task.decode(data["task"])
        values["method"] = None if data["method"] is None else Method.decode(data["method"])
        if data.get("allocator") is not None:
            values["allocator"] = Allocator.decode(data["allocator"])
        if data.get("schedule") is not None:
            values["schedule"] = Schedule.decode(data["schedule"])
        values["overrides"] = {p: Method.decode(m) for p, m in data.get("overrides", {}).items()}
        values["dtype"] = dtype_called(data.get("dtype", "float32"))
        for name in ("where", "full"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        for name, value in values.items():
            default = known[name].default
            if name in ("model", "data") and not isinstance(value, str):
                raise ValueError(f"{name} is a text, found {value!r:.80}")
            if type(default) in (int, float) and type(value) not in (type(default), int):
                raise ValueError(f"{name} is a {type(default).__name__}, found {value!r:.80}")
        return Run(**values, out=out)

    def save(self, before: Mapping[str, float] | None, digest: Mapping[str, str] | None = None) -> None:
        """Writes OUT/run.json; `before` is the metric before training, `digest` tells rows and model from others."""
        self.out.mkdir(parents=True, exist_ok=True)
        given = {} if digest is None else {"digest": dict(digest)}
        write_json(self.out / RUN, {"version": VERSION, "run": self.encode(), "before": before, **given})

    @staticmethod
    def load(out: str | Path) -> Run:
        """The run whose directory `out` is.  Raises FileNotFoundError, LookupError or ValueError."""
        with files.door(str(Path(out) / RUN)):
            data = read_run(Path(out))
            old = {"by_chance": True} if data["version"] == 1 else {}
            return Run.decode(data["run"] | old, Path(out))


def read_run(out: Path) -> dict[str, Any]:
    """The content of OUT/run.json.  Raises FileNotFoundError, or ValueError for what is malformed."""
    path = out / RUN
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in out.iterdir())[:8]) if out.is_dir() else "no such directory"
        raise FileNotFoundError(f"{out} is not the directory of a run: {RUN} is missing; found: {there or 'nothing'}")
    data = files.parsed(path.read_bytes(), str(path))
    if data.get("version") not in (1, VERSION) or not isinstance(data.get("run"), dict):
        raise ValueError(f"{path} is not a run of version 1 or {VERSION}")
    return data


def write_json(path: Path, data: Any) -> None:
    """Writes JSON to `path`: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def dtype_called(name: str) -> torch.dtype:
    """The floating type of that name.  Raises LookupError that lists the known ones."""
    if name not in DTYPES:
        raise LookupError(f"no dtype is called {name!r}; there are: {', '.join(DTYPES)}")
    return DTYPES[name]
