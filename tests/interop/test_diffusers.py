"""LoRA files of diffusers: written as its pipelines read them, and read.

diffusers itself is no dependency: where it is not installed, names, numbers and metadata are checked against what it
writes, and the last test is left out."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import undula
from undula import retrieve
from undula.cli.main import app
from undula.io.diffusers import METADATA, WEIGHTS
from undula.methods.fusion import GATES


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.to_q = nn.Linear(8, 6)
        self.to_k = nn.Linear(8, 6)

    def forward(self, x):
        return self.to_q(self.conv(x).mean((-1, -2)))

    def fuse_projections(self):
        """diffusers' attention has this: no forward calls it, so the layers are called and not read."""
        self.to_qk = nn.Linear(8, 12)
        self.to_qk.weight.copy_(torch.cat([self.to_q.weight.data, self.to_k.weight.data]))


def network():
    return nn.ModuleDict({"down_blocks": Block()})


def adapted(where=("conv", "to_q")):
    model = network()
    methods = {"*.conv": undula.LoRA(r=3, alpha=5.0)}
    adapter = undula.attach(model, undula.AuroRAStatic(r=2), where, overrides=methods if "conv" in where else {})
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.2)
    return model, adapter


def test_names_and_metadata_are_those_of_diffusers(tmp_path):
    _, adapter = adapted()
    undula.io.export_diffusers(adapter, tmp_path, "unet")
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS]
    found = load_file(tmp_path / WEIGHTS)
    leaves = [f"unet.down_blocks.{site}.lora_{side}.weight" for site in ("conv", "to_q") for side in "AB"]
    assert sorted(found) == leaves
    assert found["unet.down_blocks.conv.lora_A.weight"].shape == (3, 4, 3, 3)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        told = json.loads(file.metadata()[METADATA])
    assert all(key.startswith("unet.") for key in told)
    assert told["unet.target_modules"] == ["down_blocks.conv", "down_blocks.to_q"]


@pytest.mark.parametrize("metadata", [True, False])
def test_what_is_written_is_read(metadata, tmp_path):
    """Without metadata alpha is the rank at every layer, as diffusers itself has it."""
    model, adapter = adapted()
    undula.io.export_diffusers(adapter, tmp_path, "transformer")
    if not metadata:
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    other, x = network(), torch.randn(2, 4, 5, 5)
    undula.attach(other, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(other["down_blocks"](x), model["down_blocks"](x))


def test_a_file_of_two_parts_needs_a_name(tmp_path):
    _, adapter = adapted()
    for part in ("unet", "text_encoder"):
        undula.io.export_diffusers(adapter, tmp_path / part, part)
    both = {k: t for part in ("unet", "text_encoder") for k, t in load_file(tmp_path / part / WEIGHTS).items()}
    save_file(both, tmp_path / WEIGHTS)
    with pytest.raises(LookupError, match="is for text_encoder, unet: name the one to read"):
        undula.Adapter.load(tmp_path)
    with pytest.raises(LookupError, match="no component 'vae'; it has: text_encoder, unet"):
        undula.io.load_diffusers(tmp_path, "vae")
    assert set(undula.io.load_diffusers(tmp_path, "unet").factors) == set(adapter.factors)


def test_each_part_of_a_file_has_its_own_configuration(tmp_path):
    """The numbers of a file and the scales of its metadata, part by part."""
    other = undula.attach(network(), undula.LoRA(r=2, alpha=9.0), ["to_q"])
    shaken = {"unet": adapted()[1], "text_encoder": other}
    nn.init.normal_(other.factors["down_blocks.to_q"]["B"])
    tensors, told = {}, {}
    for part, adapter in shaken.items():
        undula.io.export_diffusers(adapter, tmp_path / part, part)
        tensors |= load_file(tmp_path / part / WEIGHTS)
        with safe_open(tmp_path / part / WEIGHTS, "pt") as file:
            told |= json.loads(file.metadata()[METADATA])
    save_file(tensors, tmp_path / WEIGHTS, {METADATA: json.dumps(told)})
    for part, adapter in shaken.items():
        found = undula.io.load_diffusers(tmp_path, part)
        assert set(found.factors) == set(adapter.factors)
        for site in adapter.factors:
            torch.testing.assert_close(found.delta(site), adapter.delta(site))


@pytest.mark.parametrize("key", ["lora_unet_down_blocks.lora_down.weight", "unet.a.processor.to_q_lora.down.weight"])
def test_older_forms_are_refused_with_the_way_out(key, tmp_path):
    save_file({key: torch.ones(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="load the file with diffusers and save it again"):
        undula.Adapter.load(tmp_path)


def test_what_these_files_cannot_hold_is_refused(tmp_path):
    model = network()
    with pytest.raises(ValueError, match=r"no parameters trained in full: down_blocks\.conv\.bias"):
        undula.io.export_diffusers(undula.attach(model, undula.LoRA(), ["to_q"], full=["conv.bias"]), tmp_path)
    with pytest.raises(TypeError, match="is no LoRA"):
        undula.io.export_diffusers(undula.attach(network(), undula.AuroRA(r=2), ["to_q"]), tmp_path)
    with pytest.raises(ValueError, match=r"found 'unet\.x'"):
        undula.io.export_diffusers(undula.attach(network(), undula.LoRA(), ["to_q"]), tmp_path, "unet.x")
    assert not list(tmp_path.iterdir())


def test_the_command_line_exports_for_diffusers(tmp_path):
    _, adapter = adapted(["to_q"])
    adapter.save(tmp_path / "a")
    words = ["export", str(tmp_path / "a"), "--format", "diffusers"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "o")])
    assert done.exit_code == 2
    assert "--component" in done.stderr
    words += ["--component", "unet", "--set", "r=1"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "o")])
    assert done.exit_code == 0, done.stderr
    assert {m.r for m in undula.Adapter.load(tmp_path / "o").methods.values()} == {1}


