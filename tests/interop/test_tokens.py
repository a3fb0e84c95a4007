"""Tokens with tags: every form in which people have them, pieces of words, long rows, what is wrong with rows."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import undula
from tests.support import tiny
from undula.train import Examples, TokenClassification
from undula.train.data.faults import Faults
from undula.train.data.load import load_data
from undula.train.data.spans import words_of
from undula.train.tasks.limits import fits

SENTENCES = [("John Smith sang .", "B-PER I-PER O O"), ("in Rome", "O B-LOC")]
NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
LISTS = [{"tokens": t.split(), "tags": g.split()} for t, g in SENTENCES]
TEXTS = [
    {"text": "John Smith sang.", "spans": [{"start": 0, "end": 10, "label": "PER"}]},
    {"text": "in Rome", "spans": [{"start": 3, "end": 7, "label": "LOC"}]},
]


def conll(separator, extra=(), end="\n"):
    lines = []
    for tokens, tags in SENTENCES:
        pairs = zip(tokens.split(), tags.split(), strict=True)
        lines += [*(separator.join([token, *extra, tag]) for token, tag in pairs), ""]
    return end.join(lines)


FORMS = {
    "lists.jsonl": LISTS,
    "numbers.jsonl": [{"tokens": r["tokens"], "ner_tags": [NAMES.index(t) for t in r["tags"]]} for r in LISTS],
    "words.jsonl": [{"words": r["tokens"], "labels": r["tags"]} for r in LISTS],
    "texts.csv": "tokens,tags\nJohn Smith sang .,B-PER I-PER O O\nin Rome,O B-LOC\n",
    "python.csv": "tokens,tags\n" + "".join(
        f'"{r["tokens"]}","{r["tags"]}"\n' for r in LISTS),
    "spaces.conll": conll(" "),
    "tabs.bio": conll("\t", end="\r\n"),
    "four.iob2": "-DOCSTART- -X- O O\n\n" + conll(" ", ("NNP", "B-NP")),
    "comments.conll": "# sent_id = 1\n" + conll("\t"),
    "spans.jsonl": TEXTS,
    "triples.jsonl": [
        {"text": r["text"], "label": [[s["start"], s["end"], s["label"]] for s in r["spans"]]} for r in TEXTS
    ],
    "columns.jsonl": [
        {"text": r["text"], "entities": {k: [s[k] for s in r["spans"]] for k in ("start", "end", "label")}}
        for r in TEXTS
    ],
    "types.jsonl": [
        {"text": r["text"], "entities": [{"start": s["start"], "end": s["end"], "type": s["label"]}]}
        for r in TEXTS
        for s in r["spans"]
    ],
}  # fmt: skip


def written(path, content):
    if isinstance(content, str):
        path.write_bytes(content.encode())
    else:
        tiny.jsonl(path, content)
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_and_tags_are_read_as_people_write_them(form, tmp_path):
    task = TokenClassification(names=NAMES if form.startswith("numbers") else ())
    task, parts = task.read(load_data(written(tmp_path / form, FORMS[form])), "train")
    assert task.names == NAMES
    rows = parts["train"].to_list()
    assert [(" ".join(r["tokens"]), " ".join(NAMES[t] for t in r["tags"])) for r in rows] == SENTENCES


def test_the_names_of_a_class_label_are_the_tags():
    kind = datasets.Features({
        "tokens": datasets.List(datasets.Value("string")),
        "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])),
    })  # fmt: skip
    rows = [{"tokens": r["tokens"], "ner_tags": r["tags"]} for r in LISTS]
    task, _ = TokenClassification().read(datasets.DatasetDict(train=datasets.Dataset.from_list(rows, kind)), "train")
    assert task.names == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


WRONG = {
    r"'tags' has not as many tags as there are tokens in 'tokens': line 2 has 1 for 2": [
        LISTS[0], {"tokens": ["a", "b"], "tags": ["O"]}],
    r"'tokens' is empty: line 2": [LISTS[0], {"tokens": [], "tags": []}],
    r"tags that are not known: line 1 has None": [{"tokens": ["a", "b"], "tags": ["B-X", None]}],
    r"differ by case": [LISTS[0], {"tokens": ["a"], "tags": ["b-per"]}],
    r"there is no entity in any row": [{"tokens": ["a"], "tags": ["O"]}],
    r"line 1: 'X' from 3 to 9, in a text of 4 characters": [
        {"text": "abcd", "spans": [{"start": 3, "end": 9, "label": "X"}]}],
    r"line 1: 'X' \(0 to 3\) and 'Y' \(2 to 4\) overlap": [
        {"text": "abcd", "spans": [{"start": 0, "end": 3, "label": "X"}, {"start": 2, "end": 4, "label": "Y"}]}],
    r"no column for tags \(looked for tags, ner_tags": [{"tokens": ["a"]}],
    r"no column for text": [{"body": "a"}],
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_with_rows_is_named(said, tmp_path):
    with pytest.raises((ValueError, LookupError), match=said):
        TokenClassification().read(load_data(tiny.jsonl(tmp_path / "d.jsonl", WRONG[said])), "train")


def test_a_line_without_a_tag_is_named_and_its_sentence_can_go(tmp_path):
    path = written(tmp_path / "d.conll", conll(" ") + "\nbad\n\nin O\n")
    with pytest.raises(ValueError, match=r"as many columns as the first \(2\), but: line 9 has 1 \('bad'\)"):
        TokenClassification().read(load_data(path), "train")
    faults = Faults(0.5)
    _, parts = TokenClassification().read(load_data(path, faults), "train", faults=faults)
    assert [" ".join(r["tokens"]) for r in parts["train"]] == ["John Smith sang .", "in Rome", "in"]


def test_tags_that_begin_nothing_are_told(tmp_path):
    rows = [*LISTS, {"tokens": ["a", "b"], "tags": ["O", "I-PER"]}]
    data = load_data(tiny.jsonl(tmp_path / "d.jsonl", rows))
    assert any(
        "1 tags, such as I-PER in line 3, follow no tag" in note for note in TokenClassification().notes(data["train"])
    )


def pieces(path):
    """A tokenizer that cuts words: un ##known, and knows nothing of an empty one."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "John", "un", "##known", "sang", "."]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def test_a_tag_stands_at_the_first_piece_of_its_word(tmp_path):
    task = TokenClassification(names=NAMES)
    row = {"tokens": ["John", "unknown", "", "sang"], "tags": [3, 4, 1, 0]}
    example, lost = task.traced(row, pieces(tmp_path))
    assert example["input_ids"] == [2, 4, 5, 6, 7, 3]
    assert example["labels"] == [-100, 3, 4, -100, 0, -100]
    assert list(lost) == ["words are lost, of which the tokenizer makes nothing"]


