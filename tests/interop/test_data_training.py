"""From rows to a run: labels, the base's own classes, what is cut, padding, positions, ids, forms of rows, splits."""

import dataclasses
import json
import re
from pathlib import Path

import datasets
import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

import undula
from tests.support import tiny
from undula.starts import LoRAGA
from undula.train import (
    CausalLM,
    Classification,
    Examples,
    Plain,
    Regression,
    Run,
    evaluate,
    restored,
)
from undula.train.base import open_model
from undula.train.data.conversation import tokens
from undula.train.data.load import read_file, with_validation
from undula.train.prepared import prepare
from undula.train.resume import claim
from undula.train.rows import rows_of
from undula.train.tasks.limits import Cuts, positions, table_of
from undula.train.tasks.outputs import order_of, with_head

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def run_of(model, data, out, task=None, **changes):
    usual = {"method": undula.LoRA(r=1), "max_steps": 1, "batch": 4, "lr": 1e-8}
    return Run(model=str(model), data=str(data), task=task or Classification(), out=out, **(usual | changes))


def test_options_that_do_nothing_are_told(tmp_path):
    """They were taken without a word, and the numbers were those of other options."""
    rows = tiny.jsonl(tmp_path / "d.jsonl", tiny.reviews(20))
    run = run_of(tiny.bert(tmp_path / "bert"), rows, tmp_path / "o")
    idle = {"head_lr": 0.5, "probe_batches": 2, "epochs": 5.0}

    def told(**changes):
        return [note.split(" ")[0] for note in prepare(dataclasses.replace(run, **changes)).notes if "nothing" in note]

    assert told() == told(head_lr=0.5) == told(max_steps=None, epochs=5.0) == []
    assert told(**idle) == ["epochs=5", "probe_batches=2"]
    assert told(**idle, method=undula.Centred(undula.LoRA(r=1), LoRAGA()), max_steps=None) == []
    assert told(**idle, method=None, max_steps=None) == ["head_lr=0.5", "probe_batches=2"]
    assert told(head_lr=0.5, method=None, full=("LayerNorm",)) == []
    causal = {"model": tiny.llama(tmp_path / "llama"), "task": CausalLM(prompt="text", completion="label")}
    assert told(**causal, head_lr=0.5) == ["head_lr=0.5"]


def test_a_run_takes_values_as_people_write_them(tmp_path):
    """A path where a text stands, a text where a path stands, lists, a name of a type, numbers of numpy."""
    usual = {"model": "m", "data": "d.csv", "out": tmp_path, "where": ("q", "v"), "full": ("norm",), "batch": 4}
    want = run_of(
        usual["model"], usual["data"], usual["out"], lr=0.5, **{k: usual[k] for k in ("where", "full", "batch")}
    )
    given = {"model": Path("m"), "data": Path("d.csv"), "out": str(tmp_path), "where": ["q", "v"], "full": "norm"}
    numbers = {"batch": numpy.int64(4), "lr": numpy.float32(0.5), "max_steps": 1.0, "dtype": "float32"}
    made = dataclasses.replace(want, **given, **numbers)
    assert made == want
    assert json.dumps(made.encode()) == json.dumps(want.encode())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"task": Classification}, "task is a Task such as"),
        ({"task": "classification"}, "task is a Task such as"),
        ({"method": "lora"}, "method is a Method such as"),
        ({"method": undula.LoRA}, "method is a Method such as"),
        ({"data": [{"text": "good"}]}, "data is a text or a path, found"),
        ({"lr": "1e-3"}, "Run.lr is a finite number"),
        ({"batch": 2.5}, "Run.batch is an integer"),
        ({"max_steps": float("inf")}, "Run.max_steps is an integer"),
        ({"seed": True}, "Run.seed is an integer"),
    ],
)
def test_a_run_says_what_a_value_should_be(given, told, tmp_path):
    with pytest.raises((TypeError, ValueError), match=re.escape(told)):
        dataclasses.replace(run_of("m", "d.csv", tmp_path), **given)


@pytest.mark.parametrize("name", ["report.json", "checkpoints", "adapter_model.safetensors"])
def test_a_run_overwrites_nobody_elses_files(name, tmp_path):
    """`--out .` wrote over a report.json of the user's own; a run that was interrupted there counted as finished."""
    (tmp_path / "README.md").write_text("mine")
    run = run_of("base", "data", tmp_path)
    claim(run, False)
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds {name} of something else"):
        claim(run, False)


def test_a_tokenizer_beside_an_adapter_agrees_with_the_base(tmp_path):
    """The one that somebody's trainer saved with the adapter pads and cuts as the base takes it, as the base's does."""
    base, out = tiny.llama(tmp_path / "base"), tmp_path / "theirs"
    model = LlamaForCausalLM.from_pretrained(base)
    undula.attach(model, undula.LoRA(r=1), "q_proj").save(out, base=base, task="CAUSAL_LM")
    theirs = tiny.tokenizer(out)
    theirs.pad_token = None
    theirs.save_pretrained(out)
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": "the film was good"}\n')
    opened = restored(out)
    pad = opened.processor.pad_token_id
    assert pad == opened.processor.eos_token_id == opened.model.config.pad_token_id
    assert opened.processor.model_max_length == opened.model.config.max_position_embeddings
    assert opened.score(str(tmp_path / "rows.jsonl"))["loss"] > 0


