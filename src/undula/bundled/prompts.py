"""The data set asterisk-prompts: the English prompts of the telephone exchange Asterisk, spoken by Allison Smith, with
their texts.

The sounds (8 kHz, 16 bits) are those of Debian's package asterisk-core-sounds-en-wav, as they are; the texts are those
that the recordings were made from, core-sounds-en.txt in the package asterisk-core-sounds-en.  Kept is what is sure to
be said as it is written: no tones, silences and notes, no digits and signs (* may be "star" or "asterisk"), at least
three runs of letters, at most the 30 seconds that Whisper hears.  All have one voice: the parts differ in their texts.
"""

import gzip
import re
import shutil
import tempfile
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .apt import check_apt, download_package, unpack_package
from .asset import Asset, AssetError, Progress
from .parquets import write_parquet
from .rows import Row, split_rows

TEXTS = "asterisk-core-sounds-en=1.6.1-1"
TEXTS_SHA256, TEXTS_BYTES = "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50", 22_844
SAID = re.compile(r"[A-Za-z\s.,;:!?'-]+")  # of these signs none is spoken
WORDS, SECONDS = 3, 30.0


def build_prompts(asset: Asset, out: Path, progress: Progress) -> None:
    """Two packages: the sounds and their texts."""
    check_apt(asset, "read from packages", "use recordings of your own")
    texts = replace(asset, source=TEXTS, sha256=TEXTS_SHA256, bytes=TEXTS_BYTES)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for each in (asset, texts):
            own = scratch / each.source.partition("=")[0]
            own.mkdir()
            unpack_package(download_package(each, own, progress), scratch / "files")
        share = scratch / "files" / "usr" / "share"
        list_of = share / "doc" / "asterisk-core-sounds-en" / "core-sounds-en.txt.gz"
        said = gzip.decompress(list_of.read_bytes()).decode("utf-8")
        rows = prompts(said, share / "asterisk" / "sounds" / "en_US_f_Allison")
        write_parquet(out, split_rows(rows), f"{asset.source}, texts of {TEXTS}")
        shutil.copyfile(share / "doc" / "asterisk-core-sounds-en-wav" / "copyright", out / "LICENSE.txt")


def prompts(said: str, folder: Path) -> list[tuple[str, Row]]:
    """(text, row) of each prompt in the list `said` ("name: text" lines, ";" begins a remark) whose text is sure and
    whose sound is in the folder.  Raises AssetError where there is none."""
    rows = list(_prompts(said, folder))
    if not rows:
        raise AssetError(f"{folder}: no sound has a text in a list of {len(said.splitlines())} lines")
    return rows


def _prompts(said: str, folder: Path) -> Iterator[tuple[str, Row]]:
    for line in said.splitlines():
        name, _, text = line.partition(":")
        text, path = " ".join(text.split()), folder / f"{name.strip()}.wav"
        if (
            line.startswith(";")
            or not SAID.fullmatch(text)
            or len(re.findall(r"[A-Za-z]+", text)) < WORDS
            or not path.is_file()
        ):
            continue
        with wave.open(str(path), "rb") as sound:
            seconds = sound.getnframes() / sound.getframerate()
        if seconds <= SECONDS:
            yield text, {"audio": path.read_bytes(), "text": text, "voice": "Allison Smith"}
