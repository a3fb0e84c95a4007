"""Plain LoRA as the common language: PEFT's own LoRA and DoRA against undula's, and directories in both directions."""

import copy
import dataclasses
import re
from collections import OrderedDict

import peft
import pytest
import torch
from safetensors.torch import load_file

import undula
from tests.support.models import Picture, gpt2, llama, shake, tokens, trained
from undula import (
    AuroRAStatic,
    Centred,
    DoRA,
    Dropout,
    LoRA,
    Sum,
)
from undula.io.sites import Opened
from undula.starts import Gaussian

LINEAR = ("q_proj", "v_proj", "down_proj")
LOW_RANK = [
    LoRA(r=3),
    LoRA(r=4, scaling=undula.RankStabilised()),
    AuroRAStatic(r=2),
    Centred(LoRA(r=2), Gaussian(0.1)),
    Dropout(LoRA(r=2), 0.5),
    Sum((LoRA(r=2), LoRA(r=3)), (0.5, -2.0)),
]
THEIRS = {
    "LoRA": {"r": 4, "lora_alpha": 8},
    "rsLoRA": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "DoRA": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "rsLoRA and patterns": {"r": 4, "use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 3}},
    "PiSSA's shape": {"r": 4, "init_lora_weights": "gaussian"},
    "dropout": {"r": 4, "lora_dropout": 0.5},
    "one block": {"r": 2, "layers_to_transform": [1]},
    "all but one": {"r": 2, "exclude_modules": ["v_proj"]},
}


def theirs(model, targets, **options):
    """PEFT's own LoRA, away from its start."""
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), **options)).eval()
    shake(trained(model).values())
    return model


@pytest.mark.parametrize("method", LOW_RANK, ids=repr)
def test_exported_adapters_are_pefts_own(method, tmp_path):
    """What `export_lora` writes, PEFT loads as the LoRA that it knows: same logits, same merged model."""
    x, own = tokens(), llama()
    adapter = undula.attach(own, method, list(LINEAR), overrides={"*.0.*.q_proj": LoRA(r=5)})
    shake(adapter.parameters())
    undula.io.export_lora(adapter, tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert type(model.base_model) is peft.LoraModel
    torch.testing.assert_close(model(x).logits, own(x).logits)
    undula.merge(own)
    torch.testing.assert_close(model.merge_and_unload()(x).logits, own(x).logits)


@pytest.mark.parametrize("method", LOW_RANK, ids=repr)
def test_an_exported_pair_is_the_adapters_to_the_bit(method, tmp_path):
    """In the file: no product, no rounding, a scale of one."""
    model = llama()
    adapter = undula.attach(model, method, ["q_proj"])
    shake(adapter.parameters())
    undula.io.export_lora(adapter, tmp_path, base="b")
    found = load_file(tmp_path / "adapter_model.safetensors")
    for site, m in adapter.methods.items():
        B_OR, A_RI = m.pair(adapter.factors[site])
        assert torch.equal(found.pop(f"base_model.model.{site}.lora_A.weight"), A_RI)
        assert torch.equal(found.pop(f"base_model.model.{site}.lora_B.weight"), B_OR)
    assert not found
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.lora_alpha, config.alpha_pattern, config.use_rslora) == (config.r, config.rank_pattern, False)


@pytest.mark.parametrize("export", [False, True], ids=["own", "plain"])
def test_a_colleagues_three_lines_stand_in_the_readme_and_run(export, tmp_path):
    """With undula, and of a plain LoRA without it."""
    x, model = tokens(), llama()
    adapter = undula.attach(model, LoRA(r=2), ["q_proj"])
    shake(adapter.parameters())
    undula.io.export_lora(adapter, tmp_path) if export else adapter.save(tmp_path)
    lines = re.findall(r"^```python\n(.*?)^```$", (tmp_path / "README.md").read_text(), re.M | re.S)
    assert [("peft" in block, "undula" in block) for block in lines] == [(True, False)] * export + [(False, True)]
    for block in lines:
        assert block.count("\n") == 3
        names = {"model": llama(), "here": str(tmp_path)}
        exec(compile(block, "README", "exec"), names)
        torch.testing.assert_close(names["model"](x).logits, model(x).logits)


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_pefts_own_adapters_load(options, tmp_path):
    x, model = tokens(), theirs(llama(), LINEAR, **options)
    model.save_pretrained(tmp_path)
    own = llama()
    adapter = undula.attach(own, undula.Adapter.load(tmp_path))
    assert adapter.num_parameters() == sum(p.numel() for p in trained(model).values())
    torch.testing.assert_close(own(x).logits, model(x).logits)
    undula.merge(own)
    torch.testing.assert_close(own(x).logits, model.merge_and_unload()(x).logits)


