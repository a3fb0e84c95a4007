"""The single files of kohya's scripts and LyCORIS: read with the model whose layers they name, and written.

The oracle is the formula of these files, applied to the weights of a copy; LyCORIS and diffusers themselves, where they
are installed, are asked too."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import undula
from tests.support.numbers import shake
from undula.cli.main import app
from undula.io import export_kohya, load_kohya
from undula.io.stability import stability


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 6), nn.ModuleList([nn.Linear(6, 8)])

    def forward(self, x):
        return self.to_out[0](self.to_q(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1)])
        self.attn1 = Attention()

    def forward(self, x):
        for block in self.down_blocks:
            x = block(x)
        return self.attn1(x.mean((-1, -2)))


X = torch.linspace(-1, 1, 2 * 4 * 6 * 6, dtype=torch.float64).view(2, 4, 6, 6)
LAYERS = {"down_blocks_0": (8, 4, 3, 3), "down_blocks_1": (8, 8, 1, 1), "attn1_to_q": (6, 8), "attn1_to_out_0": (8, 6)}


def drawn(*shape):
    return torch.randn(*shape, generator=drawn.generator)


def made(kind, alpha=2.0):
    """(tensors of a file, {layer: what it adds to the weight})."""
    drawn.generator = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    for site, (O, I, *kernel) in LAYERS.items():
        r, one, key = 3, [1] * len(kernel), f"lora_unet_{site}"
        up, down = drawn(O, r, *one), drawn(r, I, *kernel)
        if kind == "CP" and kernel == [3, 3]:
            down, mid = drawn(r, I, 1, 1), drawn(r, r, 3, 3)
            tensors[f"{key}.lora_mid.weight"] = mid
            delta = torch.einsum("op,pqhw,qi->oihw", *(t.double() for t in (up[:, :, 0, 0], mid, down[:, :, 0, 0])))
        else:
            delta = (up.flatten(1).double() @ down.flatten(1).double()).view(O, I, *kernel)
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        deltas[site] = delta * (1 if alpha is None else alpha / r)
        if kind == "DoRA":
            tensors[f"{key}.dora_scale"] = drawn(O, *[1] * (1 + len(kernel))).abs() + 0.5
    return tensors, deltas


def changed(deltas, tensors):
    """The net with its weights as the file says."""
    net = Net().double()
    with torch.no_grad():
        for name, module in net.named_modules():
            site = name.replace(".", "_")
            if site in deltas:
                W = module.weight + deltas[site]
                m = tensors.get(f"lora_unet_{site}.dora_scale")
                if m is not None:
                    W = m.double() * W / W.flatten(1).norm(dim=1).view(-1, *[1] * (W.ndim - 1))
                module.weight.copy_(W)
    return net


@pytest.mark.parametrize("kind", ["LoRA", "CP", "DoRA"])
@pytest.mark.parametrize("alpha", [2.0, None])
def test_a_file_computes_what_its_formula_says(kind, alpha, tmp_path):
    """Linear layers and convolutions, CP form (`lora_mid`) and DoRA's magnitudes included; without alpha it is r."""
    tensors, deltas = made(kind, alpha)
    save_file(tensors, tmp_path / "x.safetensors")
    net = Net().double()
    before = net(X)
    undula.attach(net, load_kohya(tmp_path / "x.safetensors", net))
    torch.testing.assert_close(net(X), changed(deltas, tensors)(X), rtol=1e-5, atol=1e-6)  # stored in float32
    assert not torch.allclose(before, net(X))


def test_a_linear_layer_may_be_stored_as_a_convolution_of_one(tmp_path):
    tensors, deltas = made("LoRA")
    for key in ("lora_unet_attn1_to_q.lora_up.weight", "lora_unet_attn1_to_q.lora_down.weight"):
        tensors[key] = tensors[key][..., None, None]
    save_file(tensors, tmp_path / "x.safetensors")
    net = Net().double()
    undula.attach(net, load_kohya(tmp_path / "x.safetensors", net))
    torch.testing.assert_close(net(X), changed(deltas, {})(X), rtol=1e-5, atol=1e-6)


