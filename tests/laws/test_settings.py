"""Where a model stands: compiled, wrapped, tied, with stacked experts, without its numbers, on several devices."""

import warnings

import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from undula import LoRA

from .test_host import IDS, Model

pytestmark = pytest.mark.usefixtures("float64")

transformers = pytest.importorskip("transformers")
TOKENS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])


def llama(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20,
        pad_token_id=0, bos_token_id=None, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["compiled", "parallel"])
def test_a_wrapped_model_has_the_names_of_the_model_within(wrap, tmp_path):
    """For choosing, for the head that is left out, and for what is written; every verb takes either."""
    model = Model()
    wrapped, base = wrap(model), model(IDS)
    adapter = shake(undula.attach(wrapped, LoRA(r=2)))
    assert next(iter(adapter.factors)) == "body.layers.0.q_proj"
    assert len(adapter.factors) == 4
    live = model(IDS)
    assert undula.selected(model) is undula.selected(wrapped) is adapter
    assert list(undula.adapters(wrapped)) == ["default"]
    adapter.save(tmp_path)
    again = Model()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if ".undula." not in k})
    undula.attach(again, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(again(IDS), live)
    undula.select(wrapped, None)
    torch.testing.assert_close(model(IDS), base)
    undula.select(wrapped, "default")
    with undula.rows(wrapped, ["default", None]):
        mixed = model(IDS)
    torch.testing.assert_close(mixed, torch.stack([live[0], base[1]]))
    done = undula.collapse(wrapped, undula.Truncate(1), held_out=[IDS])
    assert list(done.errors) == list(adapter.factors)
    assert len(undula.diagnose(wrapped, [IDS])) == 5
    undula.merge(wrapped)
    torch.testing.assert_close(model(IDS), live)
    undula.unmerge(wrapped)
    undula.detach(wrapped)
    undula.Switch(wrapped)(adapter)
    torch.testing.assert_close(model(IDS), live)


def test_copies_for_several_devices_say_what_to_do():
    """`nn.DataParallel`'s copies hold no parameters."""
    layer = nn.Linear(4, 4)
    undula.attach(nn.Sequential(layer), LoRA(r=2))
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        layer._replicate_for_data_parallel()(torch.randn(2, 4))


def test_a_sentence_encoder_is_told_where_its_adapters_go():
    """Its own reader calls the layers as the transformer within does."""

    class SentenceTransformer(nn.Sequential):
        pass

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(4, 4))

        @property
        def auto_model(self):
            return self.model

    encoder = SentenceTransformer(Part())
    with pytest.warns(UserWarning, match=r"Attach to model\[0\].auto_model"):
        undula.attach(encoder, LoRA(r=2))
    undula.detach(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undula.attach(encoder[0].auto_model, LoRA(r=2))


@pytest.mark.parametrize("where", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_into_one_of_two_tied_matrices_is_told_to_the_configuration(where, keep, tmp_path):
    """What ties weights afterwards leaves the merged one alone; unmerged, they are tied again."""
    model = llama(tied=True)
    base = model(TOKENS).logits
    shake(undula.attach(model, LoRA(r=2), [where]))
    live = model(TOKENS).logits
    undula.merge(model, keep=keep)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    torch.testing.assert_close(model(TOKENS).logits, live)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(TOKENS).logits, live)
    if keep:
        undula.unmerge(model)
        undula.detach(model)
        assert model.config.tie_word_embeddings is True
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model(TOKENS).logits, base)


def test_a_merge_under_peft_is_told_to_the_configuration_too():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(tied=True), undula.peft_config(LoRA(r=2), ["lm_head"])).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    live = model(TOKENS).logits
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    merged.tie_weights()
    torch.testing.assert_close(merged(TOKENS).logits, live)


def bart():
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}
    config = transformers.BartConfig(
        vocab_size=20, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=0, **sizes,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=20, decoder_start_token_id=0, pad_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [bart, t5])
@pytest.mark.parametrize("where", ["lm_head", "encoder.embed_tokens"])
def test_of_more_than_two_tied_matrices_a_merged_one_is_read_back(make, where, tmp_path):
    model = make()
    shake(undula.attach(model, LoRA(r=2), [where]))
    live = model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    undula.merge(model, keep=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(input_ids=TOKENS, decoder_input_ids=TOKENS).logits, live)