@pytest.mark.parametrize("dora", [False, True])
def test_conv1d(dora, tmp_path):
    x, model = tokens(), theirs(gpt2(), ["c_attn", "c_fc"], r=4, fan_in_fan_out=True, use_dora=dora)
    model.save_pretrained(tmp_path)
    own = gpt2()
    undula.attach(own, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(own(x).logits, model(x).logits)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"r": 4, "lora_alpha": 8}, LoRA(r=4, alpha=8.0)),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, LoRA(r=4, alpha=8.0, scaling=undula.RankStabilised())),
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, DoRA(LoRA(r=4, alpha=8.0))),
    ],
    ids=["LoRA", "rsLoRA", "DoRA"],
)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradients_are_pefts(options, method, make, tmp_path):
    """The oracle of LoRA, rsLoRA and DoRA: the same loss and gradients as PEFT's, on the same factors."""
    x, targets = tokens(), LINEAR if make is llama else ("c_attn", "c_fc")
    model = theirs(make().double(), targets, fan_in_fan_out=make is gpt2, **options)
    for p in trained(model).values():
        p.data = p.data.double()
    loss = model(x, labels=x).loss
    loss.backward()
    hosted = peft.get_peft_model(make().double(), undula.peft_config(method, list(targets))).eval()
    wanted = {}
    for name, p in trained(model).items():
        site, _, rest = name.partition(".lora_")
        factor = {"A": "A", "B": "B", "m": "m"}[rest[0]]
        wanted[f"{site}.undula_factors.default.{factor}"] = p
    assert set(wanted) == set(trained(hosted))
    for name, p in trained(hosted).items():
        p.data = wanted[name].detach().reshape(p.shape).clone()
    again = hosted(x, labels=x).loss
    again.backward()
    torch.testing.assert_close(again, loss)
    for name, p in trained(hosted).items():
        assert p.grad.any()
        torch.testing.assert_close(p.grad, wanted[name].grad.reshape(p.shape))


@pytest.mark.parametrize(("bias", "more"), [("lora_only", {}), ("all", {}), ("all", {"modules_to_save": ["ln_f"]})])
def test_biases_that_were_trained_beside_are_read(bias, more, tmp_path):
    """They stand in the file as they are after the training: parameters in full.  Those of
    `modules_to_save` stand there under the names of PEFT's wrapper too."""
    x, model = tokens(), theirs(gpt2(), ["c_attn"], r=2, bias=bias, fan_in_fan_out=True, **more)
    model.save_pretrained(tmp_path)
    own = gpt2()
    adapter = undula.attach(own, undula.Adapter.load(tmp_path))
    assert "transformer.h.0.attn.c_attn.bias" in adapter.full
    with Opened(tmp_path) as opened:
        assert set(opened.outline.full) == set(adapter.full)
        assert all(torch.equal(opened.parameter(n), t) for n, t in undula.Adapter.load(tmp_path).full.items())
    torch.testing.assert_close(own(x).logits, model(x).logits)


def test_a_bias_of_the_loras_goes_into_the_layers_own(tmp_path):
    """`lora_bias`: s b_B is added to what the layer adds, which only the base knows; without one it says how much is
    lost."""
    x, model = tokens(), theirs(gpt2(), ["c_attn", "c_fc"], r=2, lora_bias=True, use_rslora=True, fan_in_fan_out=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has lora_bias=True.*undula\.io\.load_for\(path, model\)"):
        undula.Adapter.load(tmp_path)
    assert undula.io.inspect(tmp_path).use == "import"
    own = gpt2()
    undula.attach(own, undula.io.load_for(tmp_path, own))
    torch.testing.assert_close(own(x).logits, model(x).logits)
    theirs(llama(), ["q_proj"], r=2, lora_bias=True).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"at 2 layers that have none .* off by vectors of norm \d+\.\d+ at most"):
        undula.io.load_for(tmp_path / "none", llama())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[5, 1], {"embed_tokens": [5, 1]}], ids=["list", "by name"])
