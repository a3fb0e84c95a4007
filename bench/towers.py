"""A stand-in for CLIP out of two models that install from a package registry: MiniLM reads, EfficientNet-Lite0 looks.

    u = unit(P f)                   f (1280): EfficientNet's features of an image; P (384 x 1280): the bridge
    v = unit(unit(mean h) - c)      h: MiniLM's states of a prompt; c (384): the mean over ImageNet's classes
    logit = scale <u, v>

No image teaches the bridge.  EfficientNet's classifier has a row w_k for each of ImageNet's 1000 classes, and each of
them has a name and a WordNet gloss, so P is the ridge regression of the prompts' vectors on the centred rows,

    P = argmin sum_k |P (w_k - mean w) - v_k|^2 + ridge |P|^2,

with the ridge under which the rows of classes that were left out find their own prompts best.  Its form (ridge
regression, 96 pixels, name and gloss) was settled by how it tells validation pictures of Fashion-MNIST and all emoji,
new classes among them, without any training: its zero-shot figures are not blind.  It is no CLIP: it has
seen no pair of an image and a sentence, and its zero-shot accuracy is far below one's.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from undula.bundled import model_path
from undula.bundled.asset import Asset
from undula.bundled.wheels import download, unpack

FOLDS, RIDGES = 5, (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
LAST = 2  # blocks of MiniLM that are adapted
Prompts = dict[str, Tensor]  # input_ids, attention_mask (C, T)
Begun = tuple[Tensor, Tensor]  # states (C, T, D) before the last blocks, attention_mask


class Towers(nn.Module):
    """logits (N, C) of images (N, 3, H, W) and prompts.  `early` and `begin` are what no adapter changes, computed once
    where the same ones come again: an image up to the block `late`, a prompt up to the last two."""

    def __init__(self, text: nn.Module, image: Any, P_DF: Tensor, c_D: Tensor, scale: float = 20.0, late: int = 12):
        super().__init__()
        self.text, self.image, self.late, self.scale = text, image, late, scale
        self.bridge = nn.Linear(P_DF.shape[1], P_DF.shape[0], bias=False)
        self.bridge.weight.data = P_DF.clone()
        self.register_buffer("c", c_D.clone())
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def early(self, pixels: Tensor) -> Tensor:
        x = F.relu6(self.image.stem_norm(self.image.stem(pixels)))
        for block in self.image.blocks[: self.late]:
            x = block(x)
        return x

    def look(self, early: Tensor) -> Tensor:
        """u (N, D)."""
        x = early
        for block in self.image.blocks[self.late :]:
            x = block(x)
        x = F.relu6(self.image.top_norm(self.image.top(x))).mean((2, 3))
        return F.normalize(self.bridge(x), dim=1)

    @torch.no_grad()
    def begin(self, prompts: Prompts) -> Begun:
        states = self.text(**prompts, output_hidden_states=True).hidden_states
        return states[-1 - LAST], prompts["attention_mask"]

    def read(self, begun: Begun) -> Tensor:
        """v (C, D)."""
        states, mask = begun
        hidden = (1.0 - mask[:, None, None]) * torch.finfo(states.dtype).min  # added to the scores of padding
        for block in self.text.encoder.layer[-LAST:]:
            states = block(states, hidden)
        return F.normalize(pooled(states, mask) - self.c, dim=1)

    def forward(self, early: Tensor, begun: Begun) -> Tensor:
        return self.scale * self.look(early) @ self.read(begun).T

    def late_layers(self) -> list[str]:
        """What an adapter goes on: the 1x1 convolutions after `late`, and query, key and value of the text tower's
        last two blocks."""
        blocks = range(self.late, len(self.image.blocks))
        convolutions = [f"image.blocks.{i}.{part}" for i in blocks for part in ("expand", "project")]
        count = self.text.config.num_hidden_layers
        last = range(count - LAST, count)
        reading = [f"text.encoder.layer.{i}.attention.self.{p}" for i in last for p in ("query", "key", "value")]
        return [*convolutions, "image.top", *reading]


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The unit mean of MiniLM's states (C, D), as sentence-transformers takes it."""
    return F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def told(text: nn.Module, texts: list[str]) -> Tensor:
    """The vectors of any number of texts."""
    parts = [tokens(texts[i : i + 50]) for i in range(0, len(texts), 50)]
    return torch.cat([pooled(text(**part).last_hidden_state, part["attention_mask"]) for part in parts])


