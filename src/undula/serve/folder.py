"""Adapters by the folder that they lie in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ..io import diffusers, files
from .pool import Pool
from .version import check_name


@dataclass(frozen=True)
class Found:
    """What became of the directories of a folder."""

    registered: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # that were registered before, and are as they were
    left_out: dict[str, str] = field(default_factory=dict)  # {name: why}
    gone: list[str] = field(default_factory=list)  # that are registered from here, and no longer here


def register_folder(pool: Pool, folder: str | Path, *, pin: Collection[str] = (), replace: bool = False) -> Found:
    """Registers each directory in `folder` that holds an adapter, by its name; `pin` are those to keep in memory.

    Called again it registers what came since; with `replace`, what changed since too.  What is left out is told with
    the reason: what holds no adapter, what does not fit the model, what is a link out of the folder.  Raises
    NotADirectoryError where there is no folder, LookupError for names in `pin` that nothing came of.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"{folder} is no folder: it should hold a directory for each adapter")
    root = Path(folder).resolve()
    found, before = Found(), pool.paths()
    here = set(root.iterdir())
    for place in sorted(here):
        name = place.name
        try:
            check_place(place, root)
            if before.get(name) == place and pool.unchanged(name):
                if name in pin:
                    pool.pin(name)
                found.kept.append(name)
            elif not replace and before.get(name, place) != place:
                there = before[name].parent
                found.left_out[name] = f"an adapter of that name is served from {there} already: rename one of the two"
            else:
                pool.register(name, place, replace=replace, pin=name in pin)
                found.registered.append(name)
        except (OSError, ValueError, TypeError, LookupError) as error:
            found.left_out[name] = str(error)
    found.gone.extend(sorted(name for name, path in before.items() if path.parent == root and path not in here))
    lost = sorted(set(pin) - {*found.registered, *found.kept})
    if lost:
        why = "; ".join(f"{name}: {found.left_out.get(name, 'there is no such directory')}" for name in lost[:5])
        raise LookupError(f"adapters to keep in memory are not in {folder}, or cannot be served: {why}")
    return found


def check_place(place: Path, root: Path) -> None:
    """Raises ValueError for what is no directory in `root`, or leads out of it."""
    check_name(place.name)
    if not place.is_dir():
        raise ValueError(f"{place.name} is no directory")
    for path in (place, *(place / name for name in (files.CONFIG, files.TENSORS, diffusers.WEIGHTS))):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ValueError(f"{path.relative_to(root)} is a link that leads out of the folder: it is not followed")
