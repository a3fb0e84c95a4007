"""What PEFT's LoRA makes of a layer and what undula makes of it are the same function, or one is not taken for the
other: PEFT's convolutions know neither dilation nor padding modes, its embeddings no forward of their own."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

import undula

peft = pytest.importorskip("peft")


class Turned(nn.Linear):
    def forward(self, input, scale=1.0):
        return super().forward(input) * scale


class Tripled(nn.Embedding):
    def forward(self, x):
        return 3 * super().forward(x)


class Scaled(nn.Embedding):
    """As Gemma's: PEFT knows the name `embed_scale`."""

    embed_scale = 3.0

    def forward(self, x):
        return self.embed_scale * super().forward(x)


class Padded(nn.Conv2d):
    """Pads by itself: PEFT's B, of the same class, would pad once more."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 2, 0, 2)))


class Same(nn.Conv2d):
    """Pads by its kernel, as timm's Conv2dSame: nothing where the kernel is 1."""

    def forward(self, x):
        before, after = (self.kernel_size[0] - 1) // 2, self.kernel_size[0] // 2
        return super().forward(nn.functional.pad(x, (before, after, before, after)))


IMAGE = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SOUND, FILM = IMAGE[:, :, 0], IMAGE.view(2, 3, 9, 3, 3)
WORDS = torch.arange(11)[None]
SAME = {
    "plain": (lambda: nn.Conv2d(3, 4, 3), IMAGE),
    "stride, padding": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2)), IMAGE),
    "one dimension": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), SOUND),
    "three dimensions": (lambda: nn.Conv3d(3, 4, (3, 2, 1), stride=2), FILM),
    "padding same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), IMAGE),
    "dilated points": (lambda: nn.Conv2d(3, 4, 1, dilation=2), IMAGE),
    "a mode without padding": (lambda: nn.Conv2d(3, 4, 3, padding_mode="reflect"), IMAGE),
    "points that pad nothing": (lambda: nn.Conv2d(3, 4, 1, padding="same", padding_mode="circular"), IMAGE),
    "a class that pads by its kernel": (lambda: Same(3, 4, 3, stride=2), IMAGE),
    "embedding": (lambda: nn.Embedding(11, 6), WORDS),
    "embedding with padding": (lambda: nn.Embedding(11, 6, padding_idx=2), WORDS),
    "embedding by frequency": (lambda: nn.Embedding(11, 6, scale_grad_by_freq=True, sparse=True), WORDS),
    "embedding with embed_scale": (lambda: Scaled(11, 6), WORDS),
}
APART = {
    "dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding="same"), IMAGE, "a convolution with dilation=(2, 2)"),
    "dilation of one side": (
        lambda: nn.Conv2d(3, 4, 3, dilation=(1, 3), padding="same"),
        IMAGE,
        "a convolution with dilation=(1, 3)",
    ),
    "dilation, other sizes": (
        lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=1),
        IMAGE,
        "a convolution with dilation=(2, 2)",
    ),
    "dilation in one dimension": (
        lambda: nn.Conv1d(3, 4, 3, dilation=2, padding=2),
        SOUND,
        "a convolution with dilation=(2,)",
    ),
    "reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        IMAGE,
        "a convolution with padding_mode='reflect'",
    ),
    "circular": (
        lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
        IMAGE,
        "a convolution with padding_mode='circular'",
    ),
    "a class that pads": (lambda: Padded(3, 4, 3), IMAGE, "a Padded, which has a forward of its own"),
    "a class that scales": (lambda: Tripled(11, 6), WORDS, "a Tripled, which has a forward of its own"),
}

LOUD = {
    "dilation, other sizes",
    "dilation in one dimension",
    "a class that pads",
}  # PEFT's own forward fails there, over sizes


def net(make):
    torch.manual_seed(0)
    return nn.Sequential(make()).double().eval()


def trained(model):
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model


def theirs(make, folder, **options):
    """A LoRA that PEFT has made and saved, and what it computes live."""
    torch.manual_seed(0)
    model = trained(peft.get_peft_model(net(make), peft.LoraConfig(r=2, target_modules=["0"], **options)))
    if hasattr(model.base_model.model[0], "lora_embedding_A") and (
        row := getattr(model.base_model.model[0].base_layer, "padding_idx", None)
    ):
        for A in model.base_model.model[0].lora_embedding_A.values():
            A.data[:, row] = 0
    model.save_pretrained(folder)
    return model