# The base's own classes


def tuned(path, names):
    """A BERT whose head says class i for a text of the word tiny.WORDS[i] and a few "the", with its tokenizer."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    size = len(tiny.tokenizer(path))
    config = BertConfig(**SMALL, vocab_size=size, max_position_embeddings=16, initializer_range=0.2, **labels)
    model, tokenizer, n = BertForSequenceClassification(config).eval(), tiny.tokenizer(path), len(names)
    texts = [f"{word} {'the ' * k}" for k in range(min(4, 30 // n)) for word in tiny.WORDS[:n]]
    with torch.no_grad():
        pooled = torch.cat([model.bert(**tokenizer(text, return_tensors="pt")).pooler_output for text in texts])
        wanted = torch.eye(n).repeat(len(texts) // n, 1)
        model.classifier.weight.copy_((torch.linalg.pinv(pooled.double()) @ wanted.double()).mT)
        model.classifier.bias.zero_()
    model.save_pretrained(path)
    return str(path)


OWN = {
    "another order": (["pos", "neg"], ["pos", "neg"]),
    "other spelling": (["POSITIVE", "negative "], ["Positive", "Negative"]),
    "five": (["e", "a", "d", "b", "c"], ["e", "a", "d", "b", "c"]),
    "numbers as texts": (["1", "0", "2"], ["1", "0", "2"]),
    "numbers for LABEL_0": ([f"LABEL_{i}" for i in range(11)], [str(i) for i in range(11)]),
    "numbers for names": (["neg", "pos"], ["0", "1"]),
}


@pytest.mark.parametrize("case", OWN)
def test_a_tuned_base_keeps_its_classes_in_its_order(case, tmp_path):
    """Right before training, and by its own names, whatever order the alphabet would give; and again when it is saved
    and measured."""
    own, names = OWN[case]
    base = tuned(tmp_path / "base", own)
    rows = [{"text": f"{tiny.WORDS[i]} {'the ' * k}", "label": name} for k in range(3) for i, name in enumerate(names)]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        tiny.table(tmp_path / "data" / f"{split}.csv", rows[: len(names)] * 2 if split == "validation" else rows)
    report = undula.train(run_of(base, tmp_path / "data", tmp_path / "out"))
    assert report["before"]["accuracy"] == report["after"]["accuracy"] == 1
    assert report["run"]["task"]["names"] == names
    assert any("own head for these classes is kept" in note for note in report["data"]["notes"])
    assert evaluate(tmp_path / "out")["accuracy"] == 1
    listed = run_of(base, tmp_path / "data", tmp_path / "listed", Classification(names=tuple(sorted(names))))
    assert undula.train(listed)["before"]["accuracy"] == 1  # the head follows the names that are asked for


def test_a_head_for_other_classes_gives_way_to_a_new_one(tmp_path):
    """Of the same size too; and that is said."""
    base = tuned(tmp_path / "base", ["pos", "neg"])
    data = tiny.jsonl(tmp_path / "d.jsonl", tiny.reviews(40))
    ready = prepare(run_of(base, data, tmp_path / "out"))
    assert any("head for other classes (2: pos, neg); it is replaced" in note for note in ready.notes)
    old = BertForSequenceClassification.from_pretrained(base)
    assert not torch.equal(ready.model.get_parameter("classifier.weight"), old.classifier.weight)
    assert ready.model.get_parameter("classifier.weight").std().item() == pytest.approx(0.2, rel=0.3)  # as they begin
    again = prepare(run_of(base, data, tmp_path / "out"))
    assert torch.equal(ready.model.get_parameter("classifier.weight"), again.model.get_parameter("classifier.weight"))


def test_outputs_are_found_whatever_else_stands_outside_the_body(tmp_path):
    """RoBERTa's head has a square matrix before its output, here with as many rows as there are classes."""
    names = [f"c{i:02}" for i in range(32)]
    config = RobertaConfig(**SMALL, vocab_size=40, num_labels=32, id2label=dict(enumerate(names)))
    model = RobertaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    turned = with_head(
        AutoModelForSequenceClassification, str(tmp_path), names[::-1], id2label=dict(enumerate(names[::-1]))
    )
    assert torch.equal(turned.classifier.out_proj.weight, model.classifier.out_proj.weight.flip(0))
    assert torch.equal(turned.classifier.dense.weight, model.classifier.dense.weight)


def test_orders():
    """Compared as run_glue does, and by number."""
    assert order_of(["b", "A"], ["a", "B"]) == [1, 0]
    assert order_of(["LABEL_1", "LABEL_0"], ["0", "1"]) == [1, 0]
    assert order_of(["x", "y"], ["0", "1"]) == [0, 1]
    assert order_of(["x", "y"], ["1", "2"]) is None
    assert order_of(["x", "y", "z"], ["x", "y"]) is None
    assert order_of(["a", "A"], ["a", "A"]) is None  # which is which, nobody knows