def test_trained_tokens_are_rows_of_the_bases_table(tied, indices, tmp_path):
    """PEFT keeps the rows alone, and gives them to a tied head too."""
    x = tokens()
    model = theirs(llama(tie_word_embeddings=tied), ["q_proj"], r=2, trainable_token_indices=indices)
    assert {1, 5} <= set(x.flatten().tolist())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    own = llama(tie_word_embeddings=tied)
    adapter = undula.attach(own, undula.io.load_for(tmp_path, own))
    assert len(adapter.full) == 1 + tied
    torch.testing.assert_close(own(x).logits, model(x).logits)


def test_a_base_that_is_not_needed_changes_nothing(tmp_path):
    model = theirs(llama(), LINEAR, r=2)
    model.save_pretrained(tmp_path)
    one, other = undula.io.load_for(tmp_path, llama()), undula.Adapter.load(tmp_path)
    for (site, name, t), (_, _, same) in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(t, same), (site, name)


def test_modules_to_save(tmp_path):
    x, model = tokens(), theirs(llama(), ["q_proj"], r=2, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    own = llama()
    adapter = undula.attach(own, undula.Adapter.load(tmp_path))
    assert list(adapter.full) == ["lm_head.weight"]
    torch.testing.assert_close(own(x).logits, model(x).logits)
    undula.io.export_lora(adapter, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "again")
    torch.testing.assert_close(again(x).logits, model(x).logits)


@pytest.mark.parametrize("saved_by", ["PEFT", "undula"])
def test_embeddings_and_convolutions(saved_by, tmp_path):
    """PEFT writes their factors under other names and in other shapes; so does undula, whichever way they came."""
    inputs = {llama: tokens(), Picture: torch.randn(2, 3, 6, 6)}
    targets = {llama: ["embed_tokens", "q_proj"], Picture: ["conv", "head"]}
    for make, x in inputs.items():
        if saved_by == "PEFT":
            model = theirs(make(), targets[make], r=2)
            model.save_pretrained(tmp_path, save_embedding_layers=False)
        else:
            model = make()
            adapter = undula.attach(model, LoRA(r=2), targets[make])
            shake(adapter.parameters())
            adapter.save(tmp_path)
        own = make()
        adapter = undula.attach(own, undula.Adapter.load(tmp_path))
        torch.testing.assert_close(of(own, x), of(model, x))
        undula.io.export_lora(2 * adapter + -1 * adapter, tmp_path / "again")
        again = peft.PeftModel.from_pretrained(make(), tmp_path / "again")
        torch.testing.assert_close(of(again, x), of(model, x))


def test_an_embedding_stored_with_its_adapter(tmp_path):
    """PEFT's default for embeddings; the stored weight stands in for the base's own."""
    x, model = tokens(), llama()
    model.model.embed_tokens.weight.data += 1
    model = theirs(model, ["embed_tokens", "q_proj"], r=2)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    own = llama()
    adapter = undula.attach(own, undula.Adapter.load(tmp_path))
    assert list(adapter.full) == ["model.embed_tokens.weight"]
    torch.testing.assert_close(own(x).logits, model(x).logits)


def padded(row=3):
    torch.manual_seed(0)
    return torch.nn.Sequential(OrderedDict(table=torch.nn.Embedding(9, 8, padding_idx=row), head=torch.nn.Linear(8, 5)))


@pytest.mark.parametrize("method", [*LOW_RANK, undula.VeRA(r=2), undula.NOLA(r=2), undula.LoRTA(r=2)], ids=repr)
def test_an_exported_update_has_nothing_at_the_padding(method, tmp_path):
    """PEFT knows of no row that stays: what undula leaves alone is zero in what it reads, from a file or live."""
    model, x = padded().eval(), torch.arange(9)
    adapter = undula.attach(model, method, ["table"])
    shake(adapter.parameters())
    adapter.save(tmp_path / "own")
    undula.io.export_lora(adapter, tmp_path / "live")
    undula.io.export_lora(undula.Adapter.load(tmp_path / "own"), tmp_path / "read")
    for name in ("live", "read"):
        torch.testing.assert_close(peft.PeftModel.from_pretrained(padded(), tmp_path / name).eval()(x), model(x))
        own = padded().eval()
        undula.attach(own, undula.Adapter.load(tmp_path / name))
        torch.testing.assert_close(own(x), model(x))


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_that_moves_padding_is_refused(dora, tmp_path):
    """PEFT's lookup has it, undula's has not; with the column at zero, or no padding, both are one again."""
    x = torch.arange(9)
    model = theirs(padded(), ["table"], r=2, use_dora=dora)
    model.save_pretrained(tmp_path / "moved", save_embedding_layers=False)
    with pytest.raises(ValueError, match="table: row 3 of this embedding is padding"):
        undula.attach(padded(), undula.Adapter.load(tmp_path / "moved"))
    own = padded()
    own.table.padding_idx = None
    undula.attach(own, undula.Adapter.load(tmp_path / "moved"))
    torch.testing.assert_close(own(x), model(x))
    model.base_model.model.table.lora_embedding_A["default"].data[:, 3] = 0
    model.save_pretrained(tmp_path / "still", save_embedding_layers=False)
    own = padded()
    undula.attach(own, undula.Adapter.load(tmp_path / "still"))
    torch.testing.assert_close(own(x), model(x))


def of(model, x):
    y = model(x)
    return getattr(y, "logits", y)


def test_every_field_of_pefts_configuration_is_judged():
    """Its defaults pass; what a newer PEFT adds is unknown, and is refused until somebody has looked at it."""
    from undula.io import lora_config as ours

    from ..laws.test_files import FLAGS

    names = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert names <= ours.READ | ours.WITHOUT_EFFECT | set(ours.ABOUT) | set(FLAGS)
    ours.check(peft.LoraConfig(target_modules=["q"]).to_dict() | {"peft_type": "LORA"}, "here")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_lora_whose_start_moved_the_base_is_refused_and_its_conversion_read(start, tmp_path):
    """PEFT moves the base again on loading; converted, the file is a plain LoRA."""
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": start}
    base = llama()
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).save_pretrained(tmp_path / "start")
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05
    live = model(tokens()).logits
    model.peft_config["default"].init_lora_weights = start
    model.save_pretrained(tmp_path / "moved")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'"):
        undula.Adapter.load(tmp_path / "moved")
    undula.attach(base, undula.Adapter.load(tmp_path / "plain"))
    torch.testing.assert_close(base(tokens()).logits, live)


