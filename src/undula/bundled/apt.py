"""Debian's and Ubuntu's archive as a source of data.  Everything happens in a private folder: the system's apt is only
asked for its list of sources, so it does not matter how it is set up or whether it is up to date."""

import shutil
import subprocess
from pathlib import Path

from .asset import Asset, AssetError, Progress
from .wheels import check_hash

APT_HELPER = "/usr/lib/apt/apt-helper"


def check_apt(asset: Asset, what: str, instead: str) -> None:
    """Raises AssetError where there is no apt: `what` is read from the archive, `instead` is what else can be done."""
    if not shutil.which("apt-get") or not Path(APT_HELPER).exists():
        raise AssetError(
            f"{asset.name} is {what} of Debian or Ubuntu, but there is no apt here.\n"
            f"What to do: {instead}; or fetch on Debian or Ubuntu and copy the cache folder ($UNDULA_CACHE)."
        )


def updated(scratch: Path, languages: str) -> tuple[list[str], str]:
    """(options that keep apt within `scratch`, what it complained of) after it has downloaded its indices there."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    options = ["-o", f"Acquire::Languages={languages}", "-o", f"Dir::State::lists={scratch}/lists"]
    options += ["-o", f"Dir::Cache={scratch}/cache"]
    update = subprocess.run(["apt-get", *options, "update", "-qq"], capture_output=True, text=True, check=False)
    return options, update.stderr


def download_package(asset: Asset, into: Path, progress: Progress) -> Path:
    """Downloads the package `asset.source` ("name=version") into the folder `into`; checks its hash; returns its path.

    Raises AssetError where apt cannot, or hands out another file.
    """
    progress(f"{asset.name}: downloading the package {asset.source} ({asset.bytes / 1e6:.0f} MB) ...")
    options, said = updated(into / "apt", "none")
    command = ["apt-get", *options, "download", asset.source]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=into)
    found = sorted(into.glob("*.deb"))
    if done.returncode or len(found) != 1:
        raise AssetError(
            f"{asset.name}: asked apt for the package {asset.source}, but it failed with code {done.returncode}. "
            f"It said: {(done.stderr or said).strip()[-600:] or 'nothing'}\n"
            "What to do: check that `apt-get update` works and that the main component of Debian 12 is among apt's "
            "sources; or fetch there and copy the cache folder ($UNDULA_CACHE)."
        )
    check_hash(asset, found[0])
    return found[0]


def unpack_package(package: Path, into: Path) -> None:
    """Unpacks the files of a package, whose hash was checked, into a folder; none of its scripts is run."""
    subprocess.run(["dpkg-deb", "--extract", str(package), str(into)], capture_output=True, check=True)