def test_a_study_trains_on_the_bases_own_order(tmp_path):
    """Its figures before any learning are those of the tuned base."""
    from undula.study.spec import Rows
    from undula.study.trial import Trial, perform
    from undula.study.watch import Watch

    base = tuned(tmp_path / "base", ["pos", "neg"])
    rows = [{"text": f"{tiny.WORDS[i % 2]} {'the ' * (i % 4)}", "label": ["pos", "neg"][i % 2]} for i in range(16)]
    data = tiny.jsonl(tmp_path / "d.jsonl", rows)
    trial = Trial(run_of(base, data, tmp_path / "o"), Rows(data, Classification()), 1, 0, tested=True)
    assert perform(trial, Watch())["test"] == 1


# Labels


def test_labels_stay_as_they_are_written(tmp_path):
    """007 and 7 are two classes; 2 comes before 10."""
    labels = ["007", "7", "10", "2", "1e3", "NA", "True"]
    data = tiny.table(
        tmp_path / "d.csv", [{"text": f"a {label} {i}", "label": label} for label in labels for i in range(2)]
    )
    task = Classification().fitted(read_file(tmp_path / "d.csv"))
    assert set(task.names) == set(labels)
    whole = datasets.Dataset.from_list([{"text": "a", "label": i} for i in (10, 2, 1)])
    assert Classification().fitted(whole).names == ("1", "2", "10")
    assert rows_of(run_of(tiny.bert(tmp_path / "bert"), data, tmp_path / "o")).figures["classes"]["train"]["007"] == 1


def test_equal_inputs_with_several_labels_are_told(tmp_path):
    rows = [{"text": f"a {i // 2}", "label": "yes" if i < 4 else "no" if i % 2 else "yes"} for i in range(40)]
    notes = rows_of(run_of(tiny.bert(tmp_path / "bert"), tiny.table(tmp_path / "d.csv", rows), tmp_path / "o")).notes
    told = (
        "20 of 40 train rows have the same input as an earlier row; 36 rows have inputs that stand with several labels"
    )
    assert told in notes


def test_numbers_for_a_bases_own_classes_are_told_with_their_names(tmp_path):
    """Who means another order sees it."""
    tuned(tmp_path / "base", ("good", "bad"))
    rows = [{"text": f"a {i}", "label": i % 2} for i in range(20)]
    notes = rows_of(run_of(tmp_path / "base", tiny.jsonl(tmp_path / "d.jsonl", rows), tmp_path / "o")).notes
    assert "the model's own head for these classes is kept (0 is its good, 1 is its bad)" in notes


def test_columns_whose_names_have_blanks_are_told_in_quotes(tmp_path):
    data = tiny.table(tmp_path / "d.csv", [{"text": f"a {i}", " label": i % 2} for i in range(9)])
    with pytest.raises(LookupError, match="their columns are: text, ' label'"):
        rows_of(run_of(tiny.bert(tmp_path / "bert"), data, tmp_path / "o"))


ALIKE = [("pos", "Pos"), ("pos", "pos "), ("caf\u00e9", "cafe\u0301"), ("a  b", "a b"), ("stra\u00dfe", "STRASSE")]


@pytest.mark.parametrize("pair", ALIKE)
def test_labels_that_look_alike_are_refused_unless_they_are_listed(pair, tmp_path):
    rows = [{"text": f"a {i}", "label": (*pair, "other")[i % 3]} for i in range(30)]
    data = tiny.table(tmp_path / "d.csv", rows)
    with pytest.raises(
        ValueError, match=r"'label' names classes that differ by case.*10 rows, first line 2.*first line 3"
    ):
        undula.train(run_of("nowhere", data, tmp_path / "o"))
    task = Classification(names=(*pair, "other"))
    assert (
        len(set(task.read(datasets.DatasetDict(train=read_file(tmp_path / "d.csv")), "train")[1]["train"]["label"]))
        == 3
    )


def test_all_faults_of_all_splits_come_before_the_model_is_looked_at(tmp_path):
    tiny.table(tmp_path / "train.csv", [{"text": t, "label": l} for t, l in [("a", "x"), (" ", "y"), ("b", " ")]])
    tiny.jsonl(tmp_path / "validation.jsonl", [{"text": "a", "label": None}, {"text": "", "label": "x"}])
    with pytest.raises(ValueError, match="the data have faults of 4 kinds") as error:
        undula.train(run_of("nowhere", tmp_path, tmp_path / "o"))
    for name, column, line in (("train.csv", "text", 3), ("train.csv", "label", 4), ("validation.jsonl", "label", 1),
                               ("validation.jsonl", "text", 2)):  # fmt: skip
        assert f"{name}, column {column!r} is empty: line {line}" in str(error.value)
    with pytest.raises(LookupError, match=r"(?s)no column for text.*no column for label.*--column text=") as error:
        Classification().read(datasets.DatasetDict(train=datasets.Dataset.from_list([{"a": 1}])), "train")