def test_a_tied_output_head_among_modules_to_save(tmp_path):
    """PEFT gives it a matrix of its own; so does undula."""
    base = llama(tie_word_embeddings=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05
    live = model(tokens()).logits
    model.save_pretrained(tmp_path)
    assert base.lm_head.weight is base.get_input_embeddings().weight
    undula.attach(base, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(base(tokens()).logits, live)


KINDS = {
    "LoHa": (peft.LoHaConfig, {"r": 4, "alpha": 2}, 4, (6, 8)),
    "LoKr": (peft.LoKrConfig, {"r": 2, "decompose_factor": 2, "decompose_both": True}, 2, None),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}, None, None),
    "OFT": (peft.OFTConfig, {"r": 2, "oft_block_size": 0}, 2, None),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 2}, None, None),
    "VeRA": (peft.VeraConfig, {"r": 2}, 2, None),
    "AdaLoRA": (peft.AdaLoraConfig, {"init_r": 3, "total_step": 9}, 3, (6, 8)),
    "VB-LoRA": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 4, "vector_length": 2, "topk": 2}, 2, None),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 5}, None, None),
    "HRA": (peft.HRAConfig, {"r": 2}, 2, None),
    "SHiRA": (peft.ShiraConfig, {"r": 1}, 1, None),
    "MiSS": (peft.MissConfig, {"r": 2}, 2, None),
    "HiRA": (peft.HiraConfig, {"r": 2}, 2, (6, 8)),
    "LoRA": (peft.LoraConfig, {"r": 2, "lora_alpha": 3}, 2, (6, 8)),
    "DoRA": (peft.LoraConfig, {"r": 2, "use_dora": True}, 2, (6, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pefts_is_shown(kind, tmp_path):
    """Also what undula cannot train: its kind, rank and layers, and that it can be shown only."""
    make, options, rank, shape = KINDS[kind]
    model = torch.nn.Sequential(OrderedDict(q=torch.nn.Linear(8, 6), other=torch.nn.Linear(6, 8)))
    peft.get_peft_model(model, make(target_modules=["q"], **options)).save_pretrained(tmp_path)
    found = undula.io.inspect(tmp_path)
    assert (found.form, found.kind) == ("PEFT", kind)
    assert found.use == ("train" if kind in ("LoRA", "DoRA") else "show")
    spot = next(s for s in found.sites if s.site == "q")
    assert (spot.kind, spot.rank, spot.shape) == (kind, rank, shape)
    assert not [s for s in found.sites if s.kind == "in full"]


def test_every_type_of_pefts_has_a_name():
    """A new one would be called unknown, until somebody has looked at it."""
    from undula.io.families import PEFT

    assert {kind.value for kind in peft.PeftType} - {"UNDULA"} <= set(PEFT)