@pytest.mark.parametrize("make", [bart, t5])
def test_an_embedding_that_is_only_tied_to_others_is_refused(make):
    """Encoder and decoder look up in their own: an adapter on `shared` would do nothing."""
    with pytest.raises(TypeError, match=r"shared .*look up in embeddings of their own"):
        undula.attach(make(), LoRA(r=2), ["shared"])


def test_a_merge_elsewhere_leaves_tied_matrices_tied():
    model = llama(tied=True)
    shake(undula.attach(model, LoRA(r=2)))
    undula.merge(model)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("full", ["lm_head", "embed_tokens"])
def test_what_is_tied_trains_in_full_as_one(full, tmp_path):
    """By either name, with the gradient of both uses; saved, loaded, selected and merged it stays one."""
    plain = llama(tied=True)
    plain(TOKENS, labels=TOKENS).loss.backward()
    model = llama(tied=True)
    adapter = undula.attach(model, LoRA(r=2), ["q_proj"], full=[full])
    assert set(adapter.full) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert adapter.num_parameters() == 2 * 2 * 16 + 20 * 16
    model(TOKENS, labels=TOKENS).loss.backward()
    torch.testing.assert_close(adapter.full["lm_head.weight"].grad, plain.lm_head.weight.grad)
    shake(adapter)
    live = model(TOKENS).logits
    adapter.save(tmp_path)
    again = llama(tied=True)
    loaded = undula.attach(again, undula.Adapter.load(tmp_path))
    assert loaded.full["lm_head.weight"] is loaded.full["model.embed_tokens.weight"] is again.lm_head.weight
    torch.testing.assert_close(again(TOKENS).logits, live)
    undula.select(again, None)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    undula.select(again, "default")
    undula.merge(again, keep=False)
    assert again.config.tie_word_embeddings is True
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(TOKENS).logits, live)


def test_stacked_experts_are_told():
    """They are parameters and no layers: most of such a model's weights, which only who names them pays for."""
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=20, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with pytest.warns(UserWarning, match=r"left out of where='all-linear': .*mlp\.experts \(a MixtralExperts keeps"):
        adapter = undula.attach(model, LoRA(r=2))
    assert {n.rpartition(".")[2] for n in adapter.factors} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    undula.detach(model)
    adapter = undula.attach(model, LoRA(r=2), "*.experts.gate_up_proj")
    assert list(adapter.factors) == [f"model.layers.0.mlp.experts.gate_up_proj.{i}" for i in range(3)]
    with pytest.raises(LookupError, match=r"It names parameters \(model.norm.weight\), which no adapter acts on"):
        undula.attach(model, LoRA(r=2), "model.norm.weight", name="b")


def test_positions_are_no_stack():
    """A vision transformer's are (1, N, D)."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undula.attach(transformers.ViTModel(config), LoRA(r=2))


@pytest.mark.parametrize("method", [LoRA(r=2), undula.DoRA(LoRA(r=2)), undula.AuroRA(r=2)], ids=repr)
def test_a_layer_without_numbers_is_refused(method):
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=r"body.layers.0.q_proj is on the meta device.*load the model's weights first"):
        undula.attach(model, method)
    assert undula.adapters(model) == {}


@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("host", ["attach", "load", "peft"])
def test_an_offloaded_layer_is_refused(to, host, tmp_path):
    """Between its calls its weight is nowhere."""
    accelerate = pytest.importorskip("accelerate")
    model = llama(tied=False)
    given = undula.attach(llama(tied=False), LoRA(r=2), ["q_proj"])
    if to == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    peft = pytest.importorskip("peft")
    put = {
        "attach": lambda: undula.attach(model, LoRA(r=2), ["q_proj"]),
        "load": lambda: undula.attach(model, given),
        "peft": lambda: peft.get_peft_model(model, undula.peft_config(LoRA(r=2), ["q_proj"])),
    }
    with pytest.raises(ValueError, match=r"the weight of .*q_proj is offloaded"):
        put[host]()


def test_factors_that_change_within_rows_are_seen():
    """Without gradients the stacked pairs are kept only while the factors stay."""
    model = Model().eval()
    adapter = shake(undula.attach(model, LoRA(r=2), name="a"))
    with torch.no_grad(), undula.rows(model, ["a", "a"]):
        before = model(IDS)
        for p in adapter.parameters():
            p.mul_(2)
        after = model(IDS)
    assert not torch.equal(before, after)
    undula.select(model, "a")
    torch.testing.assert_close(after, model(IDS))
