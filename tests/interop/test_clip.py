"""Two towers: transformers' CLIP by the public calls, and the bench's stand-in for it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import undula
from tests.support import tiny
from undula.optim.sam import SAMReference
from undula.train import ImageClassification, Run

transformers = pytest.importorskip("transformers")
BENCH = Path(__file__).parents[2] / "bench"
ATTENTION = ["q_proj", "k_proj", "v_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CLIP of two blocks a tower, with an image processor."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(path)
    tiny.image_processor(path)
    return path


def rows():
    """(pixels of three colours, 4 shots of each, their labels, the prompts of the classes)."""
    torch.manual_seed(1)
    labels = torch.arange(12) % 3
    colours = 2 * torch.eye(3)[labels] - 1
    prompts = torch.tensor([[1, 5, 6, k, 2] for k in (8, 9, 10)])
    return torch.randn(12, 3, 16, 16) + colours[:, :, None, None], labels, prompts


@pytest.mark.parametrize("method", [undula.LoRA(r=4), undula.BlockLoRA(r=8, blocks=4, alpha=8.0)], ids=repr)
def test_both_towers_of_clip_learn_from_a_few_shots(method, folder, tmp_path):
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels, labels, prompts = rows()
    adapter = undula.attach(model, method, ATTENTION)
    assert {name.partition(".")[0] for name in adapter.methods} == {"text_model", "vision_model"}
    assert len(adapter.methods) == 2 * 2 * 3
    optimizer = SAMReference(adapter.parameters(), model, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        logits = model(pixel_values=pixels, input_ids=prompts).logits_per_image
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    for tower in ("text_model", "vision_model"):
        assert any(adapter.delta(site).norm() > 0 for site in adapter.methods if site.startswith(tower))
    with torch.no_grad():
        want = model(pixel_values=pixels, input_ids=prompts).logits_per_image
    adapter.save(tmp_path / "adapter")
    fresh = transformers.CLIPModel.from_pretrained(folder).eval()
    undula.attach(fresh, undula.Adapter.load(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(fresh(pixel_values=pixels, input_ids=prompts).logits_per_image, want)
    undula.merge(fresh, keep=False)
    fresh.save_pretrained(tmp_path / "merged")
    merged = transformers.CLIPModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        got = merged(pixel_values=pixels, input_ids=prompts).logits_per_image
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_image_tower_of_clip_trains_as_a_classifier(folder, tmp_path):
    """By `undula train`: transformers' CLIPForImageClassification has a new head over the image tower."""
    data = tiny.classes(tmp_path / "pictures", {"train": tiny.pictures(24), "test": tiny.pictures(16, seed=1)})
    run = Run(
        model=str(folder), data=data, task=ImageClassification(), method=undula.BlockLoRA(r=4, blocks=2),
        where=ATTENTION, lr=1e-2, max_steps=12, batch=8, out=tmp_path / "out",
    )  # fmt: skip
    assert undula.train(run)["after"]["accuracy"] > 0.8
    assert all(name.startswith("vision_model") for name in undula.Adapter.load(tmp_path / "out").methods)


@pytest.fixture
def towers(monkeypatch):
    """bench/towers.py."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("towers")
    sys.modules.pop("towers")


def test_the_stand_ins_cached_beginnings_are_those_of_the_whole_towers(towers, tmp_path):
    text = transformers.AutoModel.from_pretrained(tiny.bert(tmp_path / "bert"), add_pooling_layer=False).eval()
    whole = transformers.AutoModelForImageClassification.from_pretrained(tiny.efficientnet(tmp_path / "lite")).eval()
    width, deep = text.config.hidden_size, whole.config.top
    model = towers.Towers(text, whole.efficientnet, torch.randn(width, deep), torch.randn(width) / 9, late=1)
    pixels, mask = torch.randn(4, 3, 16, 16), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    prompts = {"input_ids": torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]]), "attention_mask": mask}
    with torch.no_grad():
        features = model.image(pixels).pooler_output
        u = nn.functional.normalize(features @ model.bridge.weight.T, dim=1)
        states = model.text(**prompts).last_hidden_state
        means = torch.stack([s[m.bool()].mean(0) for s, m in zip(states, mask, strict=True)])
        v = nn.functional.normalize(nn.functional.normalize(means, dim=1) - model.c, dim=1)
        logits = model(model.early(pixels), model.begin(prompts))
    torch.testing.assert_close(logits, model.scale * u @ v.T)
    adapter = undula.attach(model, undula.BlockLoRA(r=4, blocks=2), model.late_layers())
    model(model.early(pixels), model.begin(prompts)).square().sum().backward()
    assert all(f["B"].grad.norm() > 0 for f in adapter.factors.values())


def test_the_bridge_is_the_ridge_regression_of_prompts_on_rows(towers):
    w, v = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    due = torch.linalg.solve(w.T @ w + 0.3 * torch.eye(12, dtype=torch.float64), w.T @ v).T
    torch.testing.assert_close(towers.fitted(w, v, 0.3).double(), due, rtol=1e-5, atol=1e-6)