def test_classes_are_counted_and_the_majority_is_told(tmp_path):
    """In the report: rows of each class, and what always answering the most frequent one would score."""
    rows = [{"text": f"row {i}", "label": "often" if i % 4 else "rare"} for i in range(80)]
    data = tiny.jsonl(tmp_path / "d.jsonl", rows)
    figures = rows_of(run_of(tiny.bert(tmp_path / "bert"), data, tmp_path / "o")).figures
    assert figures == {
        "form": "text is 'text', label is 'label'",
        "classes": {"train": {"often": 54, "rare": 18}, "validation": {"often": 6, "rare": 2}},
        "majority": 0.75,
    }


def test_macro_f1_is_over_all_classes():
    """One that is neither met nor guessed counts as 0: otherwise two splits could not be compared."""
    logits = torch.eye(3)[[0, 1, 0, 0]]
    found = Classification(names=("a", "b", "c")).metrics(logits, [0, 1, 1, 0])
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 0) / 3)


# Splits


def test_a_made_split_has_every_class_in_both_parts_and_no_input():
    """Proportions to a row, classes of two rows too, and rows that are equal on one side."""
    labels = [0] * 70 + [1] * 25 + [2] * 3 + [3] * 2
    rows = datasets.Dataset.from_list([{"text": f"row {i}", "label": l} for i, l in enumerate(labels)])
    for seed in range(5):
        made = with_validation(datasets.DatasetDict(train=rows), seed)
        held = [made["validation"]["label"][:].count(i) for i in range(4)]
        assert held[:2] in ([7, 2], [7, 3])
        assert held[2:] == [1, 1]
        assert sorted(made["train"]["text"][:] + made["validation"]["text"][:]) == sorted(rows["text"][:])
    again = datasets.DatasetDict(train=datasets.concatenate_datasets([rows, rows, rows.select(range(20))]))
    for seed in range(5):
        made = with_validation(again, seed)
        assert not set(made["train"]["text"]) & set(made["validation"]["text"])
        assert 15 <= len(made["validation"]) <= 30
        assert set(made["validation"]["label"]) == set(made["train"]["label"]) == {0, 1, 2, 3}


@pytest.mark.parametrize("rows", [
    [{"prompt": f"p {i % 30}", "completion": str(i)} for i in range(60)],
    [{"text": f"t {i % 30}", "label": i / 7} for i in range(60)],
    [{"text": "same", "pair": f"t {i % 30}", "label": i % 2} for i in range(60)],
    [{"messages": [{"role": "user", "content": f"t {i % 30}"}]} for i in range(60)],
])  # fmt: skip
def test_equal_inputs_stay_together_in_every_form_of_rows(rows):
    made = with_validation(datasets.DatasetDict(train=datasets.Dataset.from_list(rows)), 0)
    keys = [{json.dumps([r.get(k) for k in ("prompt", "text", "pair", "messages")]) for r in made[s]}
            for s in ("train", "validation")]  # fmt: skip
    assert not keys[0] & keys[1]
    assert len(made["validation"]) in (4, 6)  # groups of two rows, of one class or of two


def test_repeated_rows_are_told(tmp_path):
    bert = tiny.bert(tmp_path / "bert")
    rows = [{"text": f"row {i % 20}", "label": "ab"[i % 2]} for i in range(40)]
    notes = rows_of(run_of(bert, tiny.jsonl(tmp_path / "a.jsonl", rows), tmp_path / "o")).notes
    assert "20 of 40 train rows have the same input as an earlier row" in notes
    assert "the validation part was made so that no input is in both parts" in notes
    twice = [{"text": "ab"[i % 2], "label": "ab"[i % 2]} for i in range(40)]
    notes = rows_of(run_of(bert, tiny.jsonl(tmp_path / "b.jsonl", twice), tmp_path / "o")).notes
    assert any("4 of 4 validation rows have an input that is in train too" in note for note in notes)
    same = tiny.jsonl(tmp_path / "c.jsonl", [{"text": "a", "label": 0.5}] * 40)
    notes = rows_of(run_of(bert, same, tmp_path / "o", Regression())).notes
    assert any("4 of 4 validation rows have an input that is in train too" in note for note in notes)


def test_a_run_of_version_1_is_measured_on_its_own_rows(tmp_path):
    """Its validation rows were drawn by chance; on other rows it would be measured on what it has learned."""
    data = tiny.jsonl(tmp_path / "d.jsonl", [{"text": f"the {i}", "label": "ab"[i % 2]} for i in range(60)])
    run = run_of(tiny.bert(tmp_path / "bert"), data, tmp_path / "o", Classification(names=("a", "b")))
    run.save(None)
    written = json.loads((tmp_path / "o" / "run.json").read_text())
    del written["run"]["by_chance"]
    (tmp_path / "o" / "run.json").write_text(json.dumps(written | {"version": 1}))
    old = rows_of(Run.load(tmp_path / "o")).held["text"][:]
    mixed = read_file(tmp_path / "d.jsonl").shuffle(seed=0).select(range(6))["text"][:]
    assert old == mixed != rows_of(run).held["text"][:]


