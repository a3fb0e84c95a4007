"""From what a person names (a base, directories of adapters) to what is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...compress.int8 import int8
from ...io.files import CONFIG
from ...io.places import place
from ...train.base import asset_of, called_elsewhere, config_of, open_model
from ...train.data.load import BUNDLED
from ...train.foreign import base_of
from ...train.run import RUN, Run
from ...train.tasks.causal_lm import CausalLM
from ..engine import Engine, Limits
from ..folder import register_folder
from ..policy import Fcfs, Policy
from ..pool import Pool
from .bounds import Bounds
from .keys import Keys
from .places import Places
from .served import Served


@dataclass(frozen=True)
class Meant:
    """A base, and the one adapter that was named in its place."""

    base: str
    adapter: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What is served, and how.

    base: as `undula train` takes it.  places: where adapters lie.  single: one adapter to serve beside them.  pinned:
    names of those that stay on the model.  memory: bytes that adapters may take there.  called: what clients call the
    base; None: its own name.  also: other names by which adapters may say that they are for it.  int8: the base
    computes in eight bits.
    """

    base: str
    places: Places = field(default_factory=lambda: Places(()))
    single: Path | None = None
    pinned: tuple[str, ...] = ()
    memory: int = 2_000_000_000
    called: str | None = None
    also: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    policy: Policy = field(default_factory=Fcfs)
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)
    keys: Keys = field(default_factory=Keys)
    hosts: frozenset[str] | None = None
    int8: bool = False


def meant(source: str, model: str | None = None) -> Meant:
    """What BASE means: a model, or a directory of one adapter, whose base it says (or `model` names).  Raises
    ValueError for a directory of adapters, which says no base."""
    path = place(source)
    if source.startswith(BUNDLED) or not path.is_dir() or (path / "config.json").is_file():
        if model is not None:
            raise ValueError(f"{source} is no directory of an adapter, and --model names the base of one: leave it out")
        return Meant(source)
    if (path / CONFIG).is_file():
        return Meant(model or said_base(path), path)
    inner = sorted(p.name for p in path.iterdir() if (p / CONFIG).is_file())
    if inner:
        raise ValueError(
            f"{source} holds adapters ({', '.join(inner[:5])}{' ...' if len(inner) > 5 else ''}), and a base comes "
            f"first: undula serve {_suggested(path / inner[0])} --adapters {source}"
        )
    return Meant(source)  # opening it says what is wrong


def said_base(path: Path) -> str:
    """The base that an adapter's directory says.  Raises ValueError where it says none."""
    from ...io.outline import head

    if (path / RUN).is_file():
        return Run.load(path).model
    return base_of(path, head(path).config, None)


def _suggested(path: Path) -> str:
    try:
        return said_base(path)
    except (ValueError, OSError):
        return "BASE"


def names_of(base: str, called: str | None) -> tuple[str, ...]:
    """What clients call a base, the shown name first: a folder by its last name, for a path is nobody's business."""
    asset = asset_of(base)
    if asset is not None:
        own = [base.removeprefix(BUNDLED), base, called_elsewhere(base)]
    else:
        own = [Path(base).resolve().name if Path(base).is_dir() else base]
    return tuple(dict.fromkeys([*([] if called is None else [called]), *own]))


def opened(plan: Plan, note: Callable[[str], None]) -> tuple[Served, int]:
    """(what is served, how many adapters are registered); `note` is told which were left out, and why.  Raises
    FileNotFoundError for a base that cannot be opened, ValueError for one that is not served and for an adapter that
    was named and cannot be."""
    config = config_of(plan.base)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{plan.base} is an encoder and a decoder in one: language models and encoders are served")
    make = _writing if CausalLM.of_model(config) is not None else _reading
    made, shelf = make(plan)
    served = Served(
        names_of(plan.base, plan.called), shelf, places=plan.places, keys=plan.keys, bounds=plan.bounds,
        hosts=plan.hosts, **made,
    )  # fmt: skip
    return served, _registered(served, plan, note)


def _bases(plan: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys((plan.base, *plan.also)))


def _writing(plan: Plan) -> tuple[dict[str, Any], Pool]:
    model, tokenizer = open_model(plan.base, CausalLM(), plan.dtype, 0)
    if plan.int8:
        int8(model)
    pool = Pool(model, plan.memory, bases=_bases(plan))
    return {"engine": Engine(model, tokenizer, pool, plan.policy, plan.limits)}, pool


def _reading(plan: Plan) -> tuple[dict[str, Any], Pool]:
    from ..encoder import Encoder
    from ..heads import Body

    body = Body(plan.base, plan.dtype)
    if plan.int8:
        int8(body.model)
    pool = Pool(body.model, plan.memory, bases=_bases(plan), heads=body)
    return {"encoder": Encoder(body, pool)}, pool


def _registered(served: Served, plan: Plan, note: Callable[[str], None]) -> int:
    """Registers everything that lies there; returns how many are.  Raises LookupError for what was to be pinned and is
    not there or cannot be served."""
    pool, left = served.shelf, dict[str, str]()
    if plan.single is not None:
        pool.register(plan.single.resolve().name, plan.single, pin=True)
    for root in plan.places.roots:
        own = [name for name in plan.pinned if (root / name).is_dir()]
        found = register_folder(pool, root, pin=own)
        left |= {str(root / name): why for name, why in found.left_out.items() if (root / name).is_dir()}
    for name in set(served.names) & set(pool.names()):
        pool.unregister(name)
        left[name] = "it is called as the base is, and could not be asked for"
    if missing := sorted(set(plan.pinned) - set(pool.names())):
        raise LookupError(f"--pin names {', '.join(missing)}, and no adapter there is called so")
    for path, why in list(left.items())[:20]:
        note(f"left out: {path}: {why.removeprefix(path).lstrip(': ')}")
    if len(left) > 20:
        note(f"left out: {len(left) - 20} more")
    return len(pool.names())
