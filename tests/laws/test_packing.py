"""Rows that are packed: the loss and the gradients are those of the padded rows, or the model is refused."""

import pytest
import torch
import transformers

import undula
from tests.support.models import shake
from undula.train.tasks.packing import Packer, check_apart, fitted

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "initializer_range": 0.3}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**WIDE),
    "mistral, a window of 3": lambda: transformers.MistralConfig(**WIDE, sliding_window=3),
    "qwen2": lambda: transformers.Qwen2Config(**WIDE),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0,
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=24, initializer_range=0.3),
}  # fmt: skip
LEAKY = {  # rows see each other, or positions are another's
    "mamba": lambda: transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4,
                                              initializer_range=0.3),
    "bloom": lambda: transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2,
                                              initializer_range=0.3),
}  # fmt: skip
LENGTHS = (7, 3, 1, 5, 2, 4)


def made(config, attention="sdpa"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()


def examples(lengths=LENGTHS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 40, (n,), generator=draw).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": [-100 if i % 3 == 1 else t for i, t in enumerate(ids)]} for ids in rows]


def padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([row[k] + [v] * (width - len(row[k])) for row in rows]) for k, v in fill.items()}
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {**batch, "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "one row"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_padded_rows(name, flat):
    model = made(MODELS[name]())
    adapter = undula.attach(model, undula.LoRA(r=2))
    shake(adapter.parameters())
    batches = [padded(examples()), Packer(0, flat)(examples())]
    assert batches[1]["input_ids"].numel() < batches[0]["input_ids"].numel()
    found = []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in adapter.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_is_the_same_by_another_attention():
    """transformers' own softmax is in single precision, whatever the model's."""
    model = made(MODELS["llama"](), "eager").float()
    with torch.no_grad():
        torch.testing.assert_close(model(**padded(examples())).loss, model(**Packer(0)(examples())).loss)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_keep_rows_apart_are_taken(name):
    check_apart(made(MODELS[name]()), 0, examples())


def test_experts_keep_rows_apart():
    config = transformers.MixtralConfig(**WIDE, num_local_experts=3, num_experts_per_tok=2)
    check_apart(made(config).float(), 0, examples())


@pytest.mark.parametrize("name", LEAKY)
def test_models_in_which_rows_would_see_each_other_are_refused(name):
    with pytest.raises(ValueError, match=r"cannot be trained on packed rows: .* Leave packing out"):
        check_apart(made(LEAKY[name](), "eager"), 0, examples())


def test_a_cache_would_mix_the_rows():
    """So the batch says that there is none: transformers tells rows apart by positions only then."""
    model = made(MODELS["llama"]())
    batch = Packer(0)(examples())
    assert batch["use_cache"] is False
    with torch.no_grad():
        assert not torch.allclose(model(**batch).loss, model(**batch | {"use_cache": True}).loss)


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_there_once_and_none_is_too_wide(seed):
    lengths = torch.randint(1, 30, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    bins = fitted(lengths, max(lengths))
    assert sorted(i for members in bins for i in members) == list(range(20))
    assert all(sum(lengths[i] for i in members) <= max(lengths) for members in bins)
    assert len(bins) <= 2 * -(-sum(lengths) // max(lengths))


def test_no_row_learns_its_first_token():
    """It would be predicted from another row's last."""
    rows = examples((3, 3, 2))
    batch = Packer(0, flat=True)(rows)
    starts = batch["position_ids"][0] == 0
    assert (batch["labels"][0][starts] == -100).all()
    assert int((batch["labels"] != -100).sum()) == sum(t != -100 for row in rows for t in row["labels"][1:])
