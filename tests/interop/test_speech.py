"""Speech recognition: error rates against counts by hand, normalised transcripts, cuts, short sounds, both kinds of
models."""

import importlib
import sys
from pathlib import Path

import datasets
import pytest
import soundfile
import torch

import undula
from tests.support import tiny
from undula.train import Examples, Run, SpeechRecognition, Spoken
from undula.train.base import open_model
from undula.train.tasks.transcripts import error_rates


def test_what_the_bench_keeps_is_of_what_it_would_make_now(tmp_path, monkeypatch):
    """Of other sizes or another method it is refused, and none of it is written in part."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    speech = importlib.import_module("speech")
    bench, made = object.__new__(speech.Bench), []
    bench.work = tmp_path
    out = bench.out("LoRA r=4", 1e-3, 0)

    def kept(make=lambda: made.append(1) or {"after": 1}):
        return bench.kept(out, "train", "LoRA r=4", make)

    assert kept() == kept()
    assert made == [1]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json"]
    for where, key, value, words in (
        (speech.SIZES, "steps", 9, r"other steps \(\[32\]\)"),
        (speech.WAYS, "LoRA r=4", (undula.LoRA(r=5), (), ()), "other method"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(where, key, value)
            with pytest.raises(ValueError, match=words):
                kept()
    for name in ("speech", "record"):
        sys.modules.pop(name)


def test_error_rates_count_words_and_characters_of_all_rows():
    """One word of four replaced and one inserted in the first, nothing in the second: 2 of 6 words."""
    found = error_rates(["the cat sat down", "good day"], ["the bat sat down now", "good day"])
    assert found["wer"] == pytest.approx(2 / 6)
    assert found["cer"] == pytest.approx((1 + 4) / (16 + 8))
    assert error_rates(["a"], ["a"]) == {"wer": 0.0, "cer": 0.0}
    assert error_rates(["a b"], [""])["wer"] == 1.0
    assert error_rates(["", "a b"], ["x y z", "a b"])["wer"] == pytest.approx(3 / 2)
    assert error_rates(["", "a b"], [" x ", " a b "])["cer"] == pytest.approx(1 / 3)  # blanks at the ends never count


HEARD = {
    "Don't STOP, now!": "don't stop now",
    "'Tis  well-known ": "tis well known",
    "It\u2019s 5 €": "it's 5",
    "…": "",
}


@pytest.mark.parametrize("text", HEARD)
def test_what_is_spoken_has_no_case_and_no_punctuation(text):
    assert Spoken()(text) == HEARD[text]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return tiny.whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    return tiny.wav2vec2(tmp_path_factory.mktemp("wav2vec2"))


def opened(path, task, seconds, tmp_path, text="low"):
    """(model, examples) of sounds of these lengths."""
    model, processor = open_model(path, task, torch.float32, 0)
    for i, length in enumerate(seconds):
        soundfile.write(tmp_path / f"{i}.wav", torch.zeros(round(8000 * length)).numpy() + 0.1, 8000)
    names = [str(tmp_path / f"{i}.wav") for i in range(len(seconds))]
    data = datasets.DatasetDict(train=datasets.Dataset.from_dict({"path": names, "text": [text] * len(names)}))
    task, parts = task.read(data, "train")
    return model, Examples(task, parts["train"], processor)


def test_long_sounds_and_texts_are_cut_and_told(whisper, tmp_path):
    model, examples = opened(whisper, SpeechRecognition(max_text=3), [0.5, 3.0], tmp_path)
    notes = examples.task.fits(examples, model, "train")
    assert notes == [
        "2 of 2 train rows: the text is cut at its end, its end token included (the longest has 5 tokens, 3 are kept)",
        "1 of 2 train rows: the sound is cut at its end (the longest has 3 seconds, 1 are kept)",
    ]
    assert len(examples[0]["labels"]) == 3


def test_sounds_without_a_step_are_refused_and_crowded_ones_told(wav2vec2, tmp_path):
    model, examples = opened(wav2vec2, SpeechRecognition(), [0.5, 0.03, 0.001], tmp_path, text="high")
    with pytest.raises(ValueError, match=r"1 of 3 train sounds are too short .* row 3 \(0\.001 s\): remove them"):
        examples.task.fits(examples, model, "train")
    model, examples = opened(wav2vec2, SpeechRecognition(), [0.5, 0.03], tmp_path, text="high")
    (note,) = examples.task.fits(examples, model, "train")
    assert note.startswith("1 of 2 train rows have more letters than the model has steps in their sound")


def test_the_decoder_learns_what_follows_its_first_token(whisper, tmp_path):
    model, examples = opened(whisper, SpeechRecognition(), [0.5], tmp_path)
    batch = examples.task.collator(examples.processor)([examples[0]])
    assert batch["labels"].tolist() == [[29, 11, 14, 22, 27]]
    assert batch["decoder_input_ids"].tolist() == [[28, 29, 11, 14, 22]]
    own = model.eval()(input_features=batch["input_features"], labels=batch["labels"]).loss
    assert examples.task.score(model, examples, 1)["loss"] == pytest.approx(float(own.detach()), rel=1e-5)


def test_by_ctc_the_loss_is_a_mean_over_rows(wav2vec2, tmp_path):
    model, examples = opened(wav2vec2, SpeechRecognition(), [0.5, 0.5, 0.5], tmp_path)
    assert model.config.ctc_loss_reduction == "mean"
    one, both = examples.task.score(model, examples, 1)["loss"], examples.task.score(model, examples, 2)["loss"]
    assert both == pytest.approx(one, rel=1e-4)
    assert set(examples.task.head(model)) == {"lm_head.weight", "lm_head.bias"}


@pytest.mark.parametrize("masked", [False, True])
def test_answers_of_unequal_sounds_do_not_depend_on_the_batch(wav2vec2, masked, tmp_path):
    """Its first layer normalises over the whole sound: over what fills it up too, whether or not that is masked."""
    model, examples = opened(wav2vec2, SpeechRecognition(), [0.1, 0.5, 0.2, 0.1, 0.9], tmp_path)
    examples.processor.feature_extractor.return_attention_mask = masked
    torch.nn.init.normal_(model.lm_head.weight)
    one, many = (list(examples.task.answers(model, examples.rows, examples.processor, batch)) for batch in (1, 5))
    assert one == many
    scores = [examples.task.score(model, examples, batch) for batch in (1, 3)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    seen = [sorted(numbers) for numbers, _ in examples.task.batches(examples, 5)]
    assert seen == [[0, 3], [1], [2], [4]]


def test_a_sound_without_a_step_is_not_answered_but_named(wav2vec2, tmp_path):
    model, examples = opened(wav2vec2, SpeechRecognition(), [0.5, 0.001], tmp_path)
    with pytest.raises(ValueError, match=r"row 2 \(0\.0010 s\) is too short for the model to hear anything: remove it"):
        list(examples.task.answers(model, examples.rows, examples.processor, 1))


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_model(tiny.vit(tmp_path), SpeechRecognition(), torch.float32, 0)


def test_texts_are_answered_and_normalised_ones_measured(whisper, tmp_path):
    """Rows in capitals: nothing is right as it is written, everything once it is normalised."""
    rows = tiny.tones(tmp_path / "wav", 32)
    tiny.jsonl(tmp_path / "train.jsonl", rows)
    run = Run(whisper, str(tmp_path / "train.jsonl"), SpeechRecognition(max_text=8), undula.LoRA(r=4), tmp_path / "out",
              lr=1e-2, max_steps=60, batch=8)  # fmt: skip
    undula.train(run)
    found = undula.load(tmp_path / "out").predict([str(tmp_path / row["audio"]) for row in rows[:6]])
    assert [answer["text"] for answer in found] == [row["text"] for row in rows[:6]]
    task = SpeechRecognition(normaliser=Spoken())
    wanted = [f"{row['text'].capitalize()}!" for row in rows[:4]]
    examples = Examples(task, datasets.Dataset.from_dict({"text": wanted}), None)
    heard = {i: answer["text"] for i, answer in enumerate(found[:4])}
    assert task._rates(examples, heard)["wer"] == 0.0
    assert SpeechRecognition()._rates(examples, heard)["wer"] == 1.0