def test_runs_that_held_out_different_rows_are_not_compared(tmp_path):
    """One of version 1 and a new one: what the one was measured on, the other has learned."""
    from undula.study.compare import Entry, _split

    data = tiny.jsonl(tmp_path / "d.jsonl", tiny.reviews(8))
    new = run_of("base", data, tmp_path / "new")
    old = dataclasses.replace(new, by_chance=True)
    assert _split([Entry(tmp_path, new, "a", {}), Entry(tmp_path, new, "b", {})], None) == ("validation", "")
    _, fault = _split([Entry(tmp_path, new, "a", {}), Entry(tmp_path, old, "b", {})], None)
    assert "different versions of undula held out different rows" in fault


# Padding, positions, ids


def decoder(path, pad, **changes):
    size = len(tiny.tokenizer(path))
    LlamaForCausalLM(
        LlamaConfig(**SMALL, vocab_size=size, pad_token_id=pad, eos_token_id=3, **changes)
    ).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("pad", [0, 1, 3, None])
@pytest.mark.parametrize("kind", ["its own", "none", "another"])
def test_a_row_does_not_depend_on_its_neighbours(pad, kind, tmp_path):
    """Whatever config and tokenizer say of padding, the tokenizer decides and every config follows."""
    path = decoder(tmp_path, pad)
    tokenizer = tiny.tokenizer(tmp_path)
    if kind != "its own":
        tokenizer.pad_token = None if kind == "none" else "[UNK]"
        tokenizer.save_pretrained(path)
    model, tokenizer = open_model(path, Classification(names=("a", "b")), torch.float64, 0)
    assert tokenizer.pad_token == {"its own": "[PAD]", "none": "[SEP]", "another": "[UNK]"}[kind]
    assert model.config.pad_token_id == model.config.get_text_config().pad_token_id == tokenizer.pad_token_id
    texts = ["good film", "the very nice film was great and great"]
    with torch.no_grad():
        one, many = (model(**tokenizer(t, padding=True, return_tensors="pt")).logits for t in (texts[:1], texts))
    torch.testing.assert_close(one[0], many[0])


def test_causal_models_agree_too_and_so_does_generation(tmp_path):
    model, tokenizer = open_model(decoder(tmp_path, 1), CausalLM(), torch.float32, 0)
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id == 0


def test_a_token_to_pad_with_that_the_model_lacks_is_refused(tmp_path):
    path = decoder(tmp_path, 0)
    tokenizer = tiny.tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"pads with '<more>', id 24, but the model's embedding has 24 rows"):
        open_model(path, Classification(names=("a", "b")), torch.float32, 0)


GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 20, "eos_token_id": 3}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 3,
       "max_position_embeddings": 20, "word_embed_proj_dim": 32}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