def test_words_of_a_byte_level_tokenizer_begin_with_their_blank(tmp_path):
    """RoBERTa's and GPT-2's pieces of a word within a text are others than those of a word alone."""
    import transformers

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["the film was good"] * 3, 300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    made.save_model(str(tmp_path))
    transformers.RobertaConfig().save_pretrained(tmp_path)
    transformers.RobertaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    task = TokenClassification(names=NAMES)
    processor = task.processor(str(tmp_path))
    encoded, first, _ = task.pieces({"tokens": ["the", "film"]}, processor)
    assert encoded["input_ids"] == processor(" the film")["input_ids"]
    assert processor.convert_ids_to_tokens(encoded["input_ids"][first[1]]).startswith("Ġ")
    processor.save_pretrained(tmp_path / "kept")
    again = task.pieces({"tokens": ["the", "film"]}, task.processor(str(tmp_path / "kept")))
    assert again[0]["input_ids"] == encoded["input_ids"]


def test_a_long_row_is_cut_told_and_measured_to_its_end(bert, tmp_path):
    """What is cut off is said to be O: an entity there is missed, not left out of the count."""
    task, tokenizer = TokenClassification(names=NAMES, max_length=4), pieces(tmp_path)
    rows, model = datasets.Dataset.from_list([{"tokens": ["sang", "sang", "John"], "tags": [0, 0, 3]}]), bert
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))
    examples = Examples(task, rows, tokenizer)
    assert fits(examples, model, "train") == [
        "1 of 1 train rows: the row is cut at its end (the longest has 5 tokens, 4 are kept)"
    ]
    found = task.score(model, examples, 2)
    assert (found["recall"], found["f1"], found["accuracy"]) == (0.0, 0.0, pytest.approx(2 / 3))


def test_of_tags_without_o_what_is_cut_off_is_said_to_be_none(bert, tmp_path):
    """Parts of speech: a token that the model has not seen has no tag, rather than the first of the list."""
    task, tokenizer = TokenClassification(names=("ADJ", "NOUN", "VERB", "X", "Y"), max_length=3), pieces(tmp_path)
    words = ["sang", "John", "sang"]
    with torch.no_grad():
        bert.classifier.weight.zero_()
        bert.classifier.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))
    examples = Examples(task, datasets.Dataset.from_list([{"tokens": words, "tags": [0, 0, 0]}]), tokenizer)
    found = task.score(bert, examples, 2)
    assert (found["accuracy"], found["precision"], found["recall"]) == pytest.approx((1 / 3, 1.0, 1 / 3))
    rows = [{"tokens": words, "text": " ".join(words), "starts": [0, 5, 10]}]
    (answer,) = task.answers(bert, rows, tokenizer, 2)
    assert [(e["label"], e["start"]) for e in answer["entities"]] == [("ADJ", 0)]