def ours(make, method):
    model = net(make)
    adapter = undula.attach(model, method, ["0"])
    trained(model)
    return model, adapter


class Twice(nn.Module):
    """One layer at two places, and one beside."""

    def __init__(self):
        super().__init__()
        self.first, self.between = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.between(torch.tanh(self.first(x)))))


def twice():
    torch.manual_seed(0)
    return Twice().double().eval()


ROW = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("where", ["second", ["first", "second"], "s*d", re.compile("second")], ids=str)
def test_a_layer_at_two_places_has_one_name_and_goes_by_both(where):
    """As a site, in an override and in `full`; it is adapted at both places."""
    model = twice()
    adapter = undula.attach(model, undula.LoRA(r=2), where)
    assert list(adapter.factors) == ["first"]
    trained(model)
    W, b = model.first.weight + adapter.delta("first"), model.first.bias
    inner = model.between(torch.tanh(nn.functional.linear(ROW, W, b)))
    torch.testing.assert_close(model(ROW), nn.functional.linear(torch.tanh(inner), W, b))
    adapter = undula.attach(twice(), undula.LoRA(r=2), "*", overrides={"second": undula.LoRA(r=3)})
    assert {n: m.r for n, m in adapter.methods.items()} == {"first": 3, "between": 2}
    adapter = undula.attach(twice(), undula.LoRA(r=2), ["between"], full=["second"])
    assert sorted(adapter.full) == ["first.bias", "first.weight"]


def test_a_layer_at_two_places_does_not_leave_as_a_lora(tmp_path):
    """PEFT adapts the first place alone: neither is taken for the other.  Its host for undula's methods adapts both."""
    model = twice()
    adapter = undula.attach(model, undula.LoRA(r=2), ["first"])
    trained(model)
    adapter.save(tmp_path / "own")
    for leaves in (adapter, undula.Adapter.load(tmp_path / "own")):
        with pytest.raises(
            ValueError, match=r"^first is one layer at several places \(second too\): PEFT's LoRA does not"
        ):
            undula.io.export_lora(leaves, tmp_path / "peft")
    undula.enable_peft()
    hosted = peft.PeftModel.from_pretrained(twice(), tmp_path / "own", autocast_adapter_dtype=False)
    torch.testing.assert_close(hosted(ROW), model(ROW), atol=1e-5, rtol=1e-5)
    hosted.save_pretrained(tmp_path / "hosted")
    again = twice()
    undula.attach(again, undula.Adapter.load(tmp_path / "hosted"))
    torch.testing.assert_close(again(ROW), model(ROW), atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    other = trained(peft.get_peft_model(twice(), peft.LoraConfig(r=2, target_modules=["first"])))
    other.save_pretrained(tmp_path / "theirs")
    assert not torch.allclose(other(ROW), other.merge_and_unload()(ROW), atol=1e-3)
    with pytest.raises(ValueError, match="first is one layer at several places"):
        undula.attach(twice(), undula.Adapter.load(tmp_path / "theirs"))
    renamed = {k: {"second": getattr(adapter, k)["first"]} for k in ("methods", "factors", "shapes")}
    with pytest.raises(ValueError, match=r"sites that this model has not: second \(known as first here\)"):
        undula.attach(twice(), dataclasses.replace(adapter, **renamed))


def test_a_layer_at_two_places_trains_in_full_once():
    """By either name: it is one module, unlike two modules that share a matrix."""
    for name in ("first", "second"):
        model = twice()
        adapter = undula.attach(model, undula.LoRA(r=2), ["between"], full=[name])
        assert all(path.startswith("first.") for path in adapter.full)
        undula.detach(model)
        assert model.first is model.second


def test_a_layer_that_may_be_called_with_more_does_not_leave_as_a_lora(tmp_path):
    """PEFT's pair does not get what the model gives: there live and merged differ."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Turned(4, 4)

        def forward(self, x):
            return self.layer(x, scale=3.0)

    other = trained(peft.get_peft_model(Net().double(), peft.LoraConfig(r=2, target_modules=["layer"])))
    other.save_pretrained(tmp_path / "theirs")
    assert not torch.allclose(other(ROW), other.merge_and_unload()(ROW), atol=1e-3)
    adapter = undula.attach(Net().double(), undula.LoRA(r=2), ["layer"])
    with pytest.raises(ValueError, match="layer is a Turned, whose forward takes more than x"):
        undula.io.export_lora(adapter, tmp_path / "ours")
    with pytest.raises(ValueError, match="layer is a Turned, whose forward takes more than x"):
        undula.attach(Net().double(), undula.Adapter.load(tmp_path / "theirs"))


@pytest.mark.parametrize("case", SAME)
def test_both_compute_the_same(case, tmp_path):
    """Written by either and read by the other, live and merged."""
    make, x = SAME[case]
    model, adapter = ours(make, undula.LoRA(r=2))
    undula.io.export_lora(adapter, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(net(make), tmp_path / "ours", autocast_adapter_dtype=False)
    torch.testing.assert_close(read(x), model(x))
    live = theirs(make, tmp_path / "theirs")(x)
    model = net(make)
    undula.attach(model, undula.Adapter.load(tmp_path / "theirs"))
    torch.testing.assert_close(model(x), live, atol=1e-5, rtol=1e-5)  # files hold float32
    undula.merge(model)
    torch.testing.assert_close(model(x), live, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", APART)
@pytest.mark.parametrize("method", [undula.LoRA(r=2), undula.SoRA(r=2), undula.Dropout(undula.LoRA(r=2))], ids=repr)
def test_what_would_be_another_function_does_not_leave_as_a_lora(case, method, tmp_path):
    """By no door: exported live, from its own directory, collapsed, for diffusers.  The layer and the cause are named;
    undula's own directory and a merge hold it."""
    make, x, why = APART[case]
    model, adapter = ours(make, method)
    adapter.save(tmp_path / "own")
    for leaves in (adapter, undula.Adapter.load(tmp_path / "own"), 0.5 * adapter):
        with pytest.raises(ValueError, match="PEFT's LoRA does not follow that") as refused:
            undula.io.export_lora(leaves, tmp_path / "peft")
        assert str(refused.value).startswith(f"0 is {why}")
    with pytest.raises(ValueError, match="PEFT's LoRA does not follow that"):
        undula.io.export_lora(undula.collapse(adapter, undula.Truncate(1)).adapter, tmp_path / "peft")
    with pytest.raises(ValueError, match="PEFT's LoRA does not follow that"):
        undula.io.export_diffusers(adapter, tmp_path / "peft", "unet")
    assert not (tmp_path / "peft").exists()
    again = net(make)
    undula.attach(again, undula.Adapter.load(tmp_path / "own"))
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-5)
    live = model(x)
    undula.merge(model)
    torch.testing.assert_close(model(x), live)