POSITIONS = {**SMALL, "max_position_embeddings": 20}
TABLES = {
    "BERT": (BertForSequenceClassification, BertConfig, POSITIONS, 20),
    "RoBERTa": (RobertaForSequenceClassification, RobertaConfig, POSITIONS | {"pad_token_id": 1}, 18),
    "GPT-2": (GPT2LMHeadModel, GPT2Config, GPT, 20),
    "OPT": (OPTForCausalLM, OPTConfig, OPT, 20),
    "T5": (T5ForSequenceClassification, T5Config, T5, None),
    "Llama": (LlamaForCausalLM, LlamaConfig, POSITIONS, None),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_positions_are_what_the_model_can_take(name):
    """One token more than we say is more than the model takes; as many as we say it takes."""
    kind, config, sizes, limit = TABLES[name]
    model = kind(config(vocab_size=24, **sizes)).eval()
    assert table_of(model) == limit
    if limit is None:
        return
    ids = torch.full((1, limit), 5)
    model(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(input_ids=torch.cat([ids, ids[:, :1]], 1))


def test_of_cuts_the_longest_row_is_told():
    """What is kept of a prompt depends on its completion, so the longest may keep less than others."""
    cuts = Cuts()
    for had, kept in ((30, 20), (50, 12), (40, 25)):
        cuts.add("the prompt is cut", had, kept)
    assert list(cuts.told(9, "train")) == [
        "3 of 9 train rows: the prompt is cut (the longest has 50 tokens, 12 are kept)"
    ]


LONG = [{"text": f"good {'film ' * n}", "label": "ab"[n % 2]} for n in range(40)]


@pytest.mark.parametrize("name", ["BERT", "RoBERTa"])
def test_texts_beyond_the_positions_are_cut_and_told_or_refused(name, tmp_path, caplog):
    """By default cut; where max_length asks for more than there is: refused before training, with both numbers."""
    kind, config, sizes, limit = TABLES[name]
    tokenizer = tiny.tokenizer(tmp_path / "m")
    kind(config(vocab_size=len(tokenizer), type_vocab_size=2, **sizes)).save_pretrained(tmp_path / "m")
    data = tiny.jsonl(tmp_path / "d.jsonl", LONG)
    (tmp_path / "none").mkdir()
    report = undula.train(run_of(tmp_path / "m", data, tmp_path / "o"))
    (note,) = (n for n in report["data"]["notes"] if "train rows: the text is cut" in n)
    assert f"{limit} are kept" in note
    undula.load(tmp_path / "o").examples()
    assert "given rows: the text is cut" in caplog.text
    with pytest.raises(
        ValueError, match=f"the longest has 4[0-9] tokens, the model has {limit} positions.*max_length=64"
    ):
        undula.train(run_of(tmp_path / "m", data, tmp_path / "o2", Classification(max_length=64)))
    short = tiny.jsonl(tmp_path / "s.jsonl", LONG[:10])
    undula.train(run_of(tmp_path / "m", short, tmp_path / "o3", Classification(max_length=64)))


def test_prompt_and_completion_beyond_the_positions(tmp_path):
    """GPT-2's table is shared by the two; generation stays within it too."""
    tokenizer = tiny.tokenizer(tmp_path / "m")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **GPT)).save_pretrained(tmp_path / "m")
    rows = [{"prompt": f"good {'film ' * (2 * n)}", "completion": "bad day " * n} for n in range(1, 20)]
    data = tiny.jsonl(tmp_path / "d.jsonl", rows)
    report = undula.train(run_of(tmp_path / "m", data, tmp_path / "o", CausalLM(generate=4)))
    told = " ".join(report["data"]["notes"])
    assert "the completion is cut at its end, its end token included" in told
    assert "the prompt is cut at the end of its text" in told
    with pytest.raises(ValueError, match=r"the model has 20 positions. Lower max_length=30 or max_completion=30"):
        undula.train(run_of(tmp_path / "m", data, tmp_path / "o2", CausalLM(max_length=30, max_completion=30)))


@pytest.mark.parametrize("task", [Classification(), CausalLM(generate=0)])
def test_ids_beyond_the_embedding_are_refused(task, tmp_path):
    path = decoder(tmp_path / "m", 0)
    tokenizer = tiny.tokenizer(tmp_path / "m")
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(path)
    rows = [
        {"text": f"the {w} {'newword' if w == 'sad' else ''}", "label": "ab"[i % 2]} for i, w in enumerate(tiny.WORDS)
    ]
    with pytest.raises(ValueError, match=r"token 'newword' with the id 24, but the model's embedding has 24 rows"):
        undula.train(run_of(path, tiny.jsonl(tmp_path / "d.jsonl", rows), tmp_path / "o", task))


# Language models: what is cut, forms of rows, generation


def test_completions_of_ordinary_length_are_whole(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path)
    for words in (40, 100, 1000):
        example, lost = CausalLM().traced({"prompt": "good", "completion": "film " * words}, tokenizer)
        assert (lost, example["labels"][-1]) == ({}, tokenizer.eos_token_id)
    example, lost = CausalLM().traced({"prompt": "good " * 3000, "completion": "film " * 3000}, tokenizer)
    assert len(example["input_ids"]) == 2048
    assert lost == {"the completion is cut at its end, its end token included": (3001, 1024),
                    "the prompt is cut at the end of its text": (3000, 1024)}  # fmt: skip
    assert tokenizer.eos_token_id not in example["labels"]
    example, lost = CausalLM(max_completion=5).traced({"prompt": "good", "completion": "film " * 5}, tokenizer)
    assert lost == {"the completion is cut at its end, its end token included": (6, 5)}


def learned(task, row, tokenizer):
    """What the model is given, and what of it is learned, as texts."""
    (row,) = task.rows(datasets.Dataset.from_list([row]))
    example = task.example(row, tokenizer)
    kept = [i for i in example["labels"] if i >= 0]
    return tokenizer.decode(example["input_ids"]).split(), tokenizer.decode(kept).split()


PAIRS = [
    ({"instruction": "the film", "context": "was good", "response": "nice"}, "the film was good nice [SEP]"),
    ({"instruction": "the film", "context": " ", "response": "nice"}, "the film nice [SEP]"),
    ({"instruction": "the film", "input": "was good", "output": "nice"}, "the film was good nice [SEP]"),
    ({"instruction": "the film", "input": None, "output": "nice"}, "the film nice [SEP]"),
    ({"prompt": "the film", "completion": "nice"}, "the film nice [SEP]"),
    ({"text": "the film", "summary": "nice"}, "the film nice [SEP]"),
]


@pytest.mark.parametrize(("row", "whole"), PAIRS)
def test_pairs_of_all_names(row, whole, tmp_path):
    """Dolly's context and Alpaca's input are part of the prompt; only the answer and its end are learned."""
    seen, kept = learned(CausalLM(format=Plain()), row, tiny.tokenizer(tmp_path))
    assert (seen, kept) == (whole.split(), ["nice", "[SEP]"])