def tokens(texts: list[str]) -> Prompts:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(model_path("minilm"))(
        texts, padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    return {k: made[k] for k in ("input_ids", "attention_mask")}


def imagenet(scratch: Path) -> list[tuple[str, str]]:
    """(name, gloss) of ImageNet's classes in their order: WordNet's, out of the wheel of timm (Apache-2.0)."""
    names = Asset(
        name="imagenet-names",
        kind="data",
        title="names and glosses of ImageNet's classes",
        licence="WordNet licence; Apache-2.0 (package)",
        source="timm==1.0.31",
        sha256="5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7",
        bytes=2_798_714,
        build=lambda *_: None,
    )
    wheel = download(names, scratch, print)
    folder = scratch / "info"
    unpack(wheel, "timm/data/_info/imagenet_", folder)
    lemma, gloss = (
        dict(line.split("\t", 1) for line in (folder / f"synset_to_{kind}.txt").read_text("utf-8").splitlines())
        for kind in ("lemma", "definition")
    )
    return [(lemma[s], gloss[s]) for s in (folder / "synsets.txt").read_text("utf-8").split()]


@torch.no_grad()
def bridged(text: nn.Module, rows_KF: Tensor, scratch: Path) -> dict[str, Any]:
    """P, c and the ridge, and how well rows of classes that were left out find their prompts among all 1000."""
    named = imagenet(scratch)
    both = [[f"a photo of a {name.split(',')[0]}." for name, _ in named], [f"{name}: {gloss}" for name, gloss in named]]
    v_KD = torch.stack([told(text, texts) for texts in both]).mean(0)
    c_D = v_KD.mean(0)
    v_KD, w_KF = F.normalize(v_KD - c_D, dim=1), rows_KF - rows_KF.mean(0)
    order = torch.randperm(len(w_KF), generator=torch.Generator().manual_seed(0))
    found = {
        ridge: statistics.fmean(_found(w_KF, v_KD, part, ridge) for part in order.chunk(FOLDS)) for ridge in RIDGES
    }
    best = max(found, key=lambda ridge: found[ridge])
    return {"P": fitted(w_KF, v_KD, best), "c": c_D, "ridge": best, "found": found[best]}


def fitted(w_KF: Tensor, v_KD: Tensor, ridge: float) -> Tensor:
    """P (D, F) of the ridge regression, by its dual form."""
    gram = (w_KF @ w_KF.T).double()
    return (w_KF.T.double() @ torch.linalg.solve(gram + ridge * torch.eye(len(gram)), v_KD.double())).T.float()


def _found(w_KF: Tensor, v_KD: Tensor, out: Tensor, ridge: float) -> float:
    """The share of the classes `out`, of which P knows nothing, whose prompt is among the ten nearest to their row."""
    kept = torch.ones(len(w_KF), dtype=torch.bool).scatter(0, out, False)
    P_DF = fitted(w_KF[kept], v_KD[kept], ridge)
    nearest = (F.normalize(w_KF[out] @ P_DF.T, dim=1) @ v_KD.T).topk(10).indices
    return float((nearest == out[:, None]).any(1).float().mean())


def towers(work: Path) -> tuple[Towers, dict[str, float]]:
    """The model, and what was found of its bridge; WORK keeps the bridge."""
    from transformers import AutoModel, AutoModelForImageClassification

    text = AutoModel.from_pretrained(model_path("minilm"), add_pooling_layer=False).eval()
    whole = AutoModelForImageClassification.from_pretrained(model_path("efficientnet-lite0")).eval()
    kept = work / "bridge.safetensors"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            made = bridged(text, whole.classifier.weight.detach(), Path(scratch))
        work.mkdir(parents=True, exist_ok=True)
        figures = torch.tensor([made["ridge"], made["found"]])
        save_file({"P": made["P"].contiguous(), "c": made["c"], "figures": figures}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
    found = load_file(kept)
    ridge, share = found["figures"].tolist()
    return Towers(text, whole.efficientnet, found["P"], found["c"]), {"ridge": ridge, "found_in_ten": share}
