"""From recordings and their texts to word error rates and to transcripts of new ones."""

import csv
import json

import numpy as np
import pytest

from ..support import tiny
from ..support.walk import Walk

TONES = {"low": 300.0, "mid": 1200.0, "high": 4000.0}


def recording(file, words, seed):
    """A tone a word, with noise, at a rate that the model has not."""
    draw = np.random.default_rng(seed)
    times = np.arange(int(0.4 * 22050)) / 22050
    sound = np.concatenate([np.sin(2 * np.pi * TONES[word] * times) for word in words])
    file.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("soundfile").write(file, 0.3 * sound + 0.01 * draw.standard_normal(len(sound)), 22050)


def test_recordings_become_word_error_rates_and_transcripts(tmp_path, python):
    pytest.importorskip("jiwer")
    tiny.whisper(tmp_path / "base")
    pairs = [(one, two) for one in TONES for two in TONES]
    said = [" ".join(pair) for pair in pairs for _ in range(4)]
    for i, text in enumerate(said):
        recording(tmp_path / f"sounds/{i}.wav", text.split(), i)
    table = "\n".join(["file_name,text", *(f"{i}.wav,{text}" for i, text in enumerate(said))])
    (tmp_path / "sounds/metadata.csv").write_text(table)
    recording(tmp_path / "new/a.wav", ("high", "low"), 1001)
    recording(tmp_path / "new/b.wav", ("mid", "high"), 1002)
    walk = Walk(tmp_path, python)

    walk.undula(
        *("train", "--model", "base", "--data", "sounds", "--task", "speech-recognition", "--out", "listener"),
        *("--full", "model.decoder.embed_tokens", "--full", "model.encoder.conv1", "--full", "model.encoder.conv2"),
        *("--method", "lora", "--max-steps", "90", "--batch", "16", "--lr", "1e-2"),
    )
    report = json.loads((tmp_path / "listener/report.json").read_text())
    assert report["before"]["wer"] > 0.9
    assert report["after"]["wer"] < 0.2

    walk.undula("predict", "listener", "new", "--out", "answers.csv")
    with open(tmp_path / "answers.csv", encoding="utf-8", newline="") as opened:
        found = {row["file"]: row["text"] for row in csv.DictReader(opened)}
    assert found == {"a.wav": "high low", "b.wav": "mid high"}
    print(f"word error rate {report['before']['wer']:.2f} -> {report['after']['wer']:.2f}, {walk.seconds:.0f} s")
