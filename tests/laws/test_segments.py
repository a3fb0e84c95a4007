"""Rows behind each other in one: what a model answers, and its gradients, are those of each row by itself."""

import contextlib

import pytest
import torch
import transformers

import undula
from tests.laws.test_packing import WIDE, examples, padded
from tests.support.models import shake
from undula.kernels import attention
from undula.train.tasks.labelled import ALL, Head
from undula.train.tasks.packing import Flat, longest, next_tokens, of_tokens, probed
from undula.train.tasks.segments import kept_apart, segments
from undula.train.tasks.step import apart_with_firsts, packed

GROUPED = {**WIDE, "num_key_value_heads": 1}
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0,
         "initializer_range": 0.3}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 24}
DECODERS = {
    "llama, grouped heads": (lambda: transformers.LlamaConfig(**GROUPED), "sdpa"),
    "llama, eager": (lambda: transformers.LlamaConfig(**GROUPED), "eager"),
    "mistral, a window of 3": (lambda: transformers.MistralConfig(**GROUPED, sliding_window=3), "sdpa"),
    "gemma2, soft caps and a window": (
        lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=3, attn_logit_softcapping=1.0),
        "eager",
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32,
                                        initializer_range=0.3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        "sdpa",
    ),
}  # fmt: skip
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**SMALL, **STILL),
    "roberta": lambda: transformers.RobertaConfig(**SMALL | {"pad_token_id": 1}, **STILL, max_position_embeddings=40),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24,
                                                        initializer_range=0.3, dropout=0, attention_dropout=0,
                                                        seq_classif_dropout=0),
    "electra": lambda: transformers.ElectraConfig(**SMALL, **STILL, embedding_size=16),
    "modernbert": lambda: transformers.ModernBertConfig(**SMALL, intermediate_size=24, global_attn_every_n_layers=2,
                                                        local_attention=4),
}  # fmt: skip
LENGTHS = (7, 3, 9, 3, 1, 7)


def opened(kind, config, attention="sdpa"):
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation=attention).double()
    adapter = undula.attach(model, undula.LoRA(r=2))
    shake(adapter.parameters())
    return model, adapter


def causal(name):
    config, attention = DECODERS[name]
    return opened(transformers.AutoModelForCausalLM, config(), attention)


def gradients(adapter, loss):
    return [loss.detach(), *torch.autograd.grad(loss, list(adapter.parameters()))]


def assert_same(found, wanted, dtype=torch.float64):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.to(dtype), other.to(dtype))


def one_by_one(model, rows):
    """The mean loss over the labels of all rows, each by itself (padding has transformers' eager attention of float64
    hide whole rows, which is NaN)."""
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    each = [model(**padded([row])).loss * n for row, n in zip(rows, counts, strict=True) if n]
    return sum(each) / sum(counts)


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradients_are_those_of_each_row(name):
    """transformers' loss is in single precision, whatever the model's, and so is its eager softmax."""
    model, adapter = causal(name)
    wanted = gradients(adapter, one_by_one(model, examples(LENGTHS)))
    batch = Flat(next_tokens, more={"use_cache": False})(examples(LENGTHS))
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    with kept_apart(model), segments(batch.pop("segments")):
        found = gradients(adapter, model(**batch).loss)
    assert_same(found, wanted, torch.float32)


@pytest.mark.parametrize("name", [name for name, (_, attention) in DECODERS.items() if attention == "sdpa"])
def test_losses_and_gradients_are_those_of_padded_rows_in_double_precision(name):
    model, adapter = causal(name)
    head = Head(ALL)
    wanted = gradients(adapter, head.losses(model, padded(examples(LENGTHS))).mean())
    batch = Flat(next_tokens, more={"use_cache": False})(examples(LENGTHS))
    with kept_apart(model), segments(batch.pop("segments")):
        found = gradients(adapter, head.losses(model, batch).mean())
    assert_same(found, wanted)


def rows(lengths=LENGTHS, classes=3):
    draw = torch.Generator().manual_seed(2)
    made = [torch.randint(2, 40, (n,), generator=draw).tolist() for n in lengths]
    kind = [[int(t > 20) for t in ids] for ids in made]
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types, "labels": len(ids) % classes}
        for ids, types in zip(made, kind, strict=True)
    ]