@pytest.mark.parametrize("case", sorted(set(APART) - LOUD))
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_their_lora_does_not_come_where_it_would_be_another_function(case, options, tmp_path):
    """Nor by way of undula's own directory, in either host.  As PEFT merges it, it comes when asked for."""
    make, x, why = APART[case]
    live = theirs(make, tmp_path / "theirs", **options)
    assert not torch.allclose(live(x), live.merge_and_unload()(x), atol=1e-3)
    adapter = undula.Adapter.load(tmp_path / "theirs")
    adapter.save(tmp_path / "own")
    undula.enable_peft()
    for come in (
        lambda: undula.attach(net(make), adapter),
        lambda: undula.attach(net(make), undula.Adapter.load(tmp_path / "own")),
        lambda: peft.PeftModel.from_pretrained(net(make), tmp_path / "own"),
    ):
        with pytest.raises(ValueError, match="PEFT's LoRA does not follow that while it is live") as refused:
            come()
        assert str(refused.value).startswith(f"0 is {why}")
    model = net(make)
    undula.attach(model, dataclasses.replace(adapter, apart={}))
    if not options:
        torch.testing.assert_close(model(x), live.merge_and_unload()(x), atol=1e-5, rtol=1e-5)


def test_directories_of_before_still_load(tmp_path):
    """They say nothing of what PEFT would compute, and what they lack is learned from the layers."""
    make, x, _ = APART["dilation"]
    model, adapter = ours(make, undula.LoRA(r=2))
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["undula"].pop("apart")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = net(make)
    live = undula.attach(again, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="dilation"):
        undula.io.export_lora(live, tmp_path / "peft")


@pytest.mark.parametrize("padding", [None, 0, 3])
def test_an_embedding_starts_the_other_way_round_with_padding_and_without(padding):
    """A is zero and B is not: with A within 1/sqrt(vocabulary) B would get next to no gradient."""
    adapter = undula.attach(nn.Sequential(nn.Embedding(11, 6, padding_idx=padding)), undula.LoRA(r=2), ["0"])
    assert not adapter.factors["0"]["A"].any()
    assert float(adapter.factors["0"]["B"].detach().std()) > 0.3
