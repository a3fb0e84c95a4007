"""Padding counts in nothing that is measured on data: every layer gets the mask of the sequence that it really sees."""

import warnings

import pytest
import torch
import transformers
from torch import nn

import undula
from undula import AuroRA, Centred, LeastSquares, LoRA, collapse
from undula.observe.padding import matched
from undula.starts import EVA

ROWS, LENGTH, VOCABULARY = 8, 12, 40
SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 1,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def opt():
    """Flattens (rows, positions, channels) before fc1."""
    config = transformers.OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
    return transformers.OPTForCausalLM(config), ("fc1", "fc2", "q_proj")


def moe():
    """The shared expert sees all tokens in one row."""
    config = transformers.Qwen2MoeConfig(**SIZES, intermediate_size=48, moe_intermediate_size=16, num_experts=2,
        shared_expert_intermediate_size=48, num_experts_per_tok=1, num_key_value_heads=2)  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config), ("shared_expert.gate_proj", "shared_expert.down_proj")


def bert():
    config = transformers.BertConfig(**SIZES, intermediate_size=48)
    return transformers.BertForMaskedLM(config), ("query", "intermediate.dense")


def one(site):
    return [f"*{site}"]


def fill(adapter):
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.2)


def text(seed, mask):
    """Token ids that agree for all seeds where nothing is padding."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    return torch.where(mask, ids, noise)


def ended(lengths):
    return torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


HALF = ended([6] * ROWS)


def causal(seed):
    return {"input_ids": text(seed, HALF), "attention_mask": HALF.long()}


MODELS = [(make, site) for make in (opt, moe, bert) for site in make()[1]]
each = pytest.mark.parametrize(("make", "site"), MODELS, ids=[f"{m.__name__}-{s}" for m, s in MODELS])


def adapted(make, method, site, **options):
    torch.manual_seed(0)
    model, _ = make()
    adapter = undula.attach(model.eval(), method, one(site), **options)
    fill(adapter)
    return model, adapter


@each
def test_ids_at_padding_positions_move_no_fit_and_no_error(make, site):
    model, _ = adapted(make, AuroRA(), site)
    found = []
    for seed in (1, 2):
        made = collapse(model, LeastSquares(2, [causal(seed)]), held_out=[causal(seed)])
        found.append((made.adapter.delta(next(iter(made.errors))), torch.tensor([*made.errors.values(), made.error])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


@each
def test_nor_a_diagnosis_nor_evas_directions(make, site):
    model, _ = adapted(make, AuroRA(), site)
    a, b = (undula.diagnose(model, [causal(seed)])[0]["nonlinearity"] for seed in (1, 2))
    assert a == pytest.approx(b, rel=1e-3)
    starts = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model, _ = make()
        adapter = undula.attach(model.eval(), Centred(LoRA(r=2), EVA()), one(site), probe=undula.Probe([causal(seed)]))
        A = next(iter(adapter.factors.values()))["A"].detach()
        starts.append(A.T @ A)
    torch.testing.assert_close(*starts, rtol=1e-3, atol=1e-4)


# Two sequences in one model, of one length


def t5(seed, source, target):
    """A T5 and a batch whose two sequences are padded differently."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2,
                                   pad_token_id=0, decoder_start_token_id=0)  # fmt: skip
    batch = {"input_ids": text(seed, source), "attention_mask": source.long()}
    batch |= {"decoder_input_ids": text(seed + 10, target), "decoder_attention_mask": target.long()}
    return transformers.T5ForConditionalGeneration(config).eval(), batch


def bart(seed, source, target):
    torch.manual_seed(0)
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0,
        max_position_embeddings=64)  # fmt: skip
    batch = {"input_ids": text(seed, source), "attention_mask": source.long()}
    batch |= {"decoder_input_ids": text(seed + 10, target), "decoder_attention_mask": target.long()}
    return transformers.BartForConditionalGeneration(config).eval(), batch


