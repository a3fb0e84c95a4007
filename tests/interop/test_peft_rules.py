"""PEFT's rules for undula's configurations: honoured as for PEFT's LoRA, or refused by name with nothing changed."""

import copy
import re

import peft
import pytest
import torch
import transformers
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import undula
from tests.support.models import Picture, gpt2, hosted, llama, shake, sites, tokens, trained
from undula import (
    AuroRA,
    AuroRAStatic,
    Centred,
    DoRA,
    LoRA,
    LoRAN,
    Method,
    VeRA,
)


def state(model):
    """What a refused call must leave: keys, classes, objects, what trains, which adapters."""
    configs = dict(getattr(model, "peft_config", {}) or {})
    modules = [(n, type(m), id(m)) for n, m in model.named_modules()]
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    return list(model.state_dict()), modules, parameters, sorted(configs), getattr(model, "active_adapters", None)


# The same layers and the same errors as PEFT's LoRA

RULES = [
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": {"up_proj"}, "layers_to_transform": (0,)},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "down_proj"]},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_layers_are_those_of_pefts_lora(rules):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, **rules)).base_model.targeted_module_names
    ours = peft.get_peft_model(llama(), undula.peft_config(LoRA(r=2), **rules)).base_model.targeted_module_names
    assert ours == theirs


REFUSED = [
    {"target_modules": "all-linear", "layers_to_transform": [0]},
    {"target_modules": r".*q_proj", "layers_to_transform": 1},
    {"target_modules": "all-linear", "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "task_type": "CAUSAL"},
]


@pytest.mark.parametrize("rules", REFUSED, ids=str)
def test_what_pefts_lora_refuses_is_refused(rules):
    with pytest.raises(ValueError, match=r"cannot|must|task type") as theirs:
        peft.LoraConfig(**rules)
    with pytest.raises(ValueError, match=re.escape(str(theirs.value)[:60])):
        undula.peft_config(LoRA(), **rules)


def test_a_default_target_is_not_a_list():
    with pytest.raises(ValueError, match=r"`layers_to_transform` cannot.*give a list of names"):
        undula.peft_config(LoRA(), layers_to_transform=[0])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"modules_to_save": "lm_head"}, "modules_to_save is a list of names"),
        ({"target_modules": [1]}, "target_modules is a list of names"),
        ({"target_modules": ["q_proj"], "layers_to_transform": ["0"]}, "layers_to_transform is a number"),
    ],
)
def test_rules_that_would_choose_nothing(rules, message):
    with pytest.raises(TypeError, match=message):
        undula.peft_config(LoRA(), **rules)


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ({"bias": "all"}, "modules_to_save"),
        ({"bias": "lora_only"}, "modules_to_save"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_modules"),
        ({"trainable_token_indices": [1, 2]}, "embed_tokens"),
        ({"rank_pattern": {"q_proj": 2}}, "overrides"),
        ({"lora_dropout": 0.1}, r"undula\.Dropout"),
        ({"r": 4}, r"undula\.LoRA"),
        ({"use_dora": True}, r"undula\.DoRA"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
    ],
    ids=str,
)
def test_options_of_peft_that_are_not_here_say_what_to_do(option, advice):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.*{advice}"):
        undula.peft_config(LoRA(), **option)
    config = undula.peft_config(LoRA(r=2), ["q_proj"])
    if hasattr(config, name):  # set behind the back of the constructor
        setattr(config, name, option[name])
        model = llama()
        before = state(model)
        with pytest.raises(ValueError, match=name):
            peft.get_peft_model(model, config)
        assert state(model) == before
    with pytest.raises(TypeError, match="no option 'rnak'"):
        undula.peft_config(LoRA(), rnak=4)


def test_inference_mode_is_honoured():
    assert not trained(peft.get_peft_model(llama(), undula.peft_config(LoRA(r=2), inference_mode=True)))


@pytest.mark.parametrize("method", [LoRA(r=3), Centred(AuroRAStatic()), DoRA(LoRA(r=2))], ids=repr)
def test_a_configuration_that_no_model_has_can_be_written(method, tmp_path):
    """Frameworks log `to_dict()` before there is a model; the directory gives the configuration back."""
    config = undula.peft_config(method, ["q_proj"], overrides={"*.0.*": LoRAN(r=1)}, exclude_modules=["x"])
    assert config.to_dict()["method"] == method.encode()
    config.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert (again.method, again.overrides) == (method, config.overrides)
    assert sites(peft.get_peft_model(llama(), again)) == sites(peft.get_peft_model(llama(), config))


# A refused call changes nothing


def lora(targets, **rules):
    return undula.peft_config(LoRA(r=2), targets, **rules)