def together(examples, pad):
    width = max(len(each["input_ids"]) for each in examples)
    fill = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}
    made = {
        k: [each[k] + [v] * (width - len(each[k])) for each in examples] for k, v in fill.items() if k in examples[0]
    }
    return {k: torch.tensor(v) for k, v in {**made, "labels": [each["labels"] for each in examples]}.items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_head_over_first_tokens_learns_as_from_padded_rows(name):
    config = ENCODERS[name]()
    config.num_labels = 3
    model, adapter = opened(transformers.AutoModelForSequenceClassification, config)
    given = rows() if name in ("bert", "electra") else [
        {k: v for k, v in row.items() if k != "token_type_ids"} for row in rows()
    ]  # fmt: skip
    pad = config.pad_token_id

    def padding(examples):
        return together(examples, pad)

    flats = [Flat(lambda rows: {"labels": padding(rows)["labels"]}, begin) for begin in (0, pad + 1)]
    step = packed(model, flats, padding, apart_with_firsts, given[:3])
    assert step.note is None, step.note
    assert step.gather.begin == (2 if name == "roberta" else 0)
    wanted = gradients(adapter, model(**padding(given)).loss)
    batch = step.gather(given)
    with step.around(model), segments(batch.pop("segments")):
        found = gradients(adapter, model(**batch).loss)
    assert_same(found, wanted)
    assert_same([model(**padding(given)).loss], wanted[:1])  # outside it is what it was


def test_labels_of_tokens_are_learned_as_in_padded_rows():
    config = ENCODERS["bert"]()
    config.num_labels = 3
    model, adapter = opened(transformers.AutoModelForTokenClassification, config)
    given = [{**row, "labels": [-100 if t % 4 == 0 else t % 3 for t in row["input_ids"]]} for row in rows()]
    width = max(LENGTHS)
    labels = [row["labels"] + [-100] * (width - len(row["labels"])) for row in given]
    wanted = gradients(
        adapter, model(**together([{**r, "labels": 0} for r in given], 0) | {"labels": torch.tensor(labels)}).loss
    )
    batch = Flat(of_tokens)(given)
    with kept_apart(model), segments(batch.pop("segments")):
        found = gradients(adapter, model(**batch).loss)
    assert_same(found, wanted)


@pytest.mark.parametrize("name", ["llama, grouped heads", "mistral, a window of 3"])
def test_no_mask_is_over_the_whole_row(name, monkeypatch):
    """Rows without a mask of their own are attended to at once; with one, those of one length together."""
    model, _ = causal(name)
    heard, together = [], []
    own, at_once = torch.nn.functional.scaled_dot_product_attention, attention.attended

    def listened(q, k, v, attn_mask=None, **given):
        heard.append((tuple(q.shape), None if attn_mask is None else tuple(attn_mask.shape)))
        return own(q, k, v, attn_mask=attn_mask, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", listened)
    monkeypatch.setattr(attention, "attended", lambda *given: together.append(given[3]) or at_once(*given))
    batch = Flat(next_tokens, more={"use_cache": False})(examples(LENGTHS))
    with kept_apart(model), segments(batch.pop("segments")), torch.no_grad():
        model(**batch)
    if "window" not in name:
        assert (heard, together) == ([], [[9, 7, 7, 3, 3, 1]] * 2)
        return
    assert not together
    assert [(q[0], q[2]) for q, _ in heard] == [(1, 9), (2, 7), (2, 3), (1, 1)] * 2
    masks = {q[2]: mask for q, mask in heard}
    assert masks == {9: (1, 1, 9, 9), 7: (2, 1, 7, 7), 3: None, 1: None}


def test_activations_that_are_computed_again_are_of_the_same_segments():
    """The backward pass goes through the layers when no segments are said any more."""
    model, adapter = causal("mistral, a window of 3")
    batch = Flat(next_tokens, more={"use_cache": False})(examples(LENGTHS))
    lengths = batch.pop("segments")
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with kept_apart(model):
            with segments(lengths):
                loss = model(**batch).loss
            found.append(gradients(adapter, loss))
    assert_same(*found)


def test_a_mask_of_other_rows_is_refused():
    model, _ = causal("llama, grouped heads")
    with (
        kept_apart(model),
        segments((3, 4)),
        pytest.raises(RuntimeError, match=r"7 tokens in all .* 2 rows of 7 tokens"),
    ):
        model(input_ids=torch.ones(2, 7, dtype=torch.long))


@pytest.mark.parametrize("config", [
    lambda: transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3),
    lambda: transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4,
                                     initializer_range=0.3),
])  # fmt: skip
def test_models_in_which_rows_would_see_each_other_are_padded_and_it_is_told(config):
    model = transformers.AutoModelForCausalLM.from_config(config()).double()
    step = packed(model, [Flat(next_tokens, more={"use_cache": False})], padded, kept_apart, examples((7, 3, 5)))
    assert step.gather is None
    assert "rows are padded to the longest of their batch" in step.note


