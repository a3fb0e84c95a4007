"""load(path): what a training, an export or a merge left, opened for use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch

from ..core.adapter import Adapter
from ..core.calls import called
from ..core.extras import needs
from ..io import files
from ..io.diffusers import WEIGHTS
from ..io.importing import partly
from ..io.places import ADAPTERS
from ..io.places import place as meant
from .base import config_of, lacking, open_model
from .foreign import roles_of, told_task, whole_task
from .restored import Restored, described, restored
from .run import Run
from .several import check_one_base, share

MODEL = "config.json"  # of a whole model
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@overload
def load(path: str | Path, model: str | None = None, *, device: str | torch.device | None = None) -> Restored: ...


@overload
def load(
    path: list[Any] | tuple[Any, ...], model: str | None = None, *, device: str | torch.device | None = None
) -> list[Restored]: ...


@called(
    "undula.load('DIRECTORY').predict(['a text'])",
    base="It is called model",
    base_model="It is called model",
    device_map="It is called device",
)
@needs("train")
def load(
    path: str | Path | list[Any] | tuple[Any, ...],
    model: str | None = None,
    *,
    device: str | torch.device | None = None,
) -> Restored | list[Restored]:
    """What `path` holds, opened for use: `.predict(texts)`, `.generate(prompt)`, `.labels`, `.model`, `.processor`,
    `.adapter` (see `undula.train.Restored`).

    path: a directory that `undula.train` wrote, a LoRA of PEFT's, a whole model (a merged one, any of transformers'
    that undula has a task for), or the name of one of these on the hub; a list of these that have one base, whose
    weights are then in memory once: a list comes back.  `model`: another base than the adapter says.
    device: where it computes; None: an accelerator where there is one.

    Raises FileNotFoundError for what is not there or holds no model, ValueError where the parts do not fit.
    """
    if isinstance(path, list | tuple):
        return _several(path, model, device)
    place = _place(path)
    opened = restored(place, model) if _is_adapter(place) else _whole(place, model)
    opened.model.eval()
    if not getattr(opened.model, "is_quantized", False):
        opened.model.to(device or _best())  # type: ignore[arg-type]
    return opened


def _several(paths: Sequence[str | Path], model: str | None, device: str | torch.device | None) -> list[Restored]:
    if not paths:
        raise ValueError("there is nothing to load: the list is empty")
    check_one_base([known(path, model)[0] for path in paths])
    every: list[Restored] = []
    for path in paths:
        opened = load(path, model, device=device)
        if every and not getattr(opened.model, "is_quantized", False):
            share(opened, every[0])
        every.append(opened)
    return every


@needs("train")
def known(path: str | Path, model: str | None = None) -> tuple[Run, tuple[str, ...]]:
    """(the run, the roles of its rows) of what `load` would open, its base unopened.  Raises as `load` does."""
    place = _place(path)
    if not _is_adapter(place):
        return _whole_run(place, model)
    adapter = partly(place)
    return described(place, adapter, model), roles_of(place, adapter)


def _is_adapter(place: Path) -> bool:
    """Whether a directory holds an adapter, not a whole model.  Raises FileNotFoundError where it holds neither."""
    if place.is_file() or (place / files.CONFIG).is_file() or (place / WEIGHTS).is_file():
        return True
    if not (place / MODEL).is_file():
        meant(place)  # a lone file of another form is told by name
        there = ", ".join(sorted(p.name for p in place.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{place} holds neither an adapter ({files.CONFIG}) nor a model ({MODEL}); it has: {there}"
        )
    return False


def _best() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _place(path: str | Path) -> Path:
    """The directory; one on the hub is fetched.  Raises FileNotFoundError."""
    if not isinstance(path, str | Path):
        raise TypeError(f"load takes the path of a directory, found {path!r:.80} ({type(path).__name__})")
    place = Path(path)
    if place.is_dir():
        return place
    if place.is_file() and place.suffix not in ADAPTERS:
        raise FileNotFoundError(f"{place} is a file: name the directory that holds it ({place.parent})")
    if place.is_file():
        return meant(place)
    siblings = [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
    close = difflib.get_close_matches(place.name, siblings, 1)
    hint = f" Did you mean '{place.parent / close[0]}'?" if close else ""
    if isinstance(path, Path) or not HUB.fullmatch(str(path)) or hint:
        raise FileNotFoundError(f"there is no directory {place}.{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:  # whatever the hub's client raises: offline, unknown, private ...
        why = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}"
        raise FileNotFoundError(
            f"there is no directory {place}, and the hub gave nothing of that name ({why})"
        ) from error


def _whole_run(place: Path, model: str | None) -> tuple[Run, tuple[str, ...]]:
    if model is not None:
        raise ValueError(f"{place} holds a whole model, which needs no base: leave out model={model!r}")
    config = config_of(str(place))
    task, roles = told_task(config.to_dict(), str(place)) or (whole_task(config, str(place)), ())
    return Run(model=str(place), data="", task=task, method=None, out=place), roles


def _whole(place: Path, model: str | None) -> Restored:
    run, roles = _whole_run(place, model)
    base, processor = open_model(str(place), run.task, run.dtype, run.seed)
    if missing := lacking(base):
        raise ValueError(
            f"the files of {place} lack {', '.join(missing[:5])}, {len(missing)} parameters in all: random numbers "
            "would answer. Where it is the base of an adapter, load the adapter's directory"
        )
    return Restored(run, base, processor, Adapter({}, {}, {}), roles)
