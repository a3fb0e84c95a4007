"""What tasks answer to rows that have no label: the seam below `predict` and `generate`."""

import pytest
import torch
from datasets import Dataset

from tests.support import tiny
from undula.train import CausalLM, Chat, Classification, ImageClassification, Regression
from undula.train.base import open_model
from undula.train.data.faults import Faults
from undula.train.tasks.generation import Sampling, Written, speak, stream, write

LONG = " ".join(["good"] * 60)
ROWS = [*(row["text"] for row in tiny.reviews(7)), "bad", "the film was very very very nice", LONG]


def opened(task, path):
    model, processor = open_model(str(path), task, torch.float32, 0)
    return model.eval(), processor


def asked(task, **columns):
    faults = Faults()
    found = task.asked(Dataset.from_dict(columns), faults)
    faults.check()
    return found


def texts(path, task):
    model, processor = opened(task, tiny.bert(path))
    return task, model, asked(task, text=ROWS), processor


def pictures(path):
    task = ImageClassification(names=("green", "red"))
    model, processor = opened(task, tiny.vit(path))
    return task, model, asked(task, image=[row["image"] for row in tiny.pictures(6)]), processor


def language(path):
    task = CausalLM(max_completion=5)
    model, processor = opened(task, tiny.llama(path))
    return task, model, asked(task, prompt=ROWS[:8]), processor


CASES = {
    "classification": lambda path: texts(path, Classification(names=("bad", "good", "so so"))),
    "regression": lambda path: texts(path, Regression()),
    "images": pictures,
    "a language model": language,
}


@pytest.mark.parametrize("case", CASES)
def test_answers_come_in_the_order_of_the_rows_whatever_the_batch(tmp_path, case):
    """Rows of like length run together, and each answer must go back to its own row."""
    task, model, rows, processor = CASES[case](tmp_path)
    alone = [next(task.answers(model, [row], processor, 1)) for row in rows]
    for batch in (1, 3, 50):
        found = list(task.answers(model, iter(rows), processor, batch))
        assert len(found) == len(rows)
        for one, other in zip(found, alone, strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                assert value == (pytest.approx(other[key], abs=1e-5) if isinstance(value, float | dict) else other[key])
    assert len({str(a) for a in alone}) > 1


def test_a_class_is_answered_by_its_name_with_the_softmax_of_the_outputs(tmp_path):
    task, model, rows, processor = CASES["classification"](tmp_path)
    with torch.no_grad():
        want = model(**processor(rows["text"][:1], return_tensors="pt")).logits[0].softmax(0)
    found = next(task.answers(model, rows, processor, 4))
    assert found["probabilities"] == pytest.approx(dict(zip(task.names, want.tolist(), strict=True)))
    assert found["label"] == task.names[int(want.argmax())]
    assert found["probability"] == pytest.approx(float(want.max()))


def test_a_cut_row_is_told_and_an_answer_that_is_no_number_refused(tmp_path, caplog):
    task, model, rows, processor = CASES["classification"](tmp_path)
    list(task.answers(model, rows, processor, 4))
    assert "1 of 10 given rows: the text is cut at its end (the longest has 62 tokens, 40 are kept)" in caplog.text
    with torch.no_grad():
        model.classifier.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="row 1 is not finite"):
        list(task.answers(model, rows, processor, 4))


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"prompt": ["good"], "input": ["bad"]}, {"prompt": "good\n\nbad"}),
        ({"prompt": ["good"], "input": [""]}, {"prompt": "good"}),
        ({"instruction": ["good"], "output": ["bad"]}, {"prompt": "good"}),
        ({"text": ["good"]}, {"prompt": "good"}),
        (
            {"messages": [[{"from": "human", "value": "good"}, {"from": "gpt", "value": "bad"}]]},
            {"messages": [{"role": "user", "content": "good"}]},
        ),
    ],
)
def test_a_language_model_is_asked_what_stands_before_its_answer(columns, row):
    assert list(asked(CausalLM(), **columns)) == [row]