def test_what_is_written_is_read_to_the_bit(tmp_path):
    """Under one rank for all layers: what a layer lacks of it is zero."""
    net = Net()
    methods = {"*.to_q": undula.AuroRAStatic(r=3)}
    where = ["down_blocks.*", "to_q", "to_out.0"]
    adapter = undula.attach(net, undula.LoRA(r=2, alpha=3.0), where, overrides=methods)
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.2)
    export_kohya(adapter, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert {k.partition(".")[0] for k in found} == {f"lora_unet_{site}" for site in LAYERS}
    assert found["lora_unet_down_blocks_0.lora_down.weight"].shape == (3, 4, 3, 3)
    assert found["lora_unet_down_blocks_0.lora_up.weight"].shape == (8, 3, 1, 1)
    assert {float(t) for key, t in found.items() if key.endswith(".alpha")} == {3}
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "3"
    again = load_kohya(tmp_path / "x.safetensors", Net())
    for site, method in adapter.methods.items():
        B_OR, A_RI = method.pair(adapter.factors[site])
        B, A = again.methods[site].pair(again.factors[site])
        r = len(A_RI)
        assert torch.equal(B[:, :r], B_OR), site
        assert torch.equal(A[:r], A_RI), site
        assert not B[:, r:].any()


KINDS = {"LoHa": "hada_w1_a", "LoKr": "lokr_w1", "OFT": "oft_blocks", "GLoRA": "a1.weight", "full difference": "diff"}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(kind, tmp_path):
    tensors, _ = made("LoRA")
    save_file(tensors | {f"lora_unet_x.{KINDS[kind]}": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"{kind} at 1 layers: no LoRA.*undula inspect"):
        load_kohya(tmp_path / "x.safetensors", Net())


WRONG = {
    "another model": (
        {"lora_unet_input_blocks_1": "lora_unet_attn1_to_q"},
        LookupError,
        "the model has no input_blocks_1",
    ),
    "another shape": ({"lora_unet_attn1_to_q": "lora_unet_attn1_to_out_0"}, ValueError, "in this model; the file has"),
    "two parts": (
        {"lora_te_attn1_to_q": "lora_unet_attn1_to_q"},
        LookupError,
        "is for lora_te, lora_unet: name the one",
    ),
    "no prefix": ({"attn1_to_q": "lora_unet_attn1_to_q"}, ValueError, "begins with none of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_does_not_fit_is_refused(name, tmp_path):
    renamed, error, what = WRONG[name]
    tensors, _ = made("LoRA")
    for new, old in renamed.items():
        for leaf in ("lora_up.weight", "lora_down.weight", "alpha"):
            tensors[f"{new}.{leaf}"] = tensors[f"{old}.{leaf}"].clone()
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(error, match=what):
        load_kohya(tmp_path / "x.safetensors", Net())


def test_one_part_of_several_is_read(tmp_path):
    tensors, _ = made("LoRA")
    tensors |= {k.replace("lora_unet", "lora_te"): t.clone() for k, t in tensors.items() if "to_q" in k}
    save_file(tensors, tmp_path / "x.safetensors")
    assert set(load_kohya(tmp_path / "x.safetensors", Net(), "lora_te").methods) == {"attn1.to_q"}
    with pytest.raises(LookupError, match="nothing for 'lora_te2'; it has: lora_te, lora_unet"):
        load_kohya(tmp_path / "x.safetensors", Net(), "lora_te2")


def test_damage_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    for change, what in [
        ({"lora_unet_attn1_to_q.alpha": torch.ones(2)}, "alpha of attn1_to_q is one number"),
        ({"lora_unet_attn1_to_q.lora_up.weight": torch.full((6, 3), float("nan"))}, "NaN"),
        ({"lora_unet_attn1_to_q.dora_scale": torch.ones(6, 1)}, "some of its layers are DoRA and some are not"),
        ({"lora_unet_down_blocks_0.lora_mid.weight": torch.ones(3, 2, 3, 3)}, "needs lora_mid"),
        ({f"lora_unet_{s}.dora_scale": torch.ones(1, size[1]) for s, size in LAYERS.items()}, "one for each input"),
    ]:
        save_file(made("LoRA")[0] | change, file)
        with pytest.raises(ValueError, match=what):
            load_kohya(file, Net())


def test_what_these_files_cannot_hold_is_refused(tmp_path):
    table = undula.attach(nn.ModuleDict({"e": nn.Embedding(4, 4)}), undula.LoRA(r=2), ["e"])
    twice = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    both, plain = undula.attach(twice, undula.LoRA(r=2)), undula.attach(Net(), undula.LoRA(r=2))
    bent = undula.attach(Net(), undula.AuroRA(r=2), ["to_q"])
    full = undula.attach(Net(), undula.LoRA(r=2), ["to_q"], full=["to_q.bias"])
    for adapter, part, error, what in [
        (table, "unet", ValueError, "embedding, for which"),
        (both, "unet", ValueError, "same name without dots"),
        (plain, "vae", ValueError, "know the parts unet, transformer"),
        (bent, "unet", TypeError, "is no LoRA"),
        (full, "unet", ValueError, r"no parameters trained in full: attn1\.to_q\.bias"),
    ]:
        with pytest.raises(error, match=what):
            export_kohya(adapter, tmp_path / "y.safetensors", part)
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_one(tmp_path):
    adapter = undula.attach(Net(), undula.LoRA(r=2), ["to_q"])
    nn.init.normal_(adapter.factors["attn1.to_q"]["B"])
    adapter.save(tmp_path / "a")
    words = ["export", str(tmp_path / "a"), "--format", "kohya", "--component"]
    done = CliRunner().invoke(app, [*words, "unet", "--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "NAME.safetensors" in done.stderr
    done = CliRunner().invoke(app, [*words, "text_encoder", "--out", str(tmp_path / "x.safetensors")])
    assert done.exit_code == 0, done.stderr
    assert "lora_te_attn1_to_q.lora_up.weight" in load_file(tmp_path / "x.safetensors")
    done = CliRunner().invoke(app, [*words, "unet", "--out", str(tmp_path / "x.safetensors")])
    assert done.exit_code == 2
    assert "there already" in done.stderr


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_of_lycoris_computes_the_same(dora, tmp_path):
    lycoris = pytest.importorskip("lycoris")
    net, x = Net(), X.float()
    other = copy.deepcopy(net)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "target_name": [".*"]})
    options = {"conv_dim": 4, "conv_alpha": 2, "use_tucker": not dora, "dora_wd": dora}
    wrapped = lycoris.create_lycoris(other, 1.0, linear_dim=4, linear_alpha=2, algo="lora", **options)
    wrapped.apply_to()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            p.mul_(1.1) if "dora" in name else p.normal_(std=0.3)
    wrapped.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {})
    undula.attach(net, load_kohya(tmp_path / "x.safetensors", net))
    torch.testing.assert_close(net(x), other(x), rtol=1e-4, atol=1e-5)


def test_a_pipeline_of_diffusers_reads_it(tmp_path):
    """As `ComfyUI` does by the same names."""
    diffusers = pytest.importorskip("diffusers")

    def unet():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )

    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 32)
    model, other = unet(), unet()
    where = ["to_q", "to_k", "to_out.0", "proj_in", "conv1", "conv2", "ff.net.2", "time_emb_proj"]
    adapter = undula.attach(model, undula.LoRA(r=4), where, overrides={"*.to_q": undula.LoRA(r=2, alpha=3)})
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.1)
    export_kohya(adapter, tmp_path / "x.safetensors")
    parts = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipeline = diffusers.StableDiffusionPipeline(
        **dict.fromkeys(parts), unet=other, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="d")
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs).sample, model(*inputs).sample, rtol=1e-4, atol=1e-5)
        assert (other(*inputs).sample - unet()(*inputs).sample).norm() > 0.1