def test_plain_text_is_learned_whole(tmp_path):
    seen, kept = learned(CausalLM(), {"text": "the film was good", "id": 3}, tiny.tokenizer(tmp_path))
    assert seen == kept == ["the", "film", "was", "good", "[SEP]"]


@pytest.mark.parametrize(
    ("ends", "unknown", "begin"),
    [
        ("<s> $A", "[UNK]", ["<s>"]),
        ("<s> $A </s>", None, ["<s>"]),
        ("[X] <s> $A </s>", "[UNK]", ["[X]", "<s>"]),
        ("$A", "[UNK]", []),
        ("$A </s>", "[UNK]", []),
    ],
)
def test_a_text_begins_as_the_tokenizer_begins_it(ends, unknown, begin, tmp_path):
    """Llama 3's tokenizer, and most that people make, put their beginning token there without `add_bos_token`."""
    words = {w: i for i, w in enumerate(["[UNK]", "<s>", "</s>", "[X]", "the", "film", "nice"])}
    made = Tokenizer(models.WordLevel(words, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(w, words[w]) for w in ("<s>", "</s>", "[X]")]
    made.post_processor = processors.TemplateProcessing(single=ends, special_tokens=special)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown, "additional_special_tokens": ["[X]"]}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    seen, kept = learned(CausalLM(), {"text": "the film nice"}, tokenizer)
    assert (seen, kept) == ([*begin, "the", "film", "nice", "</s>"], ["the", "film", "nice", "</s>"])
    seen, kept = learned(CausalLM(format=Plain()), {"prompt": "the film", "completion": "nice"}, tokenizer)
    assert (seen, kept) == ([*begin, "the", "film", "nice", "</s>"], ["nice", "</s>"])


CHAT = (
    "{% for m in messages %}[CLS] {{ 'a' if m.role == 'assistant' else 'the' }} {{ m.content }} [SEP]\n{% endfor %}"
    "{% if add_generation_prompt %}[CLS] a{% endif %}"
)
TURNS = [
    ("system", "very"),
    ("user", "good film"),
    ("assistant", "happy"),
    ("user", "bad day"),
    ("assistant", "sad day"),
]


@pytest.mark.parametrize("form", ["messages", "conversations", "as text"])
def test_of_conversations_the_assistants_turns_are_learned(form, tmp_path):
    """Several turns, a system's message, in both spellings; a question at the end that nobody answered is left out."""
    tokenizer = tiny.tokenizer(tmp_path)
    tokenizer.chat_template = CHAT
    turns = [*TURNS, ("user", "the end")]
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        row = {"conversations": [{"from": names[who], "value": said} for who, said in turns]}
    else:
        messages = [{"role": who, "content": said} for who, said in turns]
        row = {"messages": messages if form == "messages" else json.dumps(messages)}
    seen, kept = learned(CausalLM(), row, tokenizer)
    assert kept == ["happy", "[SEP]", "sad", "day", "[SEP]"]
    whole = "the very [SEP] [CLS] the good film [SEP] [CLS] a happy [SEP] [CLS] the bad day [SEP] [CLS] a sad day [SEP]"
    assert seen == ["[CLS]", *whole.split()]


def test_the_last_turn_ends_where_the_template_does_not_say(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} and {% endfor %}"
    ids, own = tokens([{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}], tokenizer)
    assert tokenizer.decode([i for i, mine in zip(ids, own, strict=True) if mine]).split() == ["bad", "and", "[SEP]"]


def test_what_a_template_puts_behind_a_turns_end_is_not_learned(tmp_path):
    """A line's end, as many have it: a model that has ended its turn is not asked for more."""
    tokenizer = tiny.tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} [SEP] and {% endfor %}"
    turns = [("user", "good"), ("assistant", "bad"), ("user", "fine"), ("assistant", "sad")]
    ids, own = tokens([{"role": who, "content": said} for who, said in turns], tokenizer)
    assert " ".join(tokenizer.decode(ids).split()) == "good [SEP] and bad [SEP] and fine [SEP] and sad [SEP]"
    learned = [i for i, mine in zip(ids, own, strict=True) if mine]
    assert " ".join(tokenizer.decode(learned).split()) == "bad [SEP] sad [SEP]"


