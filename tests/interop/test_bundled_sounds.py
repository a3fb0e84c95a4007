"""The bundled data sets of speech: what is chosen, who speaks, how it is kept; the real ones, where there are any."""

import io
import itertools
import platform
import wave
from collections import Counter

import numpy as np
import pytest
import soundfile

from undula import bundled
from undula.bundled import AssetError, espeak, prompts
from undula.bundled.parquets import read_parquet, write_parquet
from undula.bundled.rows import SPLITS, fingerprint
from undula.train import SpeechRecognition
from undula.train.data.audio import opened, seconds

quiet = str  # a progress function that shows nothing


def tone(path, length=0.5, hertz=8000, pitch=440.0):
    """A WAV file of one tone; its samples."""
    samples = (8000 * np.sin(2 * np.pi * pitch * np.arange(round(length * hertz)) / hertz)).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, hertz, subtype="PCM_16")
    return samples


def test_sounds_come_back_as_they_were_written_and_the_trainer_reads_them(tmp_path):
    texts = ["one two", "three", "four five six"]
    samples = [tone(tmp_path / f"{i}.wav", 0.2 + i / 10, pitch=300.0 * (i + 1)) for i in range(3)]
    rows = [{"audio": (tmp_path / f"{i}.wav").read_bytes(), "text": t, "voice": "me"} for i, t in enumerate(texts)]
    out = tmp_path / "out"
    out.mkdir()
    write_parquet(out, dict(zip(SPLITS, ([row] for row in rows), strict=True)), "here")
    data = read_parquet(out)
    _, parts = SpeechRecognition().read(data, *SPLITS)
    for name, text, wanted in zip(SPLITS, texts, samples, strict=True):
        assert data[name]["text"][:] == [text]
        assert data[name]["voice"][:] == ["me"]
        found = opened(parts[name]["audio"][0], 8000)
        np.testing.assert_allclose(found, wanted / 32768, atol=1e-7)
    (out / "test.parquet").write_bytes((out / "train.parquet").read_bytes())
    with pytest.raises(AssetError, match="rows have changed since they were written"):
        read_parquet(out)


# --- eSpeak NG reads synopses --------------------------------------------------------------------------------------

SAID_AS_WRITTEN = {
    "Simple library to parse text": True,
    "real-time, multi-user editor's plugin": True,
    "small C compiler for old machines": True,
    "GTK bindings for a library": False,  # letter by letter
    "library for 3D graphics files": False,  # digits
    "client/server for small files": False,  # "slash"?
    "reader of files (development files)": False,
    "too short": False,
    "one two three four five six seven eight nine ten eleven": False,
}


@pytest.mark.parametrize("text", SAID_AS_WRITTEN)
def test_sentences_are_those_that_are_said_as_they_are_written(text):
    found = espeak.sentences({"train": [text], "validation": [], "test": []})
    assert (found["train"] == [text]) is SAID_AS_WRITTEN[text]


def test_no_sentence_is_in_two_parts():
    """Two packages of different parts may say the same of themselves."""
    found = espeak.sentences({
        "train": ["the same words again here", "words of training alone"],
        "validation": ["The same words, again here", "words of validation alone"],
        "test": ["the same words again here", "the same words again here", "words of testing alone"],
    })  # fmt: skip
    assert found == {
        "train": ["words of training alone"],
        "validation": ["words of validation alone"],
        "test": ["the same words again here", "words of testing alone"],
    }


def test_no_voice_of_a_part_is_heard_in_another():
    """Neither its accent nor its variant."""
    for one, other in itertools.combinations(espeak.VOICES.values(), 2):
        for field in ("accent", "variant"):
            assert {getattr(v, field) for v in one}.isdisjoint(getattr(v, field) for v in other)
    assert list(espeak.VOICES) == list(SPLITS)
    assert all(100 < v.rate < 200 and 0 <= v.pitch < 100 for part in espeak.VOICES.values() for v in part)


def test_what_the_program_lacks_is_told(tmp_path):
    with pytest.raises(AssetError, match=r"(?s)eSpeak NG failed with code 1. It said: .*libespeak-ng\.so"):
        espeak.spoken({"train": ["a b c d"]}, tmp_path, tmp_path)


def test_another_machine_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("UNDULA_CACHE", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(AssetError, match=r"found \w+ on riscv64.\nWhat to do: fetch there and copy"):
        bundled.fetch("espeak-synopses", quiet)
    assert list(tmp_path.iterdir()) == []


# --- prompts of a telephone exchange -------------------------------------------------------------------------------


def test_prompts_are_those_whose_text_is_sure(tmp_path):
    said = """; a remark: of three words
good: Please enter the number.
deep/good:  It's the   wrong one; try again:
tone: [a simple beep tone]
digits: press 1 or 2 now
sign: press * to go on
short: Thank you.
dots: ... for ...
absent: there is no such sound
long: this one never ends
"""
    for line in said.splitlines()[1:]:
        if not line.startswith("absent"):
            tone(tmp_path / f"{line.partition(':')[0]}.wav", 31 if line.startswith("long") else 0.3)
    rows = prompts.prompts(said, tmp_path)
    assert [key for key, _ in rows] == ["Please enter the number.", "It's the wrong one; try again:"]
    with wave.open(io.BytesIO(rows[1][1]["audio"]), "rb") as sound:
        assert sound.getframerate() == 8000
    with pytest.raises(AssetError, match="no sound has a text in a list of 1 lines"):
        prompts.prompts("short: Thank you.", tmp_path)


# --- for real ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["espeak-synopses", "asterisk-prompts"])
def test_the_real_sets_where_they_were_fetched(name):
    if not bundled.ASSETS[name].folder.is_dir():
        pytest.skip(f"{name} was not fetched (python -m undula.bundled fetch {name}; needs apt)")
    data = bundled.dataset(name)
    texts = [fingerprint(t) for part in data.values() for t in part["text"]]
    assert len(set(texts)) == len(texts)
    for part, rows in data.items():
        assert rows.column_names == ["audio", "text", "voice"]
        assert all(0.3 < seconds(sound) < 30 for sound in rows["audio"][:20])
        if name == "espeak-synopses":
            assert len(rows) == espeak.COUNTS[part]
            assert set(Counter(rows["voice"])) == {voice.name for voice in espeak.VOICES[part]}
