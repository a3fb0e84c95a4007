"""What makes one vector of a text's tokens: the modules of sentence-transformers behind the transformer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BEHIND = "_undula_behind"  # an attribute of a model, which is none of its modules: what comes after it
KEPT = ("input_ids", "attention_mask", "token_type_ids")


def behind(model: Any) -> tuple[Any, ...]:
    """The modules that make a sentence's vector of a model's output."""
    found: tuple[Any, ...] = getattr(model, "module", model).__dict__[BEHIND]
    return found


def place_behind(model: PreTrainedModel, path: str) -> int | None:
    """Gives a model the pooling (and what else follows) of its folder: a folder of sentence-transformers says it, any
    other model's tokens are averaged.  Returns how many tokens that folder allows."""
    from sentence_transformers import SentenceTransformer

    whole = SentenceTransformer(path, device="cpu")
    first, *others = whole
    for module in others:
        module.requires_grad_(False)
    model.__dict__[BEHIND] = tuple(others)
    limit = getattr(first, "max_seq_length", None)
    return int(limit) if limit else None


def embedded(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The vectors (rows, d) of tokenised texts, in float32."""
    given = {k: batch[k] for k in KEPT if k in batch}
    features: dict[str, Any] = {**given, "token_embeddings": model(**given)[0].float()}
    for module in behind(model):
        module.to(features["token_embeddings"].device)
        features = module(features)
    found: torch.Tensor = features["sentence_embedding"]
    return found


def write_behind(model: Any, folder: Path, limit: int | None) -> None:
    """Makes the folder of a saved model one of sentence-transformers."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, module in enumerate(behind(model), 1):
        kind = type(module)
        path = f"{number}_{kind.__name__}"
        (folder / path).mkdir()
        module.save(str(folder / path))
        listed.append({"idx": number, "name": str(number), "path": path, "type": f"{kind.__module__}.{kind.__name__}"})
    (folder / "modules.json").write_text(json.dumps(listed, indent=2), encoding="utf-8")
    if limit is not None:
        said = {"max_seq_length": limit, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(said), encoding="utf-8")