def test_rows_without_what_is_asked_are_refused():
    with pytest.raises(LookupError, match="no column for text"):
        asked(Classification(), review=["good"])
    with pytest.raises(ValueError, match="is empty: row 2"):
        asked(Classification(), text=["good", " "])
    with pytest.raises(ValueError, match="nothing that could be answered"):
        asked(CausalLM(), messages=[[{"role": "assistant", "content": "good"}]])
    with pytest.raises(LookupError, match="no column for image"):
        asked(ImageClassification(), photo=["a"])


def test_a_prompt_is_put_as_in_training(tmp_path):
    """The tokens before an answer are those that stood before the completion in training."""
    for chat, form in ((True, None), (False, None), (True, Chat("very "))):
        task = CausalLM(format=form)
        _, tokenizer = opened(task, tiny.llama(tmp_path / str((chat, form is None)), chat))
        example = task.example({"prompt": "the film", "completion": "was"}, tokenizer)
        before = [i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label == -100]
        assert task.asked_ids({"prompt": "the film"}, tokenizer, 4) == before


def test_draws_follow_the_seed_and_the_row_alone(tmp_path):
    """Neither the batch nor the neighbours nor torch's own generator have a say; another seed has."""
    task, model, rows, processor = language(tmp_path)
    how = Sampling(6, temperature=1.5, top_p=0.9, seed=3)
    first = list(task.answers(model, rows, processor, 8, how))
    torch.manual_seed(5)
    assert first == list(task.answers(model, rows, processor, 3, how))
    assert first != list(task.answers(model, rows, processor, 8, Sampling(6, temperature=1.5, top_p=0.9, seed=4)))
    nearly = Sampling(6, temperature=1.5, top_p=1e-6)  # the likeliest alone
    assert list(task.answers(model, rows, processor, 8, nearly)) == list(
        task.answers(model, rows, processor, 8, Sampling(6))
    )


def test_draws_have_the_probabilities_that_temperature_and_top_p_give():
    """Of 0.5, 0.3, 0.2 the first two make 0.7: the third is never drawn, the others as 5 to 3."""
    from undula.train.tasks.generation import Draw

    logits = torch.tensor([0.5, 0.3, 0.2]).log() * 2
    draw = Draw(Sampling(temperature=2.0, top_p=0.7), range(4000))
    counted = torch.bincount(draw(None, logits.expand(4000, 3)).argmax(1), minlength=3) / 4000
    assert counted[2] == 0
    assert float(counted[0]) == pytest.approx(5 / 8, abs=0.04)  # five standard deviations


def test_pieces_that_come_one_by_one_make_the_whole(tmp_path):
    task, model, rows, processor = language(tmp_path)
    ids = task.asked_ids(rows[0], processor, 8)
    for how in (Sampling(8), Sampling(8, temperature=2.0, seed=1)):
        want = write(model, [ids], processor, 1, how)[0]
        heard = []
        assert speak(model, ids, processor, how, heard.append) == want.ended
        assert "".join(heard) == "".join(stream(model, ids, processor, how)) == want.text
    assert isinstance(want, Written)


def test_closing_a_stream_stops_the_writing_and_an_error_reaches_the_reader(tmp_path):
    import threading

    task, model, rows, processor = language(tmp_path)
    ids = task.asked_ids(rows[0], processor, 8)
    before = threading.active_count()
    pieces = stream(model, ids, processor, Sampling(100_000))
    next(pieces)
    pieces.close()
    assert threading.active_count() == before
    with pytest.raises(IndexError):
        list(stream(model, [10_000], processor, Sampling(8)))


def test_a_prompt_that_leaves_no_place_is_refused(tmp_path):
    task, _, _, processor = language(tmp_path)
    processor.model_max_length = 20
    with pytest.raises(ValueError, match="the model has places for 20"):
        task.asked_ids({"text": LONG}, processor, 8)
    assert len(task.asked_ids({"prompt": LONG}, processor, 8)) <= 12
