"""Study files: TOML to a `Study`, every fault found at once, each with its line.

title = "..."                           baseline = "LoRA"      seeds = [1, 2, 3]      split_seed = 0
[train]     steps, and the other settings of a run (`train.recipe.Settings`) by their names; evaluations
[sweep]     rates (a list, or "auto"), seeds, factor, extend, halving
[[models]]  source, bits, dtype
[[data]]    source, task, set, label, train, validation, test (rows), splits, skip_faulty;
            epochs, batch (in the place of [train]'s)
[[budgets]] rank | parameters | parameters_of and rank
[[methods]] name, method (a method's name, "none": the head alone, "full": everything), set, rates,
            allocator (its name), allocate (its options); settings of [train] that are this method's own
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.method import Method
from ..core.options import build_from
from ..io import toml
from ..ranks import Procedure
from ..train.recipe import AUTO, dtype_called
from ..train.tasks.task import Task
from . import splits
from .plan import impossible
from .reader import NUMBER, Faults, Reader
from .settings import KEYS, SETTINGS, kinds, read_settings, shown
from .spec import (
    Arm,
    Base,
    Budget,
    Rows,
    Study,
    Sweep,
    Training,
    faults,
)

TOP = {"title": str, "baseline": str, "seeds": list, "split_seed": int}
TABLES: dict[str, dict[str, Any]] = {
    "train": {**kinds(Training), "evaluations": int},
    "sweep": {"rates": (list, str), "seeds": list, "factor": NUMBER, "extend": int, "halving": int},
    "models": {"source": str, "bits": int, "dtype": str},
    "data": {"source": str, "task": str, "set": dict, "label": str, "train": int, "validation": int, "test": int,
             "splits": dict, "epochs": NUMBER, "batch": int, "skip_faulty": NUMBER},
    "budgets": {"rank": int, "parameters": int, "parameters_of": str},
    "methods": {"name": str, "method": str, "set": dict, "rates": (list, str), "allocator": str, "allocate": dict,
                **kinds(Training)},
}  # fmt: skip
MANY = ("models", "data", "budgets", "methods")
NEEDED = {"models": ("source",), "data": ("source", "task"), "methods": ("method",)}
YARDSTICKS = {"none": False, "full": True}


def read(path: str | Path, replace: Mapping[str, str] | None = None) -> Study:
    """The study in a TOML file.  Models and data are opened to see that they are there and fit; `replace` puts other
    sources in the place of those in the file ({"roberta-base": "./tiny"}).

    Raises Faults (a ValueError), which lists every fault with its line, or FileNotFoundError.
    """
    return parse(text_of(path), str(path), replace)


def text_of(path: str | Path) -> str:
    """The text of a study file.  Raises Faults where it is none, FileNotFoundError with what is there instead."""
    path = Path(path)
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} does not exist; study files there: {', '.join(there) or 'none'}")
    return toml.text_of(path)


def parse(text: str, name: str = "the study", replace: Mapping[str, str] | None = None, check: bool = True) -> Study:
    """The study in a text, see `read`; without `check` neither models nor data are opened."""
    data = toml.parsed(text, name)
    reader = Reader(text)
    top = reader.table((), data, TOP | {t: list if t in MANY else dict for t in TABLES})
    study = _study(reader, top, replace or {})
    if not reader.found and check:
        _opened(reader, study)
    if not reader.found and check:
        for i, fault in reader.attempt(("budgets",), lambda: list(impossible(study, reader.sources))) or ():
            reader.fault(("budgets", i), fault)
    if reader.found:
        raise Faults(name, reader.found)
    return study


def _study(reader: Reader, top: dict[str, Any], replace: Mapping[str, str]) -> Study:
    many = {name: list(_rows(reader, name, top.get(name, []))) for name in MANY}
    arms = [(i, a) for i, t in many["methods"] if (a := _arm(reader, i, t)) is not None]
    models = [(i, m) for i, t in many["models"] if (m := _base(reader, i, t, replace)) is not None]
    data = [(i, d) for i, t in many["data"] if (d := _data(reader, i, t, replace)) is not None]
    budgets = [(i, b) for i, t in many["budgets"] if (b := _budget(reader, i, t)) is not None]
    rest: dict[str, Any] = {k: top[k] for k in ("title", "split_seed", "baseline") if k in top}
    if "seeds" in top:
        rest["seeds"] = reader.numbers(("seeds",), top["seeds"], int)
    rest = reader.within((), Study, rest)
    train = _train(reader, top.get("train", {}))
    for i, table in many["data"]:
        if "epochs" in table and train.max_steps is not None:
            reader.fault(
                ("data", i, "epochs"), f"[train] steps = {train.max_steps} decides how long a run is, not epochs"
            )
    study = Study(
        rest.pop("title", "A study of adapters"), tuple(a for _, a in arms), tuple(m for _, m in models),
        tuple(d for _, d in data), tuple(b for _, b in budgets) or (Budget(),),
        sweep=_sweep(reader, top.get("sweep", {})), train=train, **rest,
    )  # fmt: skip
    pairs: dict[Any, Sequence[tuple[int, Any]]] = {"methods": arms, "models": models, "data": data, "budgets": budgets}
    for (part, *inside), text in faults(study):
        if part in MANY and inside:  # counted among those that could be read
            inside[0] = pairs[part][int(inside[0])][0]
        told = (part, *inside) in reader.places or (not inside and part in MANY and top.get(part))
        if not told:  # what is there and could not be read has its own fault
            reader.fault((part, *inside), text)
    return study


def _rows(reader: Reader, name: str, tables: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, table in enumerate(tables):
        known = reader.table((name, i), table, TABLES[name], NEEDED.get(name, ()))
        if all(key in known for key in NEEDED.get(name, ())):
            yield i, known


def _arm(reader: Reader, i: int, t: dict[str, Any]) -> Arm | None:
    rates = _rates(reader, ("methods", i, "rates"), t["rates"]) if "rates" in t else ()
    own, name = read_settings(reader, ("methods", i), t), t["method"]
    if name in YARDSTICKS:
        if t.get("set"):
            reader.fault(("methods", i, "set"), f"method = {name!r} has no options")
        if "allocator" in t or t.get("allocate"):
            key = "allocator" if "allocator" in t else "allocate"
            reader.fault(("methods", i, key), f"method = {name!r} has no ranks to allocate")
        for key in (key for key in own if SETTINGS[key].metadata["layers"] or (key == "full" and YARDSTICKS[name])):
            reader.fault(("methods", i, key), f"method = {name!r} adapts no layers: {key} would do nothing")
        called = t.get("name", "full fine-tuning" if YARDSTICKS[name] else "head only")
        return Arm(called, None, YARDSTICKS[name], rates, own=own)
    place = ("methods", i, "set" if t.get("set") else "method")
    method = reader.attempt(place, lambda: build_from(Method, name, t.get("set", {})))
    allocator = _allocator(reader, i, t, method)
    if method is None or (allocator is None and "allocator" in t):
        return None
    called = " + ".join(type(part).public().__name__ for part in (method, allocator) if part is not None)
    called = " ".join([called, *(f"{KEYS.get(name, name)}={shown(value)}" for name, value in own.items())])
    return Arm(t.get("name", called), method, False, rates, allocator, own)


def _rates(reader: Reader, place: toml.Path, found: Any) -> tuple[float, ...] | None:
    """A grid; None: to be found."""
    return None if found == AUTO else reader.numbers(place, found, NUMBER)


def _allocator(reader: Reader, i: int, t: dict[str, Any], method: Method | None) -> Procedure | None:
    place = ("methods", i, "allocate" if t.get("allocate") else "allocator")
    if "allocator" not in t:
        if t.get("allocate"):
            reader.fault(place, "allocate has the options of an allocator: name one (allocator = ...)")
        return None
    made = reader.attempt(place, lambda: build_from(Procedure, t["allocator"], t.get("allocate", {})))
    if made is not None and method is not None and not made.serves(method):
        reader.fault(place, made.refusal(method))
        return None
    return made


def _base(reader: Reader, i: int, t: dict[str, Any], replace: Mapping[str, str]) -> Base | None:
    if len(reader.within(("models", i), Base, t)) < len(t):
        return None
    if "dtype" in t:
        found = reader.attempt(("models", i, "dtype"), lambda: dtype_called(t["dtype"]))
        if found is None:
            return None
        t = {**t, "dtype": str(found).removeprefix("torch.")}  # "auto" is what it is here
    return Base(**{**t, "source": replace.get(t["source"], t["source"])})


def _data(reader: Reader, i: int, t: dict[str, Any], replace: Mapping[str, str]) -> Rows | None:
    place = ("data", i, "set" if t.get("set") else "task")
    task = reader.attempt(place, lambda: build_from(Task, t["task"], t.pop("set", {})))
    counts = {k: v for k, v in t.items() if k != "task"}
    kept = reader.within(("data", i), Rows, counts)
    wrong = [k for k in counts if k not in kept]
    if (fault := _renamed(t.get("splits", {}))) is not None:
        reader.fault(("data", i, "splits"), fault)
        wrong.append("splits")
    if task is None or wrong:
        return None
    return Rows(
        **{**t, "task": task, "label": t.get("label", t["source"]), "source": replace.get(t["source"], t["source"])}
    )


def _renamed(names: dict[str, Any]) -> str | None:
    """What is wrong with other names of the splits."""
    if any(part not in splits.PARTS or not isinstance(name, str) for part, name in names.items()):
        return f"splits gives names to {', '.join(splits.PARTS)}, found {names!r:.80}"
    train, *measured = (names.get(part, part) for part in splits.PARTS)
    if train in measured:
        return f"rows of {train!r} would be learned from and measured on"
    return None


def _budget(reader: Reader, i: int, t: dict[str, Any]) -> Budget | None:
    place = ("budgets", i)
    if "parameters" in t and len(t) > 1 or not t:
        reader.fault(place, "a budget is `rank`, or `parameters`, or `parameters_of` (with a `rank`)")
    elif len(reader.within(place, Budget, t)) == len(t):
        return Budget(**t)
    return None


def _sweep(reader: Reader, data: dict[str, Any]) -> Sweep:
    t = reader.table(("sweep",), data, TABLES["sweep"])
    if "rates" in t:
        t["rates"] = _rates(reader, ("sweep", "rates"), t["rates"])
    if "seeds" in t:
        t["seeds"] = reader.numbers(("sweep", "seeds"), t["seeds"], int)
    return Sweep(**reader.within(("sweep",), Sweep, t))


def _train(reader: Reader, data: dict[str, Any]) -> Training:
    t = reader.table(("train",), data, TABLES["train"])
    rest = {"evaluations": t.pop("evaluations")} if "evaluations" in t else {}
    if "steps" in t and "epochs" in t:
        reader.fault(("train", "epochs"), f"steps = {t['steps']} decides how long a run is, not epochs")
    return Training(**read_settings(reader, ("train",), t), **reader.within(("train",), Training, rest))


def _opened(reader: Reader, study: Study) -> None:
    """Opens every data set and looks for every model."""
    for i, rows in enumerate(study.data):
        reader.attempt(("data", i, "source"), partial(reader.sources.opened, rows, study.split_seed))
    for i, base in enumerate(study.models):
        reader.attempt(("models", i, "source"), partial(_config, base.source))


def _config(source: str) -> Any:
    from transformers import AutoConfig

    from ..train.base import model_folder

    try:
        return AutoConfig.from_pretrained(model_folder(source))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise FileNotFoundError(f"no model could be opened at {source!r} ({reason})") from None
