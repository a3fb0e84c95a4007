"""One adapter of an index: what was read of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..io import diffusers, tensorfile
from ..io.places import pipeline_file
from ..io.places import place as meant
from ..io.sites import Opened
from .describing import described
from .places import Mark, Place
from .sketching import sketch


@dataclass(frozen=True)
class Entry:
    """`wrong` says why an adapter could not be read: it is in no result.  `silent` says why it has no encoding of its
    weights: it is found by its text alone.  `mark` is what its files were; None where they had just been written,
    or the system did not let them be read."""

    name: str
    mark: Mark | None
    text: str = ""
    by: str = ""  # where the text is from: description, card, config, name
    base: str = ""
    method: str = ""
    layers: int = 0
    parameters: int = 0
    wrong: str = ""
    silent: str = ""

    def encode(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def decode(cls, found: Any) -> Self:
        """Raises ValueError for what `encode` did not make."""
        kinds = {f.name: {"int": int, "str": str}.get(str(f.type), list) for f in fields(cls)}
        if not isinstance(found, dict) or found.keys() != kinds.keys():
            raise ValueError(f"an entry of an index has {', '.join(kinds)}; found {found!r:.100}")
        for name, kind in kinds.items():
            if type(found[name]) is not kind and not (name == "mark" and found[name] is None):
                raise ValueError(f"{name} of an entry is no {kind.__name__}: {found[name]!r:.100}")
        return cls(**found)


def read(place: Place) -> tuple[Entry, Tensor | None]:
    """(what an adapter is, its sketch, float32, or None).  What is wrong with it is said in the entry, never raised."""
    try:
        with _opened(place.path) as (adapter, config):
            about = adapter.outline if isinstance(adapter, Opened) else adapter
            text, by = described(place.path, config, about.about)
            z, silent = _sketch(adapter)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        told = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        mark = None if isinstance(error, OSError) else place.mark  # permissions, say, are not in it: tried again
        return Entry(place.name, mark, wrong=" ".join(told.split()) or type(error).__name__), None
    kinds = ", ".join(dict.fromkeys(type(m).public().__name__ for m in about.methods.values()))
    base, size = config.get("base_model_name_or_path"), about.num_parameters()
    said = base if isinstance(base, str) else ""
    return Entry(place.name, place.mark, text, by, said, kinds, len(about.methods), size, silent=silent), z


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Adapter | Opened, Mapping[str, Any]]]:
    """(an adapter, its configuration): a directory layer by layer, a pipeline's file as a whole."""
    file = pipeline_file(meant(path))
    if file is None:
        with Opened(path) as opened:
            yield opened, opened.head.config
    else:
        yield _pipeline(file), {}


def _pipeline(file: Path) -> Adapter:
    """All parts of a pipeline's file as one adapter; layers are called PART.<layer>, as in the file."""
    with open(file, "rb") as opened:
        entries, _ = tensorfile.entries(opened, str(file))
    parts = sorted({key.partition(".")[0] for key in entries})
    found = {part: diffusers.load_diffusers(file, part) for part in parts}

    def named(what: str) -> dict[str, Any]:
        return {f"{part}.{site}": value for part, a in found.items() for site, value in getattr(a, what).items()}

    return Adapter(named("methods"), named("factors"), named("shapes"), kernels=named("kernels"))


def _sketch(adapter: Adapter | Opened) -> tuple[Tensor | None, str]:
    """(the sketch, why there is none)."""
    if not adapter.methods:
        return None, "it adapts no layer"
    try:
        return sketch(adapter).z.to(torch.float32), ""
    except TypeError as error:  # no update
        return None, str(error)
    except ValueError as error:
        if "zero at every layer" in str(error):
            return None, str(error)
        raise