def test_what_two_files_hold_is_fused_and_each_goes_out_as_it_came(tmp_path):
    """Side by side on the model they are their sum until the gates train; names and numbers of a file stay its own."""
    for name in "ab":
        undula.io.export_diffusers(adapted()[1], tmp_path / name)
    parts = [undula.io.load_diffusers(tmp_path / name, "unet") for name in "ab"]
    for name, part in zip("ab", parts, strict=True):
        undula.io.export_diffusers(part, tmp_path / "out" / name)
        came, goes = (load_file(folder / name / WEIGHTS) for folder in (tmp_path, tmp_path / "out"))
        assert came.keys() == goes.keys()
        assert all(torch.equal(came[key], goes[key]) for key in came)
    model, other, x = network(), network(), torch.randn(2, 4, 5, 5)
    live = undula.attach(model, undula.combine.fused(parts))
    undula.attach(other, parts[0] + parts[1])
    wanted = other["down_blocks"](x)
    torch.testing.assert_close(model["down_blocks"](x), wanted)
    assert {name for _, name, t in live.tensors() if t.requires_grad} == set(GATES)
    optimiser = torch.optim.SGD(live.parameters(), lr=0.1)
    model["down_blocks"](x).square().sum().backward()
    optimiser.step()
    assert (model["down_blocks"](x) - wanted).norm() > 1e-3


def unet(diffusers):
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


INPUTS = torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 5, 32)


def test_adapters_of_a_pipeline_are_found_and_fused(tmp_path):
    """Two of a real UNet's, tiny: one lies nearer to a copy of it that was trained on, and gates take both."""
    diffusers = pytest.importorskip("diffusers")
    files = {}
    for seed, name in enumerate(("a", "b")):
        adapter = undula.attach(unet(diffusers), undula.LoRA(r=2), ["to_q", "conv1"])
        torch.manual_seed(seed + 1)
        for p in adapter.parameters():
            nn.init.normal_(p, std=0.1)
        files[name] = adapter.copy()
        undula.io.export_diffusers(adapter, tmp_path / name)
    further = files["a"].map(lambda f: {k: t + 0.02 * torch.randn_like(t) for k, t in f.items()})
    undula.io.export_diffusers(further, tmp_path / "like-a")
    index = retrieve.update(tmp_path)
    near = dict(zip((e.name for e in index.entries), retrieve.likeness(index.weights, index.weights[0]), strict=True))
    assert near["like-a"] > 0.9
    assert abs(near["b"]) < 0.2
    parts = [undula.io.load_diffusers(tmp_path / name, "unet") for name in "ab"]
    model, other = unet(diffusers), unet(diffusers)
    undula.attach(model, undula.combine.fused(parts))
    undula.attach(other, parts[0] + parts[1])
    with torch.no_grad():
        torch.testing.assert_close(model(*INPUTS).sample, other(*INPUTS).sample, rtol=1e-4, atol=1e-5)


def test_a_pipeline_of_diffusers_reads_it(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 32)
    model, other = unet(diffusers), unet(diffusers)
    adapter = undula.attach(model, undula.LoRA(r=4), ["to_q", "conv1"], overrides={"*.to_q": undula.LoRA(r=2, alpha=3)})
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.1)
    undula.io.export_diffusers(adapter, tmp_path)
    parts = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipeline = diffusers.StableDiffusionPipeline(
        **dict.fromkeys(parts), unet=other, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False
    )
    pipeline.load_lora_weights(str(tmp_path), adapter_name="d")
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs).sample, model(*inputs).sample, rtol=1e-4, atol=1e-5)
        assert (other(*inputs).sample - unet(diffusers)(*inputs).sample).norm() > 0.1