def built(layers):
    """A module with layers of these names and shapes."""
    model = nn.Module()
    for name, (O, I, *kernel) in layers.items():
        *above, last = name.split(".")
        at = model
        for part in above:
            at = at._modules.setdefault(part, nn.Module())
        at.add_module(last, nn.Conv2d(I, O, kernel, padding=[k // 2 for k in kernel]) if kernel else nn.Linear(I, O))
    return model


@pytest.mark.parametrize("kind", ["SDXL", "SD 1"])
def test_names_of_stabilitys_layout_are_those_of_diffusers(kind, tmp_path):
    """Both ways, for blocks with and without attention; the list was made by diffusers' own conversions."""
    told = json.loads((Path(__file__).parents[1] / "fixtures" / "stability-unet.json").read_text())[kind]
    assert stability(told) == told
    assert len(set(told.values())) == len(told)
    model = built(dict.fromkeys(told, (3, 2)))
    adapter = undula.attach(model, undula.LoRA(r=1), list(told))
    shake(adapter.parameters())
    export_kohya(adapter, tmp_path / "x.safetensors", "unet", model)
    found = {key.partition(".")[0] for key in load_file(tmp_path / "x.safetensors")}
    assert found == {f"lora_unet_{name.replace('.', '_')}" for name in told.values()}
    again = load_kohya(tmp_path / "x.safetensors", dict.fromkeys(told, (3, 2)))
    assert set(again.methods) == set(told)
    for site in told:
        torch.testing.assert_close(again.delta(site), adapter.delta(site))
    with pytest.raises(ValueError, match=r"conv_in, .*: no layers of a UNet that Stability's layout"):
        export_kohya(adapter, tmp_path / "y.safetensors", "unet", {"mid_block.resnets.0.conv1": (3, 2)})


def test_names_are_those_that_diffusers_gave_and_took(tmp_path):
    """Of every kind of layer of a UNet; the list was made by diffusers itself."""
    told = json.loads((Path(__file__).parents[1] / "fixtures" / "diffusers-unet.json").read_text())
    model = built(told["layers"])
    adapter = undula.attach(model, undula.LoRA(r=2), list(told["layers"]))
    export_kohya(adapter, tmp_path / "x.safetensors")
    undula.io.export_diffusers(adapter, tmp_path)
    assert sorted(load_file(tmp_path / "x.safetensors")) == told["kohya"]
    assert sorted(load_file(tmp_path / "pytorch_lora_weights.safetensors")) == told["diffusers"]
    assert set(load_kohya(tmp_path / "x.safetensors", model).methods) == set(told["layers"])
