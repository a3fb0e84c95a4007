"""Similarity of sentences with sentence-transformers: its pooling, its losses, its own loader of the adapter."""

import datasets
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses, modules
from typer.testing import CliRunner

import undula
from tests.interop.test_tasks import paired
from tests.support import tiny
from undula.cli.main import app
from undula.train import Examples, Run, Similarity, restored
from undula.train.base import open_model
from undula.train.data.faults import Faults
from undula.train.data.load import load_data
from undula.train.tasks.similarity import ranks

TEXTS = ["the film was good", "a very bad day and the food was poor"]


@pytest.fixture(scope="module", params=["plain", "first token, normalised"])
def base(request, tmp_path_factory):
    """An encoder as transformers saves it, and one as sentence-transformers does, with another pooling."""
    path = tmp_path_factory.mktemp("base")
    tiny.bert(path)
    if request.param == "plain":
        return str(path)
    transformer = modules.Transformer(str(path), max_seq_length=9)
    behind = [modules.Pooling(32, "cls"), modules.Normalize()]
    out = tmp_path_factory.mktemp("sentences") / "model"
    SentenceTransformer(modules=[transformer, *behind], device="cpu").save(str(out))
    return str(out)


def vectors(task, model, processor, texts):
    asked = task.asked(datasets.Dataset.from_dict({"text": texts}), Faults())
    return torch.tensor([answer["embedding"] for answer in task.answers(model, asked, processor, 2)])


def test_vectors_are_those_of_sentence_transformers(base):
    task = Similarity()
    model, processor = open_model(base, task, torch.float32, 0)
    own = SentenceTransformer(base, device="cpu")
    torch.testing.assert_close(
        vectors(task, model, processor, TEXTS), torch.tensor(own.encode(TEXTS)), atol=1e-5, rtol=1e-5
    )


ROWS = {
    "scores": [
        {"sentence1": TEXTS[0], "sentence2": TEXTS[1], "score": 0.5},
        {"sentence1": TEXTS[1], "sentence2": "a day", "score": 1.0},
    ],
    "pairs": [{"anchor": TEXTS[0], "positive": TEXTS[1]}, {"anchor": "a film", "positive": "very good"}],
    "triplets": [
        {"anchor": TEXTS[0], "positive": TEXTS[1], "negative": "sad"},
        {"anchor": "a", "positive": "very", "negative": "food"},
    ],
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_loss_is_that_of_sentence_transformers(kind, base):
    """On the same rows; it reaches the transformer."""
    task = Similarity(kind="scores" if kind == "scores" else "pairs")
    task, parts = task.read(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[kind])), "train")
    model, processor = open_model(base, task, torch.float32, 0)
    batch = task.collator(processor)([task.example(row, processor) for row in parts["train"]])
    own = SentenceTransformer(base, device="cpu").eval()
    loss = losses.CosineSimilarityLoss(own) if kind == "scores" else losses.MultipleNegativesRankingLoss(own)
    columns = [[row[c] for row in ROWS[kind]] for c in ROWS[kind][0] if c != "score"]
    features = [own.preprocess(column) for column in columns]
    labels = torch.tensor([row.get("score", 0.0) for row in ROWS[kind]])
    found = task.loss()(model.eval(), batch)
    torch.testing.assert_close(found, loss(features, labels), atol=1e-5, rtol=1e-5)
    found.backward()
    assert model.get_input_embeddings().weight.grad.norm() > 0
    score = task.score(model, Examples(task, parts["train"], processor), 2)
    assert score["loss"] == pytest.approx(float(found.detach()), rel=1e-4, abs=1e-6)