def heads(config, **changes):
    torch.manual_seed(0)
    config.num_labels = 3
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    pad = config.pad_token_id
    flats = [Flat(lambda rows: {"labels": together(rows, pad)["labels"]}, begin) for begin in (0, pad + 1)]
    given = [{k: v for k, v in row.items() if k != "token_type_ids"} for row in rows()]
    return model, lambda: packed(model, flats, lambda rows: together(rows, pad), apart_with_firsts, given[:3])


SMOOTH = {**SMALL, "initializer_range": 0.02}


def test_positions_are_those_that_the_model_counts_in_half_precision_too():
    """Two places more or less change the answers of a head that has not learned by less than bfloat16's rounding."""
    model, step = heads(transformers.RobertaConfig(**SMOOTH | {"pad_token_id": 1}, **STILL, max_position_embeddings=40))
    with torch.no_grad():
        model.base_model.embeddings.position_embeddings.weight.mul_(0.01)
    model.bfloat16()
    assert step().gather.begin == 2


def test_a_slight_influence_of_other_rows_shows_in_half_precision_too():
    config = transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=24, dropout=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    step = packed(model, [Flat(next_tokens, more={"use_cache": False})], padded, kept_apart, examples((7, 3, 5)))
    assert step.gather is None


def test_a_head_that_says_of_all_rows_the_same_does_not_hide_that_they_see_each_other():
    """MobileBERT's embeddings are of a token and its neighbours."""
    model, step = heads(transformers.MobileBertConfig(**SMOOTH, **STILL, embedding_size=8, intra_bottleneck_size=16))
    torch.nn.init.zeros_(model.classifier.weight)
    assert "see each other" in step().note


def test_what_a_model_takes_is_seen_by_long_rows():
    """Of a row of one token the first is the mean of all."""
    given = [{"input_ids": [5] * n, "labels": [5] * n} for n in (1, 2, 1, 9, 1, 7, 30)]
    assert [len(each["input_ids"]) for each in probed(longest(given))] == [24, 9, 7]


def test_a_token_of_padding_within_a_row_has_the_position_that_the_model_gives_it():
    model, step = heads(transformers.RobertaConfig(**SMALL | {"pad_token_id": 1}, **STILL, max_position_embeddings=40))
    given = [{**row, "input_ids": row["input_ids"]} for row in rows()]
    ids = torch.tensor([given[0]["input_ids"]])
    ids[0, 2] = 1
    gather = step().gather
    batch = gather([{"input_ids": ids[0].tolist(), "labels": 0}])
    wanted = type(model.base_model.embeddings).create_position_ids_from_input_ids(ids, 1, 0)
    assert batch["position_ids"].tolist() == wanted.tolist()


def test_outside_of_a_training_the_model_is_what_it_was():
    model, _ = causal("llama, grouped heads")
    with kept_apart(model):
        assert model.config._attn_implementation != "sdpa"
        written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert model.config._attn_implementation == "sdpa"
    assert written.tolist() == model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist()


def test_models_of_one_configuration_end_in_any_order():
    model, _ = causal("llama, grouped heads")
    twin = type(model)(model.config)
    first, second = kept_apart(model), kept_apart(twin)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert model.config._attn_implementation != "sdpa"
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"


def test_an_attention_that_someone_put_in_sdpas_place_is_called():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, _ = causal("llama, grouped heads")
    own, called, ids = ALL_ATTENTION_FUNCTIONS["sdpa"], [], torch.tensor([[5, 6, 7, 5, 6]])
    ALL_ATTENTION_FUNCTIONS.register("sdpa", lambda *given, **named: called.append(1) or own(*given, **named))
    try:
        with kept_apart(model), segments((3, 2)):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", own)
    assert len(called) == 2 * model.config.num_hidden_layers


def test_what_a_model_is_put_into_may_not_change_what_rows_answer():
    """The rows alone are answered by the model as it is, in plain steps."""
    model, _ = causal("llama, grouped heads")

    @contextlib.contextmanager
    def around(model):
        with kept_apart(model):
            model.lm_head.weight.data.mul_(1.1)
            yield
            model.lm_head.weight.data.div_(1.1)

    step = packed(model, [Flat(next_tokens, more={"use_cache": False})], padded, around, examples((7, 3, 5)))
    assert step.gather is None


def test_what_is_not_of_each_token_is_not_put_behind_each_other():
    with pytest.raises(ValueError, match="pixels is not of each token"):
        Flat(of_tokens)([{"input_ids": [1, 2], "pixels": [1.0, 2.0, 3.0], "labels": [1, 2]}])
