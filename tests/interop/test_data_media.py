"""Folders and tables of images and sounds: what counts as a class, a split or a row, and what is said of the rest."""

import io
import json

import datasets
import numpy
import pytest
import soundfile

from tests.support import tiny
from undula.train import ImageClassification
from undula.train.data.audio import fingerprint, opened, seconds, sounds
from undula.train.data.faults import Faults
from undula.train.data.load import load_data
from undula.train.data.source import source_of
from undula.train.data.splitting import inputs
from undula.train.measure import rows_digest

RATE = 8000


def tone(pitch=440, samples=4000):
    return 0.5 * numpy.sin(2 * numpy.pi * pitch * numpy.arange(samples) / RATE)


def wav(path, sound=None, rate=RATE, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone() if sound is None else sound, rate, **how)
    return path


def picture(path, row=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((row or tiny.pictures(1)[0])["image"])
    return path


MAKERS = {"image": (picture, ".png"), "audio": (wav, ".wav")}


@pytest.fixture(params=sorted(MAKERS))
def made(request):
    """(column, a function that makes a file of that medium at a path without suffix)."""
    maker, suffix = MAKERS[request.param]
    return request.param, lambda path: maker(path.with_name(path.name + suffix))


# --- folders -------------------------------------------------------------------------------------------------------


def test_classes_without_splits_are_one_split(made, tmp_path):
    column, file = made
    for name in ("dog", "cat"):
        for i in range(2):
            file(tmp_path / name / "deeper" / str(i))
    data = load_data(str(tmp_path))
    assert list(data) == ["train"]
    assert data["train"].features["label"].names == ["cat", "dog"]
    assert data["train"]["label"][:] == [0, 0, 1, 1]
    assert data["train"][0][column]["path"].startswith(str(tmp_path / "cat"))


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "Test"])
def test_classes_below_splits_are_splits(made, name, tmp_path):
    _column, file = made
    for split in ("train", name):
        for kind in ("a", "b"):
            file(tmp_path / split / kind / "0")
    file(tmp_path / "old" / "a" / "0")
    data = load_data(str(tmp_path))
    assert set(data) == {"train", "test" if name == "Test" else "validation"}
    assert {len(rows) for rows in data.values()} == {2}
    assert "beside it, and not read: old" in str(data["train"]._undula_source.notes)


def test_a_class_called_as_a_split_is_a_class(made, tmp_path):
    """Vehicles: cars, planes, trains."""
    _, file = made
    for name in ("car", "plane", "train"):
        file(tmp_path / name / "0")
    data = load_data(str(tmp_path))
    assert list(data) == ["train"]
    assert data["train"].features["label"].names == ["car", "plane", "train"]


def test_splits_without_classes_are_refused(made, tmp_path):
    """They would be learned as two classes, called train and test."""
    _, file = made
    for name in ("train", "test"):
        file(tmp_path / name / "0")
    with pytest.raises(ValueError, match=r"test, train hold files right in them, .* train/metadata.csv|test/metadata"):
        load_data(str(tmp_path))


def test_both_media_in_one_folder_are_refused(tmp_path):
    picture(tmp_path / "a" / "0.png")
    wav(tmp_path / "b" / "0.wav")
    with pytest.raises(ValueError, match=r"holds images \(.*0.png\) and sounds \(.*0.wav\)"):
        load_data(str(tmp_path))


def test_what_lies_among_sounds_is_told(tmp_path):
    wav(tmp_path / "a" / "0.wav")
    wav(tmp_path / "b" / "0.wav")
    wav(tmp_path / "loose.wav")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / ".DS_Store").write_text("x")
    (tmp_path / "b" / "Thumbs.db").write_text("x")
    notes = " ".join(load_data(str(tmp_path))["train"]._undula_source.notes)
    assert "files that are not read: 1 .txt; sounds are" in notes
    assert "loose.wav (1 in all)" in notes
    assert "thumbs" not in notes.lower()
    assert "DS_Store" not in notes


# --- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("place", ["folder", "split", "file"])
def test_a_table_names_files_beside_it(made, kind, place, tmp_path):
    """As in `datasets`' imagefolder and audiofolder, and in any table: names are relative to it."""
    column, file = made
    folder = tmp_path / "train" if place == "split" else tmp_path
    names = [file(folder / "files" / str(i)).relative_to(folder) for i in range(3)]
    rows = [{"file_name": str(name), "label": "ab"[i % 2]} for i, name in enumerate(names)]
    table = folder / f"metadata.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(table)
    else:
        (tiny.table if kind == "csv" else tiny.jsonl)(table, rows)
    data = load_data(str(table if place == "file" else tmp_path))
    assert list(data) == ["train"]
    if column == "image":
        _, parts = ImageClassification().read(data, "train")
        assert parts["train"]["label"][:] == [0, 1, 0]
        found = parts["train"]
    else:
        found = sounds(data["train"], "file_name", faults := Faults())
        faults.check()
        found = found.rename_column("file_name", "audio")
    if kind != "parquet" or place != "file":  # of Parquet there is no line, of all there is the file
        assert [row["path"] for row in found.cast_column(column, found.features[column])[column]] == [
            str(folder / name) for name in names
        ]


def test_names_of_what_is_not_there_are_faults_of_their_rows(made, tmp_path):
    column, file = made
    there = file(tmp_path / "0").name
    path = tiny.table(tmp_path / "rows.csv", [{"image": n, "label": "a"} for n in (there, "gone.png", " ")])
    rows, faults = load_data(path)["train"], Faults()
    if column == "image":
        ImageClassification().check(rows, faults)
    else:
        sounds(rows, "image", faults)
    assert "names files that are not there: line 3 names 'gone.png'" in faults.message()
    assert "is empty: line 4" in faults.message()
    assert faults.bad == {path: {1, 2}}