class Two(nn.Module):
    """An encoder and a decoder that reads it, of plain torch."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"embed": nn.Embedding(VOCABULARY, 32), "body": nn.Linear(32, 32)})
        self.encoder.forward = lambda ids: torch.tanh(self.encoder["body"](self.encoder["embed"](ids)))
        self.decoder = Reader()

    def forward(self, input_ids, decoder_input_ids, attention_mask, decoder_attention_mask):
        return self.decoder(decoder_input_ids, self.encoder(input_ids), attention_mask)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, 32), nn.LayerNorm(32)
        self.read, self.own, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, ids, states, seen):
        values = self.read(self.norm(states)) * seen[..., None]
        return self.head(torch.tanh(self.own(self.embed(ids)) + values.mean(1, keepdim=True)))


def plain(seed, source, target):
    torch.manual_seed(0)
    batch = {"input_ids": text(seed, source), "attention_mask": source.long()}
    batch |= {"decoder_input_ids": text(seed + 10, target), "decoder_attention_mask": target.long()}
    return Two().eval(), batch


SOURCE, TARGET = ended([6] * ROWS), ended([9] * ROWS)
TWO = [
    (t5, "encoder.block.0.layer.0.SelfAttention.q", "source"),
    (t5, "encoder.block.0.layer.1.DenseReluDense.wi", "source"),
    (t5, "decoder.block.0.layer.0.SelfAttention.q", "target"),
    (t5, "decoder.block.0.layer.1.EncDecAttention.q", "target"),
    (t5, "decoder.block.0.layer.1.EncDecAttention.k", "source"),
    (t5, "decoder.block.0.layer.1.EncDecAttention.v", "source"),
    (t5, "decoder.block.0.layer.2.DenseReluDense.wo", "target"),
    (t5, "lm_head", "target"),
    (bart, "model.encoder.layers.0.fc1", "source"),
    (bart, "model.decoder.layers.0.encoder_attn.k_proj", "source"),
    (bart, "model.decoder.layers.0.encoder_attn.q_proj", "target"),
    (bart, "model.decoder.layers.0.fc2", "target"),
    (plain, "encoder.body", "source"),
    (plain, "decoder.read", "source"),
    (plain, "decoder.own", "target"),
    (plain, "decoder.head", "target"),
]


@pytest.mark.parametrize(("make", "site", "sees"), TWO, ids=[f"{m.__name__}-{s}" for m, s, _ in TWO])
def test_every_layer_gets_the_mask_of_the_sequence_that_it_sees(make, site, sees):
    """Both sequences are 12 long.  The number of positions that a site's moments hold tells whose padding was left out,
    and no id at a padding position of either moves the fit."""
    fits = []
    for seed in (1, 2):
        model, batch = make(seed, SOURCE, TARGET)
        adapter = undula.attach(model, LoRA(r=4), [site])
        fill(adapter)
        way = LeastSquares(2, [batch])
        assert way._accumulate(model, adapter, [site], "")[site].count == int(
            {"source": SOURCE, "target": TARGET}[sees].sum()
        )
        made = collapse(model, way, held_out=[batch])
        fits.append((made.adapter.delta(site), torch.tensor([made.errors[site], made.error])))
    torch.testing.assert_close(fits[0], fits[1], rtol=1e-3, atol=1e-5)


def test_a_decoder_without_a_mask_takes_none_of_the_encoder_and_labels_tell_its_padding():
    model, batch = t5(1, SOURCE, TARGET)
    del batch["decoder_attention_mask"]
    site = "decoder.block.0.layer.0.SelfAttention.q"
    adapter = undula.attach(model, LoRA(r=4), [site])
    assert LeastSquares(2, [batch])._accumulate(model, adapter, [site], "")[site].count == ROWS * LENGTH
    labels = torch.where(TARGET, batch.pop("decoder_input_ids"), -100)
    count = LeastSquares(2, [batch | {"labels": labels}])._accumulate(model, adapter, [site], "")[site].count
    assert count == int(TARGET.sum())


class Routed(nn.Module):
    """Sends half of the tokens through one layer, as a router does."""

    def __init__(self):
        super().__init__()
        self.embed, self.expert = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask):
        h = self.embed(input_ids).flatten(0, 1)
        h[::2] = self.expert(h[::2])
        return h.view(*input_ids.shape, -1)


def test_where_padding_cannot_be_told_it_is_said():
    model, batch = Routed().eval(), causal(1)
    fill(undula.attach(model, LoRA(r=2), ["expert"]))
    with pytest.warns(UserWarning, match=r"padding counts at expert: it sees values at \(48,\) positions"):
        collapse(model, LeastSquares(2, [batch]))
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collapse(model, LeastSquares(2, [batch]))


def test_masks_fit_every_layout():
    mask = ended([3, 12, 5, 1, 7, 7, 7, 7])
    for positions in ((8, 12), (96,), (1, 96)):
        assert torch.equal(matched(mask, torch.Size(positions)), mask.flatten())
    assert torch.equal(matched(mask, torch.Size((12, 8))), mask.T.flatten())
    assert torch.equal(matched(mask, torch.Size((8, 12, 2))), mask.flatten().repeat_interleave(2))
    assert matched(mask, torch.Size((48,))) is None