BAD_CHATS = {
    "role": ([{"role": "wizard", "content": "a"}], r"line 1 \(message 1 has the role 'wizard'"),
    "content": ([{"role": "user", "content": ["a"]}], r"message 1 has the content \['a'\]"),
    "no answer": ([{"role": "user", "content": "a"}], "no turn of the assistant's"),
    "empty answer": ([{"role": "assistant", "content": " "}], "message 1, an assistant's, is empty"),
    "tools": ([{"role": "assistant", "content": "a", "tool_calls": [{"a": 1}]}], "message 1 has tool_calls"),
    "nothing": ([], r"found \[\]"),
    "text": ("hello", "found the text 'hello'"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_conversations_that_are_none_are_refused_by_line(name, tmp_path):
    messages, message = BAD_CHATS[name]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ValueError, match=message):
        CausalLM().rows(read_file(tmp_path / "d.jsonl"))


def test_messages_need_a_template(tmp_path):
    path = decoder(tmp_path / "m", 0)
    rows = [
        {"messages": [{"role": "user", "content": f"good {i}"}, {"role": "assistant", "content": "bad"}]}
        for i in range(20)
    ]
    data = tiny.jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        undula.train(run_of(path, data, tmp_path / "o", CausalLM()))
    tokenizer = tiny.tokenizer(tmp_path / "m")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    report = undula.train(run_of(path, data, tmp_path / "o2", CausalLM(generate=2)))
    assert {"loss", "rougeL"} <= set(report["after"]) == set(evaluate(tmp_path / "o2"))
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(ValueError, match="writes earlier turns otherwise"):
        tokens([{"role": w, "content": s} for w, s in TURNS], tokenizer)


def test_unused_columns_are_named(tmp_path):
    rows = [{"instruction": f"good {i}", "response": "bad", "category": "x", "label": 1} for i in range(20)]
    data = tiny.jsonl(tmp_path / "d.jsonl", rows)
    notes = rows_of(run_of(decoder(tmp_path / "m", 0), data, tmp_path / "o", CausalLM())).notes
    assert "columns that are not used: 'category', 'label'" in notes
    with pytest.raises(
        LookupError, match=r"no columns for a language model; their columns are: a, b.*--column messages="
    ):
        CausalLM().rows(datasets.Dataset.from_list([{"a": "x", "b": "y"}]))


@pytest.mark.parametrize(("task", "row"), [
    (Classification(text="label"), {"text": "good", "label": "good"}),
    (CausalLM(prompt="q", completion="q"), {"q": "good"}),
    (CausalLM(context="prompt"), {"prompt": "good", "completion": "good"}),
])  # fmt: skip
def test_one_column_is_not_two_things(task, row):
    """What is learned would be what is told."""
    with pytest.raises(LookupError, match=r"the column '.*' is both .* and .* Name another for one of them: --column"):
        task.rows(datasets.Dataset.from_list([row]))


def test_what_may_be_missing_leaves_its_column_to_what_is_named():
    assert Classification(text="sentence2").columns(["sentence2", "label"]) == {"text": "sentence2", "label": "label"}
    assert CausalLM(prompt="input").columns(["input", "output"]) == {"prompt": "input", "completion": "output"}
    assert CausalLM(prompt="input").inputs(["input"]) == {"prompt": "input"}


def test_old_runs_keep_their_names(tmp_path):
    """A task encodes as before where the newer columns are not named: a study's records stay its own."""
    assert set(CausalLM().encode()) == {
        "is",
        "prompt",
        "completion",
        "format",
        "max_length",
        "max_completion",
        "generate",
    }
    assert CausalLM.decode(CausalLM(messages="chat").encode()) == CausalLM(messages="chat")


def test_greedy_is_the_likeliest_token_whatever_the_model_ships(tmp_path):
    """Beams, penalties, sampling, forbidden and forced tokens of its generation_config change nothing."""
    path = decoder(tmp_path, 0)
    task = CausalLM(format=Plain(), max_completion=6)
    model, tokenizer = open_model(path, task, torch.float32, 0)
    texts = ["good film", "the very nice film was"]
    plain = task.write(model, texts, tokenizer, 2)
    own = model.generation_config
    for change in ({"num_beams": 4}, {"repetition_penalty": 5.0}, {"do_sample": True, "temperature": 9.0},
                   {"no_repeat_ngram_size": 1}, {"min_new_tokens": 6}, {"suppress_tokens": list(range(4, 20))},
                   {"max_length": 1}, {"forced_eos_token_id": 3}):  # fmt: skip
        own.update(**change)
        assert task.write(model, texts, tokenizer, 2) == plain, change
    assert model.generation_config is own
    ids = task.prompt_ids(texts[0], tokenizer)
    for _ in range(6):  # written out
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert tokenizer.decode(ids[len(task.prompt_ids(texts[0], tokenizer)) :], skip_special_tokens=True) == plain[0]


def test_a_models_limit_reaches_its_tokenizer(tmp_path):
    """Rotary positions are capped where the model was made for so many, and not refused beyond it."""
    path = decoder(tmp_path, 0, max_position_embeddings=30)
    model, tokenizer = open_model(path, CausalLM(), torch.float32, 0)
    assert (positions(model), table_of(model), tokenizer.model_max_length) == (30, None, 30)
    task = CausalLM(max_length=50, max_completion=10)
    rows = task.rows(datasets.Dataset.from_list([{"prompt": "good " * 60, "completion": "bad"}]))
    (note,) = task.fits(Examples(task, rows, tokenizer), model, "train")
    assert (
        note == "1 of 1 train rows: the prompt is cut at the end of its text (the longest has 60 tokens, 50 are kept)"
    )
