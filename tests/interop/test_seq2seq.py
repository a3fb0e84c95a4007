"""Text to text: what the decoder sees, what is cut, greedy writing, and batches that are accumulated."""

import dataclasses
import json

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file

import undula
from tests.support import tiny
from undula.train import Examples, Run, Seq2Seq, TokenClassification
from undula.train.data.faults import Faults
from undula.train.data.load import load_data
from undula.train.tasks.rouge import agreement

SIZES = {"vocab_size": 24, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 12,
         "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
ROWS = [
    {"source": "the film was good", "target": "a good film"},
    {"source": "the place and the day was awful", "target": "sad"},
]


def model_of(kind):
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                                       pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()
    if kind == "marian":
        config = transformers.MarianConfig(**SIZES | {"decoder_start_token_id": 0, "decoder_vocab_size": 24})
        return transformers.MarianMTModel(config).eval()
    kinds = {
        "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
        "mbart": (transformers.MBartConfig, transformers.MBartForConditionalGeneration),
    }
    config, model = kinds[kind]
    return model(config(**SIZES)).eval()


@pytest.mark.parametrize("kind", ["t5", "bart", "marian", "mbart"])
def test_the_decoder_sees_what_the_model_itself_would_show_it(kind, tmp_path):
    """Also where the labels are taken away, as `collapse` does; of mBART, which begins with the target's last token,
    the model makes it."""
    model, tokenizer, task = model_of(kind), tiny.tokenizer(tmp_path), Seq2Seq()
    task.agree(tokenizer, model)
    batch = task.collator(tokenizer)([task.example(row, tokenizer) for row in ROWS])
    assert batch["labels"].tolist()[1][-2:] == [-100, -100]
    own = model(**{k: v for k, v in batch.items() if k != "decoder_input_ids"})
    torch.testing.assert_close(model(**batch).loss, own.loss)
    if kind == "mbart":
        assert "decoder_input_ids" not in batch
    else:
        without = {k: v for k, v in batch.items() if k != "labels"}
        torch.testing.assert_close(model(**without).logits, own.logits)
    examples = Examples(task, datasets.Dataset.from_list(ROWS), tokenizer)
    assert task.choose(model, examples, 2) == pytest.approx(float(own.loss), rel=1e-5)
    assert task.choose(model, examples, 1) == pytest.approx(float(own.loss), rel=1e-5)


def test_what_is_cut_is_told_and_ends_nowhere(tmp_path):
    model, tokenizer = model_of("bart"), tiny.tokenizer(tmp_path)
    task = Seq2Seq(max_target=3, prefix="very ")
    task.agree(tokenizer, model)
    rows = datasets.Dataset.from_list([*ROWS, {"source": "the " * 30, "target": "good"}])
    notes = task.fits(Examples(task, rows, tokenizer), model, "train")
    assert notes == [
        "1 of 3 train rows: the target is cut at its end, its end token included "
        "(the longest has 5 tokens, 3 are kept)",
        "1 of 3 train rows: the source is cut at its end (the longest has 33 tokens, 12 are kept)",
    ]
    example = task.example(ROWS[0], tokenizer)
    assert tokenizer.decode(example["input_ids"]) == "[CLS] very the film was good [SEP]"
    assert tokenizer.decode(example["labels"]) == "[CLS] a good"


def test_a_target_ends_where_the_tokenizer_writes_no_end(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = None
    example = Seq2Seq().example(ROWS[1], tokenizer)
    assert tokenizer.decode(example["labels"]) == "sad [SEP]"


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    model, tokenizer = model_of("t5"), tiny.tokenizer(tmp_path)
    tokenizer.add_tokens(["unheard"])
    task, rows = Seq2Seq(), datasets.Dataset.from_list([{"source": "good", "target": "unheard"}])
    task.agree(tokenizer, model)
    with pytest.raises(ValueError, match=r"train targets hold the id 24, but the model's embedding has 24 rows"):
        task.fits(Examples(task, rows, tokenizer), model, "train")


def test_a_model_that_says_no_first_token_takes_the_tokenizers_or_is_refused(tmp_path):
    model, tokenizer = model_of("t5"), tiny.tokenizer(tmp_path)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    Seq2Seq().agree(tokenizer, model)
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 2
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    tokenizer.cls_token = None
    with pytest.raises(ValueError, match="which token a decoder begins with: set decoder_start_token_id"):
        Seq2Seq().agree(tokenizer, model)


def test_writing_is_greedy_whatever_the_model_is_set_to(tmp_path):
    model, tokenizer, task = model_of("bart"), tiny.tokenizer(tmp_path), Seq2Seq(max_target=6)
    task.agree(tokenizer, model)
    asked = task.asked(datasets.Dataset.from_list([{"source": row["source"]} for row in ROWS]), Faults())
    plain = list(task.answers(model, asked, tokenizer, 2))
    model.generation_config.update(do_sample=True, temperature=9.0, num_beams=3, min_length=5, repetition_penalty=3.0)
    model.train()
    assert list(task.answers(model, asked, tokenizer, 1)) == plain
    assert model.training
    assert model.generation_config.num_beams == 3
    inputs = {k: v for k, v in tokenizer(ROWS[0]["source"], return_tensors="pt").items() if k != "token_type_ids"}
    options = {"do_sample": False, "num_beams": 1, "min_length": 0, "repetition_penalty": 1.0, "max_new_tokens": 6}
    ids = model.eval().generate(**inputs, **options)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == plain[0]["text"]


@pytest.mark.parametrize("names", [("document", "summary"), ("question", "answer"), ("input", "output")])
def test_columns_are_found_by_their_usual_names(names, tmp_path):
    rows = [dict(zip(names, row.values(), strict=True)) for row in ROWS]
    _, parts = Seq2Seq().read(load_data(tiny.jsonl(tmp_path / "d.jsonl", rows)), "train")
    assert parts["train"].to_list() == ROWS
    rows[1][names[1]] = " "
    with pytest.raises(ValueError, match=rf"column '{names[1]}' is empty: line 2"):
        Seq2Seq().read(load_data(tiny.jsonl(tmp_path / "d.jsonl", rows)), "train")


def test_rouge_knows_words_of_every_script():
    """Of ASCII it is rouge_score's own, which makes nothing of other scripts, and two words of a German one."""
    from rouge_score.rouge_scorer import RougeScorer

    pair = "The cats' running, well-known 3rd place", "the cat runs: known place"
    own = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(*pair)
    found = agreement(*([text] for text in pair))
    assert (found["rouge1"], found["rougeL"]) == (own["rouge1"].fmeasure, own["rougeL"].fmeasure)
    assert agreement(["東京"], ["東京"])["rougeL"] == 1.0
    assert agreement(["größe"], ["grüße"])["rouge1"] == 0.0


TOKENS = [{"tokens": r["source"].split(), "tags": ["B-X", *["O"] * (len(r["source"].split()) - 1)]} for r in ROWS]


@pytest.mark.parametrize(
    ("task", "base", "rows"),
    [(Seq2Seq(), tiny.t5, ROWS), (TokenClassification(), tiny.bert, TOKENS)],
    ids=["seq2seq", "tokens"],
)
def test_accumulated_batches_train_like_whole_ones(task, base, rows, tmp_path):
    """Rows of different lengths: each token counts alike, in whichever of the batches it stands."""
    (tmp_path / "base").mkdir()
    model, data = base(tmp_path / "base"), tmp_path / "data"
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout_rate": 0.0}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | still))
    data.mkdir()
    for split in ("train", "validation"):
        tiny.jsonl(data / f"{split}.jsonl", rows * 2)
    run = Run(model, str(data), task, undula.LoRA(r=2), tmp_path / "whole", max_steps=2, batch=4, lr=1e-3)
    undula.train(run)
    undula.train(dataclasses.replace(run, out=tmp_path / "parts", batch=1, accumulate=4))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