# --- sounds --------------------------------------------------------------------------------------------------------


def stored(rows, column="audio", skip=None):
    faults = Faults(skip)
    faults.of(source_of(rows).name, len(rows))  # as whoever read them said
    found = sounds(rows, column, faults)
    faults.check()
    return found


FORMS = {
    "names": lambda path, sound: {"audio": str(path)},
    "bytes": lambda path, sound: {"audio": path.read_bytes()},
    "encoded": lambda path, sound: {"audio": {"bytes": path.read_bytes(), "path": None}},
    "paths": lambda path, sound: {"audio": {"bytes": None, "path": str(path)}},
    "arrays": lambda path, sound: {"audio": {"array": sound.tolist(), "sampling_rate": RATE}},
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form_of_a_sound_is_the_same_sound(form, tmp_path):
    sound = tone().astype("float32").astype(float)
    path = wav(tmp_path / "a.wav", sound, subtype="FLOAT")
    rows = stored(datasets.Dataset.from_list([FORMS[form](path, sound)]))
    value = rows[0]["audio"]
    assert set(value) == {"bytes", "path"}
    numpy.testing.assert_array_equal(opened(value, RATE), sound.astype("float32"))
    other = stored(datasets.Dataset.from_list([FORMS["names"](path, sound)]))
    assert rows_digest(rows) == rows_digest(other)
    assert fingerprint(value) != fingerprint({"path": str(wav(tmp_path / "b.wav", tone(220))), "bytes": None})


def test_the_audio_of_datasets_is_taken_undecoded(tmp_path):
    """Decoding it would take another package."""
    rows = datasets.Dataset.from_list([{"audio": {"path": str(wav(tmp_path / "a.wav")), "bytes": None}, "n": 1}])
    found = stored(rows.cast_column("audio", datasets.Audio(16000)))
    assert seconds(found[0]["audio"]) == 0.5
    assert len(set(inputs(found))) == 1


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
@pytest.mark.parametrize("rate", [8000, 16000, 11025])
def test_a_sound_is_brought_to_a_rate(suffix, rate, tmp_path):
    """A tone of 440 Hz stays one, whatever the channels and the rate that it is wanted at."""
    path = wav(tmp_path / f"a.{suffix}", numpy.stack([tone(samples=16000)] * 2, 1))
    found = opened({"path": str(path), "bytes": None}, rate)
    assert found.dtype == numpy.float32
    assert found.ndim == 1
    assert abs(len(found) / rate - 2.0) < 0.15  # a codec of blocks fills the last one
    middle = found[rate // 4 : rate // 4 + rate]
    assert abs(numpy.abs(numpy.fft.rfft(middle)).argmax() - 440) <= 1
    assert numpy.abs(middle).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("spoil", ["empty", "cut", "text", "silent"])
@pytest.mark.parametrize("suffix", ["wav", "aiff"])
def test_damaged_sounds_are_faults_of_their_rows(spoil, suffix, tmp_path):
    for name in "ab":
        wav(tmp_path / f"{name}.{suffix}")
    bad = tmp_path / f"b.{suffix}"
    if spoil == "silent":
        wav(bad, numpy.zeros(0))
    else:
        bad.write_bytes({"empty": b"", "cut": bad.read_bytes()[:5000], "text": b"no sound at all"}[spoil])
    rows = [{"audio": f"{name}.{suffix}", "text": "x"} for name in "ab"]
    data = load_data(tiny.jsonl(tmp_path / "rows.jsonl", rows))["train"]
    with pytest.raises(ValueError, match=rf"damaged sounds: line 2: .*b.{suffix} \(a file\) cannot be read as audio"):
        stored(data)
    stored(data, skip=0.5)


def test_the_end_of_a_sound_is_looked_at_where_rows_may_go(tmp_path):
    """Of FLAC the header alone does not tell that the rest is missing: without leave it is found when it is read."""
    path = wav(tmp_path / "a.flac", tone(samples=40000))
    path.write_bytes(path.read_bytes()[:20000])
    data = load_data(tiny.jsonl(tmp_path / "rows.jsonl", [{"audio": "a.flac"}, {"audio": "a.flac"}]))["train"]
    with pytest.raises(ValueError, match="cannot be read as audio"):
        opened(stored(data)[0]["audio"], RATE)
    with pytest.raises(ValueError, match="damaged sounds"):
        stored(data, skip=0.5)


@pytest.mark.parametrize("value", [1.5, [0.1, 0.2], {"array": [0.1, float("nan")], "sampling_rate": 8000}], ids=str)
def test_what_is_no_sound_is_refused(value):
    with pytest.raises(ValueError, match=r"column 'audio' holds (no sounds|what is no sound)"):
        stored(datasets.Dataset.from_list([{"audio": value}, {"audio": value}]))


def test_sounds_with_the_same_samples_are_told_alike(tmp_path):
    """In a WAV file or a FLAC file."""
    whole = (tone() * 30000).astype("int16")
    both = [wav(tmp_path / name, whole, subtype="PCM_16") for name in ("a.wav", "b.flac")]
    assert len({fingerprint({"path": str(p), "bytes": None}) for p in both}) == 1
    assert json.dumps(fingerprint({"path": None, "bytes": both[0].read_bytes()}))
    assert seconds({"path": None, "bytes": io.BytesIO(both[0].read_bytes()).getvalue()}) == 0.5
