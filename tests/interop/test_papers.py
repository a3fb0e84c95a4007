"""The studies in the papers' own settings: each is read and planned as it stands, and run short on a tiny stand-in."""

import dataclasses
from pathlib import Path

import pytest

from tests.support import tiny
from undula.study.drive import run
from undula.study.outcome import FINAL
from undula.study.plan import Plan
from undula.study.read import read

PAPERS = Path(__file__).parents[2] / "studies" / "papers"


def pairs(folder):
    """Rows with every column that a set of GLUE has here, in its splits; the test's labels are hidden, as there."""
    folder.mkdir()
    for split, n in (("train", 60), ("validation", 20), ("test", 20)):
        rows = [
            {"sentence": f"{r['text']} {i}", "sentence1": f"{r['text']} {i}", "sentence2": "a day was nice",
             "question": f"was {r['text']} {i}", "label": -1 if split == "test" else int(r["label"] == "good")}
            for i, r in enumerate(tiny.reviews(n, seed=n))
        ]  # fmt: skip
        tiny.jsonl(folder / f"{split}.jsonl", rows)
    return str(folder)


def dialogues(path):
    rows = [dict.fromkeys(("instruction", "dialogue"), f"the day was {r['label']} {i}") | {"output": r["text"]}
            for i, r in enumerate(tiny.reviews(40))]  # fmt: skip
    return tiny.jsonl(path, [row | {"summary": row["output"]} for row in rows])


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    glue, llama = pairs(folder / "glue"), tiny.llama(folder / "llama", hidden=64, intermediate=128)
    text = dialogues(folder / "dialogues.jsonl")
    return {
        "FacebookAI/roberta-base": tiny.roberta(folder / "roberta"),
        "meta-llama/Meta-Llama-3-8B": llama,
        "meta-llama/Llama-2-7b-hf": llama,
        "zwhe99/commonsense_170k": text,
        "knkarthick/samsum": text,
        **{f"nyu-mll/glue:{name}": glue for name in ("rte", "mrpc", "stsb", "cola", "sst2", "qnli")},
    }


def short(study):
    """The same arms, models and options, two kinds of data, at one rate and seed, for two steps."""
    train = dataclasses.replace(study.train, max_steps=2, batch=4, evaluations=1)
    sweep = dataclasses.replace(study.sweep, rates=study.sweep.rates[:1], extend=0, halving=None)
    arms = tuple(dataclasses.replace(a, rates=a.rates[:1]) for a in study.arms)
    data = study.data[2::3] or study.data  # of GLUE one regression (STS-B) and one of pairs (QNLI)
    data = tuple(dataclasses.replace(d, train=16, validation=8, test=8, batch=None) for d in data)
    return dataclasses.replace(study, train=train, sweep=sweep, arms=arms, data=data, seeds=study.seeds[:1])


@pytest.mark.parametrize(("name", "cells"), [("glue", 48), ("commonsense", 5), ("samsum", 5)])
def test_a_papers_setting_is_planned_and_runs_on_a_stand_in(name, cells, stand_ins, tmp_path):
    study = read(PAPERS / f"{name}.toml", stand_ins)
    plan = Plan(study)
    assert len(plan.cells) == cells
    counts = plan.counts({})
    assert counts["least"] == sum(len(study.seeds) * (len(c.grid) + 1) for c in plan.cells)
    found = run(short(study), tmp_path)
    assert [o.error for o in found.outcomes if o.error] == []
    groups = {(o.arm, *o.group) for o in found.outcomes}
    assert len(groups) == len(study.arms) * min(2, len(study.data))
    assert {o.stage for o in found.outcomes} == {FINAL}  # at one rate there is nothing to choose


def test_a_data_set_has_its_own_epochs_and_batch(stand_ins):
    study = read(PAPERS / "glue.toml", stand_ins)
    runs = {c.rows.label: c.trial(1e-3, 0, False).run for c in Plan(study).cells}
    assert {k: (r.epochs, r.batch) for k, r in runs.items()} == {
        "RTE": (80, 16), "MRPC": (30, 64), "STS-B": (30, 64), "CoLA": (90, 32), "SST-2": (30, 32), "QNLI": (80, 32),
    }  # fmt: skip