REFUSALS = {
    "everything excluded": (lora(["o_proj"], exclude_modules=["o_proj"]), NoMatchingPeftModuleError),
    "no such layer": (lora(["nothing"]), NoMatchingPeftModuleError),
    "no such index": (lora(["q_proj"], layers_to_transform=[7]), NoMatchingPeftModuleError),
    "a norm": (lora(["norm"]), TypeError),
    "an override": (lora(["q_proj"], overrides={"v_proj": LoRAN()}), LookupError),
    "data": (undula.peft_config(undula.LoRASB(r=2), ["q_proj"]), RuntimeError),
    "heads": (undula.peft_config(undula.S2FT(unit=7), ["q_proj"]), ValueError),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_adapter_leaves_the_model_alone(name, first):
    config, error = REFUSALS[name]
    model = llama() if first else hosted(LoRA(r=2), target_modules=["q_proj"])
    before = state(model)
    with pytest.raises(error):
        peft.get_peft_model(model, config) if first else model.add_adapter("b", config)
    assert state(model) == before


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_in_transformers_own_way_can_be_tried_again(name):
    config, error = REFUSALS[name]
    model = llama()
    before = state(model)
    with pytest.raises(error):
        model.add_adapter(config, "b")
    assert state(model) == before
    model.add_adapter(lora(["q_proj"]), "b")
    with pytest.raises(error):
        model.add_adapter(config, "c")
    assert list(model.peft_config) == ["b"]


def test_what_peft_refuses_late_is_undone(monkeypatch):
    """PEFT copies heads after it has replaced layers; an error there leaves neither."""
    model = hosted(LoRA(r=2), target_modules=["q_proj"])
    before = state(model)

    def broken(*args, **kwargs):
        raise RuntimeError("late")

    monkeypatch.setattr(peft.tuners.tuners_utils, "set_additional_trainable_modules", broken)
    with pytest.raises(RuntimeError, match="late"):
        model.add_adapter("b", lora(["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    assert state(model) == before


# Injection by the keys of a state_dict


def test_injection_follows_the_state_dict():
    """Layers outside of the rules, or fewer: PEFT warns of the difference, the state_dict decides."""
    full = peft.get_peft_model_state_dict(peft.inject_adapter_in_model(lora(["q_proj", "o_proj"]), llama()))
    for rules, warns in ((["q_proj"], True), (["q_proj", "o_proj", "v_proj"], True), (["q_proj", "o_proj"], False)):
        model = llama()
        if warns:
            with pytest.warns(RuntimeWarning, match="an inconsistency was discovered"):
                peft.inject_adapter_in_model(lora(rules), model, state_dict=full)
        else:
            peft.inject_adapter_in_model(lora(rules), model, state_dict=full)
        assert len(sites(model)) == 4
        peft.set_peft_model_state_dict(model, full)
        found = peft.get_peft_model_state_dict(model)
        assert all(torch.equal(found[k], t) for k, t in full.items())
    with pytest.raises(ValueError, match=r"tensors for model.layers.9.q_proj, which this model does not know"):
        peft.inject_adapter_in_model(
            lora(["q_proj"]), llama(), state_dict={"model.layers.9.q_proj.undula_factors.A": 0}
        )


# Layers that are not called


@pytest.mark.parametrize("targets", [["out_proj"], ["dt_proj"], ["x_proj", "in_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("method", [LoRA(r=2), AuroRA()], ids=repr)
def test_layers_whose_weight_mamba_reads(targets, method):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 32, "time_step_rank": 2}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    before = state(model)
    with pytest.raises(ValueError, match=r"incompatible with Mamba-based models.*exclude_modules"):
        peft.get_peft_model(model, undula.peft_config(method, targets))
    assert state(model) == before
    peft.get_peft_model(model, undula.peft_config(method, exclude_modules=["out_proj", "dt_proj", "x_proj"]))


def test_torchs_own_attention_and_its_fast_path():
    """In evaluation torch's encoder reads the weights of layers that have no hook."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model, x = nn.Sequential(nn.TransformerEncoder(layer, 1)), torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match=r"'0.layers.0.self_attn.out_proj' is incompatible.*exclude_modules"):
        peft.get_peft_model(model, undula.peft_config(LoRA(r=2)))
    model = peft.get_peft_model(model, undula.peft_config(LoRA(r=2), ["linear1", "linear2"]))
    shake(trained(model).values())
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    encoder = model.base_model.model[0]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x))
        got, want = (m(x, src_key_padding_mask=padding)[~padding] for m in (encoder.eval(), encoder.train()))
        torch.testing.assert_close(got, want)


# Types


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "method",
    [m() for m in Method.registry.values() if m.__name__ not in ("Dropout", "Sum", "Centred", "LoRASB")],
    ids=repr,
)
def test_factors_in_the_type_of_the_base(method, dtype, tmp_path):
    """`autocast_adapter_dtype=False`: kept so through forward, backward, saving and loading; True: float32."""
    config, x = undula.peft_config(method, ["q_proj", "v_proj"]), tokens()
    model = peft.get_peft_model(llama().to(dtype), config, autocast_adapter_dtype=False).eval()
    assert {p.dtype for p in trained(model).values()} == {dtype}
    loss = model(x, labels=x).loss
    loss.backward()
    assert torch.isfinite(loss)
    model.save_pretrained(tmp_path)
    for wanted, autocast in ((dtype, False), (torch.float32, True)):
        options = {"autocast_adapter_dtype": autocast, "is_trainable": True}
        again = peft.PeftModel.from_pretrained(llama().to(dtype), tmp_path, **options)
        assert {p.dtype for p in trained(again).values()} == {wanted}
        assert len(trained(again)) == len(trained(model))  # what layers share is still shared
    model.add_adapter("wide", undula.peft_config(LoRA(r=2)))
    assert {p.dtype for n, p in model.named_parameters() if ".wide." in n} == {torch.float32}


# Tools of PEFT's


def test_groups_for_loraplus():
    for model in (hosted(DoRA(LoRA(r=2)), target_modules=["q_proj"]), llama()):
        if not isinstance(model, peft.PeftModel):
            undula.attach(model, undula.Sum((LoRA(r=2), LoRA(r=2)), (1.0, 1.0)), ["q_proj"])
        slow, fast = undula.loraplus_groups(model, lr=1e-3, ratio=8.0)
        assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
        assert {p.shape for p in fast["params"]} == {(32, 2)}
        assert len(slow["params"]) + len(fast["params"]) == len(trained(model))
        torch.optim.AdamW([slow, fast])
    model = llama()
    undula.attach(model, LoRA(r=2), ["q_proj"])
    model.B = torch.nn.Parameter(torch.zeros(3))  # the model's own, and no factor
    slow, fast = undula.loraplus_groups(model, lr=1e-3)
    assert any(p is model.B for p in slow["params"])
    with pytest.raises(ValueError, match="nothing that trains in this model is one"):
        undula.loraplus_groups(hosted(undula.SHiRA(r=1), target_modules=["q_proj"]), lr=1e-3)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_conversion_to_lora(make):
    """PEFT's own, by the update itself; a method without one is refused."""
    model, x = hosted(AuroRAStatic(r=2), model=make()), tokens()
    config, tensors = peft.convert_to_lora(model, rank=2)
    plain = peft.get_peft_model(make(), config).eval()
    peft.set_peft_model_state_dict(plain, tensors)
    torch.testing.assert_close(plain(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)
    for method in (AuroRA(), DoRA(LoRA(r=2))):
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            peft.convert_to_lora(hosted(method), rank=2)


def test_what_peft_keeps_for_its_own_lora_is_refused_by_name(tmp_path):
    model = hosted(LoRA(r=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"0.5 \* a \+ 0.5 \* b"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="UNDULA was passed"):
        hotswap_adapter(model, str(tmp_path), "default")
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`"),
        peft.helpers.rescale_adapter_scale(model, 0.5),
    ):
        pass
    with pytest.raises(ValueError, match=r"UNDULA.*not compatible"):
        peft.get_peft_model(llama(), lora(["q_proj"]), mixed=True)


@pytest.mark.parametrize("method", [DoRA(LoRA(r=2)), AuroRA()], ids=repr)
def test_adapters_that_cannot_add_up_are_refused_when_they_are_chosen(method):
    model = hosted(LoRA(r=2), name="a", target_modules=["q_proj"])
    model.add_adapter("b", undula.peft_config(method, ["q_proj"]))
    before = state(model)
    with pytest.raises(ValueError, match="a, b cannot be active together: 'b' is"):
        model.base_model.set_adapter(["a", "b"])
    assert state(model) == before
    model.add_adapter("c", undula.peft_config(method, ["v_proj"]))
    model.base_model.set_adapter(["a", "c"])  # nowhere together
    model(tokens())


def test_features_of_every_kind_of_layer():
    model = hosted(LoRA(r=2), model=Picture(), target_modules=["conv", "middle"])
    assert (model.base_model.model.conv.in_features, model.base_model.model.conv.out_features) == (3, 8)
    table = hosted(LoRA(r=2), target_modules=["embed_tokens"]).base_model.model.model.embed_tokens
    assert (table.in_features, table.out_features) == (64, 32)


def test_a_layer_at_two_places_is_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = self.b = nn.Linear(6, 6)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model, x = peft.get_peft_model(Twice(), undula.peft_config(LoRA(r=2), ["a"])), torch.randn(3, 6)
    shake(trained(model).values())
    y = model(x)
    assert len(trained(model)) == 2
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), y)
    assert torch.equal(model.unload()(x), Twice()(x))


def test_shared_factors_stay_shared_in_another_type():
    model = peft.get_peft_model(
        llama().bfloat16(), undula.peft_config(VeRA(r=3), ["q_proj"]), autocast_adapter_dtype=False
    )
    A = [layer.law(["default"])[1]["A"] for layer in model.modules() if hasattr(layer, "law")]
    assert len({t.data_ptr() for t in A}) == 1
