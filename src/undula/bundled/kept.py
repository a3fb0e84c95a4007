"""The cache: is an asset there, and is it still what was fetched?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .asset import Asset, AssetError

MANIFEST = "SHA256SUMS"  # written when an asset is fetched; `sha256sum -c SHA256SUMS` reads it too
_known: dict[Path, tuple[Any, ...]] = {}  # folders that were compared in this process, and what their files looked like


def there(asset: Asset) -> bool:
    """Whether the asset's folder holds an asset: an empty one, or one that lacks its main files, is none."""
    folder = asset.folder
    if (folder / MANIFEST).is_file():
        return True
    return (folder / ("info.json" if asset.kind == "data" else "config.json")).is_file()  # of an earlier version


def record(folder: Path) -> None:
    """Writes down what the files of a finished asset are."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    lines = [f"{_sha256(path)}  {name}\n" for name, path in files.items() if name != MANIFEST]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def check(asset: Asset) -> None:
    """Compares the folder with what was written down when it was fetched, once in a process (again where a file has
    changed since).  One of an earlier version has nothing to be compared with: what it is now is written down.

    Raises AssetError for a file that is gone, cut or has other content.
    """
    folder = asset.folder
    if asset.kind == "data":  # compared at each reading, see rows.verified
        return
    if not (folder / MANIFEST).is_file():
        _structure(asset)
        try:
            record(folder)
        except OSError:  # another user's cache
            return
    looks = _looks(folder)
    if _known.get(folder) == looks:
        return
    lines = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = {name: sha256 for sha256, mark, name in (line.partition("  ") for line in lines) if mark}
    if not wanted or len(wanted) != len(lines):
        raise AssetError(_spoilt(asset, f"{MANIFEST} is damaged"))
    for name, sha256 in wanted.items():
        path = folder / name
        if not path.is_file():
            raise AssetError(_spoilt(asset, f"{name} is gone"))
        if _sha256(path) != sha256:
            raise AssetError(_spoilt(asset, f"{name} has changed since it was fetched, or is cut"))
    _known[folder] = looks


def _structure(asset: Asset) -> None:
    """What can be said of a folder without a record: a model's weights are as long as their header says."""
    from ..io.tensorfile import entries

    weights = sorted(asset.folder.glob("*.safetensors"))
    if asset.kind == "model" and not weights:
        raise AssetError(_spoilt(asset, "there are no weights (*.safetensors)"))
    for path in weights:
        try:
            with path.open("rb") as file:
                entries(file, str(path))
        except ValueError as error:
            raise AssetError(_spoilt(asset, str(error))) from None


def _spoilt(asset: Asset, how: str) -> str:
    return (
        f"{asset.folder}: {how}.\nWhat to do: delete that folder and fetch again (undula assets --fetch {asset.name})."
    )


def _looks(folder: Path) -> tuple[Any, ...]:
    """The names, sizes and times of the files: what changes when somebody writes into one."""
    found = ((p, p.stat()) for p in sorted(folder.rglob("*")) if p.is_file())
    return tuple((str(p), s.st_size, s.st_mtime_ns) for p, s in found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