def verb(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_sentence_transformers_loads_the_adapter_and_the_merged_folder(base, tmp_path):
    """The exported LoRA by its own `load_adapter`, the merged folder by its constructor, pooling included."""
    rows = tiny.jsonl(tmp_path / "rows.jsonl", paired(24))
    run = Run(base, rows, Similarity(kind="pairs"), undula.LoRA(r=2), tmp_path / "out", max_steps=4, batch=4, lr=3e-2)
    undula.train(run)
    opened = restored(tmp_path / "out")
    wanted = vectors(opened.run.task, opened.model, opened.processor, TEXTS)
    before = torch.tensor(SentenceTransformer(base, device="cpu").encode(TEXTS))
    assert (wanted - before).norm() > 1e-2
    verb("export", tmp_path / "out", "--out", tmp_path / "lora")
    own = SentenceTransformer(base, device="cpu")
    own.load_adapter(str(tmp_path / "lora"))
    torch.testing.assert_close(torch.tensor(own.encode(TEXTS)), wanted, atol=1e-4, rtol=1e-4)
    verb("merge", tmp_path / "out", "--out", tmp_path / "merged")
    merged = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(torch.tensor(merged.encode(TEXTS)), wanted, atol=1e-4, rtol=1e-4)
    assert merged.max_seq_length == SentenceTransformer(base, device="cpu").max_seq_length


def test_two_sentences_are_answered_by_their_cosine(base):
    task = Similarity()
    model, processor = open_model(base, task, torch.float32, 0)
    rows = datasets.Dataset.from_dict({"sentence1": TEXTS, "sentence2": TEXTS[::-1]})
    found = list(task.answers(model, task.asked(rows, Faults()), processor, 2))
    one, other = vectors(task, model, processor, TEXTS)
    assert [f["similarity"] for f in found] == pytest.approx(
        [float(torch.cosine_similarity(one, other, 0))] * 2, abs=1e-5
    )


def test_ranks_by_hand():
    """The first anchor has its own text first; the second has its own behind another's; the third, of two own ones, the
    nearer one second.  What stands twice among the texts counts once."""

    def at(degrees):
        turned = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([torch.cos(turned), torch.sin(turned)], -1)

    anchors, positives, negatives = ["a", "b", "c", "c"], ["p", "q", "r", "s"], ["q", "p", "q", "q"]
    place = {"a": 0.0, "b": 10.0, "c": 100.0, "p": 5.0, "q": 50.0, "r": 170.0, "s": 155.0}
    columns = [anchors, positives, negatives]
    found = ranks(torch.stack([at([place[t] for t in column]) for column in columns]), columns)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2 + 1 / 2) / 4)  # c: q is 50 degrees away, s 55
    assert found["accuracy_at_1"] == 0.25
    three = ranks(torch.stack([at([place[t] for t in column[:3]]) for column in columns]), [c[:3] for c in columns])
    assert three["accuracy_at_1"] == pytest.approx(1 / 3, abs=1e-12)  # a share of rows is not rounded to float32


def test_ratings_beyond_one_are_divided_and_that_is_told(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "the", "score": s} for s in (0, 2.5, 5)]
    data = load_data(tiny.jsonl(tmp_path / "d.jsonl", rows))
    task, parts = Similarity().read(data, "train")
    assert (task.scale, parts["train"]["rating"][:]) == (5.0, [0.0, 0.5, 1.0])
    assert any("divided by 5" in note for note in Similarity().notes(data["train"]))
    with pytest.raises(ValueError, match=r"1 ratings are beyond the scale, such as 5: no cosine is above 1"):
        Similarity(scale=3.0).read(data, "train")


WRONG = {
    r"no column for rating \(looked for score": (Similarity(), {"sentence1": "a", "sentence2": "b"}),
    r"look like pairs, and kind is scores.*kind=pairs": (Similarity(), {"anchor": "a", "positive": "b"}),
    r"no column for positive": (Similarity(kind="pairs"), {"anchor": "a"}),
    r"column 'score' holds what is no number: line 1": (
        Similarity(),
        {"sentence1": "a", "sentence2": "b", "score": "x"},
    ),
    r"column 'negative' is empty: line 1": (
        Similarity(kind="pairs"),
        {"anchor": "a", "positive": "b", "negative": " "},
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_with_rows_is_named(said, tmp_path):
    task, row = WRONG[said]
    with pytest.raises((ValueError, LookupError), match=rf"(?s){said}"):
        task.read(load_data(tiny.jsonl(tmp_path / "d.jsonl", [row])), "train")


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind is scores or pairs; found 'triplets'"):
        Similarity(kind="triplets")
