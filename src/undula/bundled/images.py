"""The data set fashion-mnist, and how grey images become PNG files in a data set."""

import gzip
import hashlib
import io
import shutil
import tempfile
from pathlib import Path

from .apt import check_apt, download_package, unpack_package
from .asset import Asset, AssetError, Progress
from .parquets import write_parquet
from .rows import VALIDATION_PERCENT, Row

Pictures = list[tuple[str, bytes, int]]  # (hash of the pixels, the pixels row by row, label)

LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SIDE = 28


def build_fashion(asset: Asset, out: Path, progress: Progress) -> None:
    """The two parts of the package: the second one, whole, is the test; a tenth of the first the validation."""
    check_apt(asset, "read from a package", "use a data set of your own, or of the hub")
    with tempfile.TemporaryDirectory() as scratch:
        package = download_package(asset, Path(scratch), progress)
        unpack_package(package, Path(scratch) / "files")
        share = Path(scratch) / "files" / "usr" / "share"
        parts = [_pictures(share / "datasets" / "fashion-mnist", part) for part in ("train", "t10k")]
        shutil.copyfile(share / "doc" / "dataset-fashion-mnist" / "copyright", out / "LICENSE.txt")
    progress(f"{asset.name}: writing 70,000 images ...")
    write_images(out, shared_out(*parts), asset.source, LABELS, SIDE)


def _pictures(folder: Path, part: str) -> Pictures:
    """The images of one part in IDX form: a header of 16 bytes (8 for labels), then a byte a pixel (a label)."""
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    area = SIDE * SIDE
    if len(pixels) != area * len(labels):
        raise AssetError(f"{folder}: {len(labels)} labels, but {len(pixels)} pixels, which are not so many images")
    each = [pixels[i : i + area] for i in range(0, len(pixels), area)]
    return [(hashlib.sha256(image).hexdigest(), image, label) for image, label in zip(each, labels, strict=True)]


def shared_out(train: Pictures, test: Pictures) -> dict[str, Pictures]:
    """Train, validation and test: an image of the training part that is in the test too, or was there before, is left
    out.  Which part it goes to, and its place there, follow from its pixels alone, as for texts (see rows.py)."""
    splits: dict[str, Pictures] = {"train": [], "validation": [], "test": sorted(test)}
    seen = {key for key, _, _ in test}
    for picture in train:
        key = picture[0]
        if key not in seen:
            seen.add(key)
            splits["validation" if int(key[:8], 16) % 100 < VALIDATION_PERCENT else "train"].append(picture)
    return {name: sorted(pictures) for name, pictures in splits.items()}


def write_images(folder: Path, splits: dict[str, Pictures], origin: str, labels: list[str], side: int) -> None:
    """Write the splits of square grey images, and info.json, into the folder."""
    from PIL import Image

    rows: dict[str, list[Row]] = {name: [] for name in splits}
    for name, pictures in splits.items():
        for _, pixels, label in pictures:
            Image.frombytes("L", (side, side), pixels).save(buffer := io.BytesIO(), "PNG")
            rows[name].append({"image": buffer.getvalue(), "label": label})
    write_parquet(folder, rows, origin, labels)
