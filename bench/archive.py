"""Packs the folder of a study into one archive that can be made again, and says what is in it.

    python bench/archive.py runs/three --to three.tar.xz --list bench/results/studies/three/archive.json
    python bench/archive.py three.tar.xz --check bench/results/studies/three/archive.json

Equal files give an equal tar: sorted names, no owners, no times.  Another liblzma may compress it differently, so the
list has the hash of the tar too, which decides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

LEFT_OUT = ("archive.json", "-journal", "-wal", "-shm")  # the list itself, and what SQLite has beside an open store


def files(folder: Path) -> dict[str, bytes]:
    """{path below the folder: contents} of what belongs into its archive, sorted."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(LEFT_OUT))
    if not found:
        raise FileNotFoundError(f"there are no files in {folder}")
    if open_store := [p.name for p in folder.rglob("*-wal") if p.stat().st_size]:
        raise ValueError(f"{folder} is in use ({', '.join(open_store)}): archive it when its study has ended")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def tar(name: str, contents: dict[str, bytes]) -> bytes:
    """A tar of NAME/path for each of them."""
    made = BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path, content in contents.items():
            entry = tarfile.TarInfo(f"{name}/{path}")  # mode 0644, owner 0, time 0
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    return made.getvalue()


def listed(name: str, contents: dict[str, bytes]) -> tuple[dict[str, Any], bytes]:
    """The list of an archive, and the archive."""
    plain = tar(name, contents)
    packed = lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)
    return {
        "study": name,
        "archive": f"{name}.tar.xz",
        "bytes": len(packed),
        "sha256": digest(packed),
        "tar_sha256": digest(plain),
        "files": {path: {"bytes": len(c), "sha256": digest(c)} for path, c in contents.items()},
    }, packed


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check(archive: Path, told: dict[str, Any]) -> list[str]:
    """What differs between an archive and its list: nothing, if it is the one."""
    plain = lzma.decompress(archive.read_bytes())
    if digest(plain) == told["tar_sha256"]:
        return []
    with tarfile.open(fileobj=BytesIO(plain)) as opened:
        found = {
            m.name.partition("/")[2]: digest(opened.extractfile(m).read())  # type: ignore[union-attr]
            for m in opened.getmembers()
            if m.isfile()
        }
    wanted = {path: of["sha256"] for path, of in told["files"].items()}
    differ = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
    return differ or ["its order, owners or times"]


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of a study; with --check an archive")
    parser.add_argument("--name", help="of the study (default: the folder's)")
    parser.add_argument("--to", type=Path, help="the archive to write, NAME.tar.xz")
    parser.add_argument("--list", type=Path, help="the list to write, archive.json")
    parser.add_argument("--check", type=Path, help="a list: say whether SOURCE is the archive it tells of")
    args = parser.parse_args()
    if args.check:
        differ = check(args.source, json.loads(args.check.read_text(encoding="utf-8")))
        sys.exit(f"{args.source} is not the archive of {args.check}: {', '.join(differ)}" if differ else 0)
    told, packed = listed(args.name or args.source.resolve().name, files(args.source))
    if args.to:
        write(args.to, packed)
    if args.list:
        write(args.list, (json.dumps(told, indent=1) + "\n").encode())
    print(f"{told['sha256']}  {told['archive']} ({len(packed):,} bytes, {len(told['files'])} files)")


if __name__ == "__main__":
    main()
