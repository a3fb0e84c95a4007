"""Images as values of a data set: what counts as one, reading it, telling two apart."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from .columns import spot
from .faults import Faults
from .media import IMAGES, named_files
from .source import source_of

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


def images(rows: Dataset, column: str, faults: Faults) -> Dataset:
    """The rows with `column` as encoded images, {bytes, path}, each read when it is asked for (see `opened`).

    Takes an `Image` feature, encoded images as bytes, {bytes, path}, or names of files (see `named_files`).  A column
    of anything else is a fault, and so are rows without an image or whose beginning is not that of one; where rows may
    be left out, also whose end is not.
    """
    from datasets import Image, Value

    feature = rows.features[column]
    encoded = isinstance(feature, dict) and {"bytes", "path"} >= set(feature) and "bytes" in feature
    binary = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
    named = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    if not (isinstance(feature, Image) or encoded or binary or named):
        found = f"it holds {feature.dtype}" if isinstance(feature, Value) else f"it is a {type(feature).__name__}"
        faults.add(
            spot(rows, column, f"holds no images ({found}, as in {source_of(rows).place(0)}: {rows[0][column]!r:.60})"),
            advice="An image is an `Image` of `datasets`, the bytes of a PNG or JPEG file, the name of one, or a file "
            "in a folder CLASS/",
        )
        return rows
    source = source_of(rows)
    lazy = named_files(rows, column, IMAGES, faults) if named else rows.cast_column(column, Image(decode=False))
    look = (
        _decoded if faults.skip else _header
    )  # who leaves rows out must see them all; else pixels are read once, later
    for number, value in enumerate(lazy[column]):
        if value is None and named:
            continue
        if value is None or not (value.get("bytes") or value.get("path")):
            place, advice = source.place(number), "Fill or remove these rows"
            faults.add(spot(rows, column, "is empty"), place, advice, source.key(number))
            continue
        try:
            look(value)
        except _damage() as error:
            place = f"{source.place(number)}: {_unreadable(value, error)}"
            faults.add(spot(rows, column, "holds damaged images"), place, row=source.key(number))
    return lazy


def _header(value: dict[str, Any]) -> None:
    """Reads as much as tells that there is an image: its size, not its pixels."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]):
        pass


def _decoded(value: dict[str, Any]) -> Image:
    from datasets import Image

    return Image(mode="RGB").decode_example(value)


def frames(value: dict[str, Any]) -> int:
    """How many images a file holds: an animation, the pages of a TIFF."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]) as image:
        return getattr(image, "n_frames", 1)


def _damage() -> tuple[type[Exception], ...]:
    """What Pillow raises for files that are damaged, or claim absurd sizes."""
    from PIL.Image import DecompressionBombError

    return OSError, SyntaxError, ValueError, DecompressionBombError


def opened(value: dict[str, Any]) -> Image:
    """The image in RGB, turned as its EXIF data say.  Raises ValueError for one that is damaged."""
    try:
        return _decoded(value)
    except _damage() as error:
        raise ValueError(_unreadable(value, error)) from None


def _unreadable(value: dict[str, Any], error: Exception) -> str:
    size = f"{len(value['bytes'])} bytes" if value.get("bytes") else "a file"
    name = value.get("path") or ""
    return f"{name or 'the image'} ({size}) cannot be read as an image ({error!s:.100}): repair or remove it"


def fingerprint(value: dict[str, Any]) -> str:
    """The same for images with the same pixels, however they are stored."""
    image = opened(value)
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
