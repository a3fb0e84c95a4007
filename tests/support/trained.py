"""Small trainings, for what is done with their results."""

import undula
from tests.support import tiny
from undula.train import CausalLM, Chat, Classification, ImageClassification, Run

COMMON = {"method": undula.LoRA(r=2), "max_steps": 4, "batch": 4, "lr": 1e-2}


def trained(tmp, name, base, rows, task, **more):
    """The directory TMP/NAME of a run of four steps on these rows."""
    data = tiny.jsonl(tmp / f"{name}.jsonl", rows)
    undula.train(Run(model=base, data=data, task=task, out=tmp / name, **COMMON | more))
    return tmp / name


def texts(tmp):
    return trained(tmp, "run", tiny.bert(tmp / "base"), tiny.reviews(24), Classification())


def pairs(tmp):
    rows = [{"premise": r["text"], "hypothesis": "nice", "label": r["label"]} for r in tiny.reviews(24)]
    return trained(tmp, "run", tiny.bert(tmp / "base"), rows, Classification())


def words(tmp):
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.reviews(24)]
    base = tiny.llama(tmp / "base", chat=True)
    return trained(tmp, "run", base, rows, CausalLM(format=Chat("very "), generate=0), lr=1e-4)  # babbles still


def images(tmp):
    """Beside it, in TMP/data, the images by class."""
    data = tiny.classes(tmp / "data", {"train": tiny.pictures(24)})
    undula.train(Run(model=tiny.vit(tmp / "base"), data=data, task=ImageClassification(), out=tmp / "run", **COMMON))
    return tmp / "run"
