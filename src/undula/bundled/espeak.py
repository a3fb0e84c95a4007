"""The data set espeak-synopses: synopses of Debian packages, read aloud by voices of eSpeak NG.

The program comes as the shared library in a Python wheel, whose hash is recorded; it runs in a process of its own (see
speak.py) and nothing is installed.  The sentences are those of debian-synopsis that are said as they are written (no
digits, no signs, no words of capitals), and keep its parts.  A voice is an
accent, a variant (its sex and timbre), a speed and a pitch: no accent and no variant of one part is in another, so
neither a sentence nor a voice of the test was heard before.
"""

import io
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.extras import needs
from . import speak
from .asset import Asset, AssetError, Progress
from .debian import synopses
from .parquets import write_parquet
from .rows import SPLITS, Row, fingerprint
from .wheels import download, unpack

SAID = re.compile(r"[A-Za-z][a-z]+(?:(?:, | |-)[A-Za-z][a-z]*(?:'[a-z]+)?)*")
WORDS = (4, 10)
COUNTS = {"train": 720, "validation": 96, "test": 192}


@dataclass(frozen=True)
class Voice:
    """One speaker: the names are eSpeak NG's."""

    accent: str
    variant: str
    rate: int  # words a minute
    pitch: int  # 0 to 99

    @property
    def name(self) -> str:
        return f"{self.accent}+{self.variant}"


VOICES: dict[str, tuple[Voice, ...]] = {
    "train": (
        Voice("en-us", "m1", 150, 45), Voice("en-us", "f1", 165, 55), Voice("en-us", "m3", 180, 35),
        Voice("en", "m2", 155, 50), Voice("en", "f2", 170, 60), Voice("en", "m4", 185, 40),
        Voice("en-gb-scotland", "m1", 160, 40), Voice("en-gb-scotland", "f1", 175, 50),
        Voice("en-gb-scotland", "m5", 150, 55), Voice("en-gb-x-rp", "m2", 165, 45),
        Voice("en-gb-x-rp", "f2", 180, 55), Voice("en-gb-x-rp", "m3", 155, 35),
    ),
    "validation": (Voice("en-gb-x-gbclan", "m6", 160, 45), Voice("en-gb-x-gbclan", "f3", 170, 55)),
    "test": (
        Voice("en-029", "m7", 160, 45), Voice("en-029", "f4", 170, 55), Voice("en-us-nyc", "m8", 155, 50),
        Voice("en-us-nyc", "f5", 175, 60), Voice("en-gb-x-gbcwmd", "m7", 165, 40),
        Voice("en-gb-x-gbcwmd", "f4", 160, 50),
    ),
}  # fmt: skip


@needs("speech")
def build_spoken(asset: Asset, out: Path, progress: Progress) -> None:
    """Debian's sentences and eSpeak NG's voices; the sounds are kept as FLAC files."""
    if (system := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        raise AssetError(
            f"{asset.name} is made by a program for Linux on x86-64, found {' on '.join(system)}.\n"
            "What to do: fetch there and copy the cache folder ($UNDULA_CACHE), or use recordings of your own."
        )
    texts, release = synopses(asset, progress)
    chosen = sentences({name: [row["summary"] for row in texts[name]] for name in SPLITS})
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(asset, Path(scratch), progress)
        unpack(wheel, "espeakng_loader/", Path(scratch) / "espeak")
        progress(f"{asset.name}: speaking {sum(map(len, chosen.values()))} sentences ...")
        rows = spoken(chosen, Path(scratch) / "espeak", Path(scratch))
    write_parquet(out, rows, f"{asset.source}, sentences of {release}")


def sentences(summaries: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Of each part the first sentences that are said as they are written; none is in two parts, the test first."""
    seen, found = set[str](), dict[str, list[str]]()
    for name in reversed(SPLITS):
        found[name] = []
        for text in summaries[name]:
            fits = WORDS[0] <= len(text.split()) <= WORDS[1] and SAID.fullmatch(text)
            if not fits or (key := fingerprint(text)) in seen or len(found[name]) == COUNTS[name]:
                continue
            seen.add(key)
            found[name].append(text)
    return {name: found[name] for name in SPLITS}


def spoken(chosen: Mapping[str, Sequence[str]], program: Path, scratch: Path) -> dict[str, list[Row]]:
    """The rows of each part: its voices take turns.  Raises AssetError where the program fails."""
    jobs, rows = [], dict[str, list[Row]]()
    for name, texts in chosen.items():
        rows[name] = []
        for i, text in enumerate(texts):
            voice = VOICES[name][i % len(VOICES[name])]
            file = str(scratch / f"{name}-{i}.wav")
            jobs.append({"voice": voice.name, "rate": voice.rate, "pitch": voice.pitch, "text": text, "file": file})
            rows[name].append({"audio": file, "text": text, "voice": voice.name})
    command = [sys.executable, "-I", speak.__file__, str(program)]
    given = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssetError(f"eSpeak NG failed with code {done.returncode}. It said: {done.stderr.strip()[-600:]}")
    return {name: list(_packed(each)) for name, each in rows.items()}


def _packed(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows with their WAV files as the bytes of FLAC files, which hold the same samples."""
    import soundfile

    for row in rows:
        samples, hertz = soundfile.read(row["audio"], dtype="int16")
        soundfile.write(buffer := io.BytesIO(), samples, hertz, format="FLAC", subtype="PCM_16")
        yield {**row, "audio": buffer.getvalue()}
