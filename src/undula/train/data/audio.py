"""Sounds as values of a data set: what counts as one, reading it, telling two apart."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.extras import needs
from .columns import spot
from .faults import Faults
from .media import AUDIO, encoded, named_files
from .source import described, source_of

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset

ORDERS: dict[bytes, Literal["little", "big"]] = {b"RIFF": "little", b"RIFX": "big", b"FORM": "big"}  # of the length
STREAMED = 0x7FFFFFFF  # who writes a stream does not know its length, and says the largest
Value = dict[str, Any]  # {bytes, path}: an encoded file as bytes, or where it is


@needs("speech")
def sounds(rows: Dataset, column: str, faults: Faults) -> Dataset:
    """That column of the rows as encoded sounds, {bytes, path}, each read when it is asked for (see `opened`).

    Takes an `Audio` feature of `datasets`, {bytes, path}, {array, sampling_rate}, encoded files as bytes, or names of
    files (see `media.named_files`).  A column of anything else is a fault, and so are rows without a sound, whose
    file is none, or that hold no sample; where rows may be left out, also those whose end is damaged.
    """
    from datasets import Value as Plain

    feature = rows.features[column]
    type_ = feature.dtype if isinstance(feature, Plain) else None
    if type_ in ("string", "large_string"):
        lazy, named = named_files(rows, column, AUDIO, faults), True
    elif (found := _stored(rows, column, type_, faults)) is not None:
        lazy, named = found, False
    else:
        seen = f"it holds {type_}" if type_ else f"it is a {type(feature).__name__}"
        faults.add(
            spot(rows, column, f"holds no sounds ({seen}, as in {source_of(rows).place(0)}: {rows[0][column]!r:.60})"),
            advice="A sound is the name of a file, its bytes, {array, sampling_rate}, an `Audio` of `datasets`, or a "
            "file in a folder CLASS/",
        )
        return rows
    source = source_of(rows)
    for number, value in enumerate(lazy[column]):
        if not (value and (value.get("bytes") or value.get("path"))):
            if not named:  # of names it is said already
                place, advice = source.place(number), "Fill or remove these rows"
                faults.add(spot(rows, column, "is empty"), place, advice, source.key(number))
            continue
        try:
            _length(value)
            if faults.skip:  # who leaves rows out must see them all; else samples are read once, later
                _decoded(value)
        except _damage() as error:
            place = f"{source.place(number)}: {_unreadable(value, error)}"
            faults.add(spot(rows, column, "holds damaged sounds"), place, row=source.key(number))
    return lazy


def _stored(rows: Dataset, column: str, type_: str | None, faults: Faults) -> Dataset | None:
    """Sounds that the rows hold themselves as {bytes, path}; None where the column is of another kind."""
    from datasets import Audio, Dataset, Features

    rows, features = rows.select_columns([column]), Features({column: encoded(AUDIO)})
    feature = rows.features[column]
    if rows.features == features:
        return rows
    if isinstance(feature, Audio):
        return rows.cast_column(column, Audio(decode=False)).cast(features)
    keys = set(feature) if isinstance(feature, dict) else set()
    source, values = source_of(rows), list[Value | None]()
    if {"array", "sampling_rate"} <= keys:
        for number, value in enumerate(rows[column]):
            try:
                values.append(None if value is None or value["array"] is None else _encode(value))
            except (ValueError, TypeError, RuntimeError) as error:
                values.append(None)
                place = f"{source.place(number)} ({error!s:.100})"
                faults.add(spot(rows, column, "holds what is no sound"), place, row=source.key(number))
    elif "bytes" in keys:
        values = [None if value is None else {"path": None} | value for value in rows[column]]
    elif type_ in ("binary", "large_binary"):
        values = [None if not value else {"bytes": value, "path": None} for value in rows[column]]
    else:
        return None
    return described(Dataset.from_dict({column: values}, features=features), source)


def _encode(value: Value) -> Value:
    """An array of samples as the bytes of a WAV file, which holds its numbers as they are."""
    import numpy
    import soundfile

    samples, rate = numpy.asarray(value["array"], dtype=numpy.float64), value["sampling_rate"]
    if not isinstance(rate, int) or rate < 1:
        raise ValueError(f"sampling_rate is {rate!r}, a whole number of samples in a second")
    if samples.ndim > 2 or not numpy.isfinite(samples).all():
        raise ValueError("array is (samples) or (samples, channels), of finite numbers")
    soundfile.write(buffer := io.BytesIO(), samples, rate, format="WAV", subtype="DOUBLE")
    return {"bytes": buffer.getvalue(), "path": None}


def _file(value: Value) -> Any:
    return io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]


def _length(value: Value) -> tuple[int, int]:
    """(samples, samples in a second), as the header says.  Raises ValueError for a sound without one, and for a file
    that is shorter than it says of itself."""
    import soundfile

    info = soundfile.info(_file(value))
    if info.frames < 1:
        raise ValueError("it holds no sample")
    head = value["bytes"][:8] if value.get("bytes") else _head(value["path"])
    there = len(value["bytes"]) if value.get("bytes") else Path(value["path"]).stat().st_size
    order = ORDERS.get(head[:4])
    promised = int.from_bytes(head[4:], order) + 8 if order else 0
    if there < promised < STREAMED:  # libsndfile takes what is there
        raise ValueError(f"it ends after {there} of {promised} bytes")
    return info.frames, info.samplerate


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def _decoded(value: Value) -> tuple[numpy.ndarray, int]:
    """(samples as float32, the mean of the channels; samples in a second).  Raises ValueError where the file ends
    before its header says so."""
    import soundfile

    promised, _ = _length(value)
    samples, rate = soundfile.read(_file(value), dtype="float32", always_2d=True)
    if len(samples) < promised:
        raise ValueError(f"it ends after {len(samples)} of {promised} samples")
    return samples.mean(1), rate


def _damage() -> tuple[type[Exception], ...]:
    """What soundfile raises for files that are damaged, or are none."""
    import soundfile

    return soundfile.SoundFileError, OSError, ValueError, TypeError


def seconds(value: Value) -> float:
    """How long a sound is, by its header.  Raises ValueError for one that is damaged."""
    try:
        length, rate = _length(value)
    except _damage() as error:
        raise ValueError(_unreadable(value, error)) from None
    return length / rate


@needs("speech")
def opened(value: Value, rate: int) -> numpy.ndarray:
    """The sound as (samples,) float32 at `rate` samples in a second, the mean of its channels; resampled by a polyphase
    filter (`scipy.signal.resample_poly`).  Raises ValueError for one that is damaged."""
    import numpy
    from scipy.signal import resample_poly

    try:
        samples, own = _decoded(value)
    except _damage() as error:
        raise ValueError(_unreadable(value, error)) from None
    if own != rate:
        common = math.gcd(own, rate)
        samples = resample_poly(samples, rate // common, own // common)
    return numpy.ascontiguousarray(samples, dtype=numpy.float32)


def _unreadable(value: Value, error: Exception) -> str:
    size = f"{len(value['bytes'])} bytes" if value.get("bytes") else "a file"
    name = value.get("path") or ""
    why = getattr(error, "error_string", str(error)).rstrip(".")
    return f"{name or 'the sound'} ({size}) cannot be read as audio ({why:.100}): repair or remove it"


def fingerprint(value: Value) -> str:
    """The same for sounds with the same samples, however they are stored."""
    try:
        samples, rate = _decoded(value)
    except _damage() as error:
        raise ValueError(_unreadable(value, error)) from None
    return hashlib.sha256(f"{rate} {len(samples)}".encode() + samples.tobytes()).hexdigest()