def by_token(model, wanted):
    """The model, which says of each token the tag that is wanted of its id, and O of others."""

    def forward(input_ids, **_):
        logits = torch.zeros(*input_ids.shape, 5)
        for id, tag in wanted.items():
            logits[..., tag] += 9.0 * (input_ids == id)
        logits[..., 0] += 5.0
        return SimpleNamespace(logits=logits)

    model.forward = forward
    return model


@pytest.fixture
def bert():
    from transformers import BertConfig, BertForTokenClassification

    return BertForTokenClassification(BertConfig(vocab_size=9, **tiny.SMALL, num_labels=5)).eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_same_answers(side, bert, tmp_path):
    tokenizer, task = pieces(tmp_path), TokenClassification(names=NAMES)
    tokenizer.padding_side = side
    rows = [{"tokens": ["John", "unknown"]}, {"tokens": ["John", "unknown", "sang", "."]}]
    examples = Examples(task, datasets.Dataset.from_list(rows), tokenizer)
    found = {i: p.argmax(1).tolist() for i, p, *_ in task.said_of(by_token(bert, {4: 3, 5: 4}), examples, 2)}
    assert found == {0: [3, 4], 1: [3, 4, 0, 0]}


def test_words_of_a_text():
    def cut(text, *edges):
        return [text[a:b] for a, b in words_of(text, edges)]

    assert cut("Don't stop, é!") == ["Don", "'", "t", "stop", ",", "é", "!"]
    assert cut("Berliner", 6) == ["Berlin", "er"]
    assert cut("東京 Tokyo") == ["東", "京", "Tokyo"]
    assert cut("हिन्दी है") == ["हिन्दी", "है"]
    assert cut("  ") == []


def test_spans_inside_of_words_are_told(tmp_path):
    rows = [{"text": "ein Berliner", "spans": [{"start": 4, "end": 10, "label": "LOC"}]}]
    data = load_data(tiny.jsonl(tmp_path / "d.jsonl", rows))
    assert any(
        n.startswith("1 spans begin or end inside of a word") for n in TokenClassification().notes(data["train"])
    )
    _, parts = TokenClassification().read(data, "train")
    assert parts["train"][0]["tokens"] == ["ein", "Berlin", "er"]


def test_entities_are_answered_in_characters(bert, tmp_path):
    """Of texts where they stand in them, of tokens where they stand with a blank between."""
    tokenizer, task = pieces(tmp_path), TokenClassification(names=NAMES)
    model = by_token(bert, {4: 3, 5: 4})  # John begins a person, un- goes on
    for rows, spaces in (({"text": ["sang  John unknown."]}, 2), ({"tokens": [["sang", "John", "unknown", "."]]}, 1)):
        asked = task.asked(datasets.Dataset.from_dict(rows), Faults())
        (found,) = task.answers(model, asked, tokenizer, 4)
        (entity,) = found["entities"]
        assert (entity["label"], entity["text"]) == ("PER", "John unknown")
        assert (entity["start"], entity["end"]) == (4 + spaces, 16 + spaces)
        assert 0.9 < entity["score"] <= 1.0
        json.dumps(found)


def test_types_that_a_part_does_not_have_are_told():
    """A type of the validation rows alone is never learned."""
    figures = {"entities": {"train": {"X": 3}, "validation": {"NEW": 1}}, "tokens": {"train": 9, "validation": 2}}
    notes = list(TokenClassification(names=("O", "B-X", "B-NEW")).told(figures))
    assert notes[2:] == ["types without a train entity: NEW", "types without a validation entity: X"]


def test_a_batch_without_a_tag_that_counts_changes_nothing(tmp_path):
    """The mean of no losses is 0/0: a training that met such a batch was told to have diverged."""
    from undula.train.prepared import prepare
    from undula.train.trainer import trainer

    data = tiny.jsonl(tmp_path / "d.jsonl", [{"tokens": ["good", str(i)], "tags": ["B-X", "O"]} for i in range(20)])
    run = undula.Run(tiny.bert(tmp_path / "base"), data, TokenClassification(), undula.LoRA(r=2), tmp_path / "o")
    ready = prepare(run)
    fitter = trainer(run, ready.model, ready.train, ())
    batch = dict(ready.run.task.collator(ready.processor)([ready.train[0], ready.train[1]]))
    for labels in (batch["labels"], torch.full_like(batch["labels"], -100)):
        ready.model.zero_grad()
        loss = fitter.compute_loss(ready.model, {**batch, "labels": labels})
        assert torch.isfinite(loss)
        loss.backward()
        moved = [bool(p.grad.any()) for p in ready.adapter.parameters() if p.grad is not None]
        assert all(torch.isfinite(p.grad).all() for p in ready.adapter.parameters() if p.grad is not None)
        assert (loss.item() > 0) == any(moved) == bool((labels != -100).any())
