"""Allocators and starts from data in the whole of a training: Trainer, checkpoints, studies, the command line."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula import ranks, starts
from undula.cli.main import app
from undula.core.options import build_from
from undula.integrations import callback
from undula.ranks import diffora
from undula.study.plan import Plan
from undula.study.read import Faults, parse
from undula.study.trial import perform
from undula.study.watch import Watch
from undula.train import (
    CausalLM,
    Classification,
    Examples,
    Interrupted,
    Run,
    evaluate,
)
from undula.train import adapter_trainer as training
from undula.train.prepared import prepare

from ..support.courses import COURSES

STEPS = 12
WHERE = ("query", "output.dense")  # six layers
each = pytest.mark.parametrize("name", COURSES)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", tiny.reviews(60))


@pytest.fixture(scope="module")
def usual(bert, reviews):
    return Run(model=bert, data=reviews, task=Classification(), method=None, out="unused", where=WHERE,
               lr=1e-2, max_steps=STEPS, batch=4, save_every=3, seed=3)  # fmt: skip


class Until(TrainerCallback):
    """Stops after k steps as Ctrl-C does, with a checkpoint; or falls over, without one of its own."""

    def __init__(self, k, save):
        self.k, self.save = k, save

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.k - 1 and self.save:
            os.kill(os.getpid(), signal.SIGINT)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.k and not self.save:
            raise MemoryError("fallen over")


class Counted(TrainerCallback):
    """How often the Trainer tells of its moments."""

    def __init__(self):
        self.calls = {"on_step_begin": 0, "on_optimizer_step": 0, "on_substep_end": 0}

    def __getattribute__(self, name):
        calls = object.__getattribute__(self, "calls") if name.startswith("on_") else {}
        if name in calls:
            calls[name] += 1
        return object.__getattribute__(self, name)


def every(path):
    return load_file(path / "adapter_model.safetensors")


def assert_same(a, b):
    found, wanted = every(a), every(b)
    assert found.keys() == wanted.keys()
    assert [k for k in found if not torch.equal(found[k], wanted[k])] == []
    assert undula.Adapter.load(a).methods == undula.Adapter.load(b).methods


@pytest.fixture(scope="module")
def whole(usual, tmp_path_factory):
    """The directory and the report of the run of that name, which nothing interrupted."""

    @functools.cache
    def trained(name):
        method, how = COURSES[name]
        out = tmp_path_factory.mktemp("whole") / "out"
        return out, undula.train(dataclasses.replace(usual, method=method, allocator=how, out=out))

    return trained


@each
def test_interruptions_change_nothing(name, usual, whole, tmp_path):
    """Stopped after 5 steps, on from the checkpoint of step 3; stopped after 9, on from there.  Each time through files
    and in a model that is opened anew."""
    method, how = COURSES[name]
    with pytest.raises(MemoryError, match="fallen over"):
        undula.train(
            dataclasses.replace(usual, method=method, allocator=how, out=tmp_path), callbacks=(Until(5, False),)
        )
    with pytest.raises(Interrupted, match="stopped at step 9 of 12"):
        undula.train(Run.load(tmp_path), resume=True, callbacks=(Until(9, True),))
    again = undula.train(Run.load(tmp_path), resume=True)
    assert again["resumed_from_step"] == 9
    out, report = whole(name)
    assert_same(tmp_path, out)
    same = ("before", "after", "ranks", "trainable_parameters")
    assert {key: again[key] for key in same} == {key: report[key] for key in same}


@pytest.mark.parametrize("name", ["Budget", "ReLoRA", "SRLoRA", "L2SP"])
def test_a_checkpoint_is_loaded_once(name, usual, tmp_path, monkeypatch):
    """Starting changes nothing, so what was loaded stands; and what begins a run is no part of one that goes on."""
    method, how = COURSES[name]
    run = dataclasses.replace(usual, method=method, allocator=how, out=tmp_path)
    with pytest.raises(MemoryError, match="fallen over"):
        undula.train(run, callbacks=(Until(5, False),))
    loaded, begun = [], []
    adopt = callback.adopt
    monkeypatch.setattr(callback, "adopt", lambda model, saved: (loaded.append(saved), adopt(model, saved)))
    monkeypatch.setattr(training, "restore", lambda live, saved: loaded.append(saved))
    probe = how.start(prepare(run).model, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), STEPS)
    monkeypatch.setattr(type(probe), "on_begin", begun.append)
    undula.train(Run.load(tmp_path), resume=True)
    assert (len(loaded), begun) == (1, [])


RANKS = {  # in all, at the least and at the most of six sites; how AdaLoRA and ALoRA share theirs out rests on rounding
    "DyLoRA": (18, 3, 3),
    "DyLoRA, frozen": (18, 3, 3),
    "DiffoRA": (9, 0, 3),
    "DiffoRA, shared": (18, 3, 3),
    "Budget": (8, 1, 2),
    "ReLoRA": (36, 6, 6),
    "LoRASC": (48, 8, 8),
    "LoRASC, whole": (36, 6, 6),
    "SRLoRA": (48, 8, 8),
}


@each
def test_what_is_saved_and_reported(name, whole):
    (method, how), (out, report) = COURSES[name], whole(name)
    assert report == json.loads((out / "report.json").read_text())
    assert ranks.Allocator.decode(report["allocator"]) == how
    assert (Run.load(out).method, Run.load(out).allocator) == (method, how)
    total, least, most = (report["ranks"][k] for k in ("total", "least", "most"))
    assert (total, least, most) == RANKS.get(name, (total, least, most))
    assert total == 6 or name not in ("AdaLoRA", "ALoRA")
    assert 0 <= least <= total / 6 <= most
    assert evaluate(out) == report["after"]
    assert report["after"]["loss"] != report["before"]["loss"]


def test_once_per_update_whatever_the_accumulation(usual, tmp_path):
    """Eight rows at once, or twice four: the course hears the same, and sees the same gradients."""
    config = AutoConfig.from_pretrained(usual.model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    AutoModel.from_pretrained(usual.model, config=config).save_pretrained(tmp_path / "still")
    tiny.tokenizer(tmp_path / "still")
    method, how = COURSES["AdaLoRA"]
    run = dataclasses.replace(usual, model=str(tmp_path / "still"), method=method, allocator=how, train_rows=48,
                              dtype=torch.float64)  # fmt: skip
    found = []
    for batch, accumulate in ((8, 1), (4, 2)):
        heard, out = Counted(), tmp_path / str(batch)
        undula.train(dataclasses.replace(run, out=out, batch=batch, accumulate=accumulate), callbacks=(heard,))
        state = json.loads((out / "checkpoints" / "checkpoint-12" / "allocator.json").read_text())
        assert state["step"] == heard.calls["on_step_begin"] == heard.calls["on_optimizer_step"] == STEPS
        assert heard.calls["on_substep_end"] == STEPS * (accumulate - 1)
        found.append(every(out))
    for key, t in found[0].items():
        torch.testing.assert_close(found[1][key], t)


@each
def test_a_method_that_is_not_served_is_refused_first(name, usual):
    """Before anything is opened: neither the model nor the data exist."""
    _, how = COURSES[name]
    stranger = undula.AuroRA()
    if how.serves(stranger):  # a penalty goes with every method, with the head alone it does not
        with pytest.raises(ValueError, match="works on Method, not on None"):
            dataclasses.replace(usual, allocator=how)
        return
    nowhere = {"model": "nowhere", "data": "nothing", "method": stranger}
    serving = how.procedures[0] if isinstance(how, ranks.Together) else how
    served = "trained gate" if name == "SoRA" else serving.works_on[0].__name__
    with pytest.raises(ValueError, match=rf"works on .*{served}.*not on AuroRA\("):
        dataclasses.replace(usual, **nowhere, allocator=how)
    with pytest.raises(ValueError, match="not on None"):
        dataclasses.replace(usual, allocator=how)
    with pytest.raises(ValueError, match=r"not on AuroRA\("):
        dataclasses.replace(usual, method=COURSES[name][0], allocator=how, overrides={"*.query": stranger})


# The command line


def call(*words, code=0):
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == code, (done.stdout, done.stderr)
    return " ".join((done.stdout if code == 0 else done.stderr).split())


def test_on_the_command_line(bert, reviews, tmp_path):
    usual = ("train", "--model", bert, "--data", reviews, "--task", "classification", "--max-steps", 8, "--batch", 4)
    gated = (*usual, "--method", "adalora", "--set", "r=6")
    shown = call(*gated, "--allocator", "adalora", "--allocate", "target=4", "--out", tmp_path / "a")
    assert "52 ranks (" in shown  # 4 at each of 13 layers
    assert "at a site), 8 steps" in shown
    assert Run.load(tmp_path / "a").allocator == ranks.AdaLoRA(target=4)
    assert sum(ranks.live(undula.Adapter.load(tmp_path / "a")).values()) == 52
    bad = {
        ("--allocator", "adalora"): "works on AdaLoRA, not on LoRA(r=8",
        ("--allocator", "adolora"): "no procedure is called 'adolora'; there are: ALoRA, AdaLoRA, Budget",
        ("--allocate", "target=4"): "--allocate has the options of a procedure: name one with --allocator",
        ("--allocator", "relora", "--allocate", "cycle=2"): "ReLoRA has no option cycle; it has: cycles",
    }
    for words, message in bad.items():
        assert message in call(*usual, *words, "--out", tmp_path / "no", code=2)
    assert not (tmp_path / "no").exists()
    two = ("--allocator", "together", "--allocate")
    call(*usual, *two, "procedures=relora,l2sp", "--out", tmp_path / "b")
    assert Run.load(tmp_path / "b").allocator == ranks.Together((ranks.ReLoRA(), ranks.L2SP()))
    assert "change the ranks of the same" in call(*usual, *two, "procedures=relora,lorasc", "--out", tmp_path, code=2)
    table = {"procedures": [{"is": "relora", "cycles": 2}, "l2sp"]}  # as in a study file
    wanted = ranks.Together((ranks.ReLoRA(cycles=2), ranks.L2SP()))
    assert build_from(ranks.Procedure, "together", table) == wanted


def test_prune_and_cut(whole, tmp_path):
    """What they leave computes the same, is plain LoRA and knows what it is for."""
    pruned = call("prune", whole("AdaLoRA")[0], "--out", tmp_path / "pruned")
    found = undula.Adapter.load(tmp_path / "pruned")
    assert {type(m) for m in found.methods.values()} == {undula.LoRA}
    assert sum(m.r for m in found.methods.values()) == 6
    assert f"{len(found.methods)} of 6 layers, {found.num_parameters():,} of" in pruned
    assert set(found.full) == {"classifier.weight", "classifier.bias"}
    assert evaluate(tmp_path / "pruned")["loss"] == pytest.approx(whole("AdaLoRA")[1]["after"]["loss"], rel=1e-5)
    assert Run.load(tmp_path / "pruned").allocator is None
    call("cut", whole("DyLoRA")[0], "--rank", 2, "--out", tmp_path / "two")
    assert set(undula.Adapter.load(tmp_path / "two").methods.values()) == {undula.LoRA(r=2)}
    assert set(evaluate(tmp_path / "two")) == set(whole("DyLoRA")[1]["after"])
    call("cut", whole("DyLoRA")[0], "--rank", 3, "--out", tmp_path / "three")
    assert evaluate(tmp_path / "three")["loss"] == pytest.approx(whole("DyLoRA")[1]["after"]["loss"], rel=1e-5)
    call("collapse", whole("AdaLoRA")[0], "--out", tmp_path / "flat", "--how", "truncate", "--set", "r=1")
    assert Run.load(tmp_path / "flat").method == undula.LoRA(r=1, alpha=1.0)  # and no allocator, which would refuse it
    mistakes = {
        ("prune", whole("DyLoRA")[0]): "has no gate to prune by",
        ("cut", whole("AdaLoRA")[0], "--rank", 2): "was not trained to be cut at any rank",
        ("cut", whole("DyLoRA")[0], "--rank", 4): "was trained at the ranks 1 to 3, not at 4",
        ("prune", tmp_path): "is no adapter directory",
    }
    for words, message in mistakes.items():
        assert message in call(*words, "--out", tmp_path / "no", code=2)
    assert not (tmp_path / "no").exists()
    assert "is not empty" in call("prune", whole("AdaLoRA")[0], "--out", tmp_path / "two", code=2)


# Studies

STUDY = """
seeds = [1]
[train]
steps = 12
batch = 4
evaluations = 4
where = ["query", "output.dense"]
[sweep]
rates = [1e-2]
[[models]]
source = "{model}"
[[data]]
source = "{data}"
task = "classification"
[[methods]]
method = "lora"
set = {{ r = 2 }}
"""
ARMS = """
[[methods]]
method = "gatedlora"
set = { r = 3 }
allocator = "diffora"
allocate = { rho = 0.3, search = 0.5, rest = "shared" }
[[methods]]
method = "lora"
set = { r = 2 }
allocator = "relora"
allocate = { cycles = 3, moments = { is = "pruned", share = 0.5 } }
"""


class First(Watch):
    """A watch that finds each evaluation worse than the first that counts; it notes what the model is then."""

    def evaluate(self, step):
        super().evaluate(step)
        if self.kept is None:
            return
        self.best = float("inf") if self.ready.run.task.more_is_better else -float("inf")
        if not hasattr(self, "noted"):
            self.noted = {f"{s}.{k}": t.detach().clone() for s, k, t in self.ready.adapter.tensors()}
            self.laws = dict(self.ready.adapter.methods)


@pytest.fixture(scope="module")
def study(bert, reviews):
    return STUDY.format(model=bert, data=reviews)


@pytest.mark.parametrize("arm", ["GatedLoRA + DiffoRA", "LoRA + ReLoRA"])
def test_a_study_keeps_the_best_point_whole(arm, study):
    """Gates, pasts and what is shared go back to where they were at the first evaluation that counts, and the figures
    of the run are of that point."""
    plan = Plan(parse(study + ARMS, check=False))
    cell = next(c for c in plan.cells if c.arm.name == arm)
    assert (
        cell.arm.allocator
        == {
            "LoRA + ReLoRA": ranks.ReLoRA(cycles=3, moments=ranks.restart.Pruned(0.5)),
            "GatedLoRA + DiffoRA": ranks.DiffoRA(rho=0.3, search=0.5, rest=diffora.Shared()),
        }[arm]
    )
    watch = First()
    found = perform(cell.trial(1e-2, 1, tested=True), watch)
    last = {f"{s}.{k}": t for s, k, t in watch.ready.adapter.tensors()}  # as the training ended
    kept = undula.selected(watch.ready.model)
    assert dict(kept.methods) == watch.laws
    assert all(torch.equal(t, watch.noted[f"{s}.{k}"]) for s, k, t in kept.tensors())
    assert len(watch.noted) == sum(1 for _ in kept.tensors())
    assert any(k not in watch.noted or not torch.equal(t, watch.noted[k]) for k, t in last.items())
    assert found["deployed_error"]["merged"] < 1e-4


FAULTS = """
[[methods]]
method = "lora"
allocator = "adolora"
[[methods]]
name = "orphaned"
method = "lora"
allocate = { target = 4 }
[[methods]]
name = "wrong"
method = "lora"
allocator = "adalora"
[[methods]]
method = "adalora"
allocator = "adalora"
allocate = { goal = 4 }
[[methods]]
method = "none"
allocator = "adalora"
"""


def test_faults_of_allocators_have_their_lines(study):
    with pytest.raises(Faults) as caught:
        parse(study + FAULTS, check=False)
    first = study.count("\n") + 1
    found = {line - first: text for line, text in caught.value.found}
    wanted = {3: "no procedure is called 'adolora'", 7: "name one (allocator = ...)", 11: "not on LoRA(r=8",
              15: "AdaLoRA has no option goal", 18: "method = 'none' has no ranks to allocate"}  # fmt: skip
    assert set(found) == set(wanted)
    for line, part in wanted.items():
        assert part in found[line], (line, found)


def test_budgets_of_equal_parameters(study):
    """Every registered method is brought within a quarter of the number, or the arm is refused by name."""
    sized, refused = {}, {}
    for name in sorted(m.__name__ for m in undula.Method.registry.values() if m.__module__.startswith("undula.")):
        given = {"Dropout": "inner = 'unilora'", "Centred": "inner = 'lora'"}.get(name, "")
        if name == "Sum":
            continue  # what arithmetic makes, nothing to train
        arm = f'[[methods]]\nname = "x"\nmethod = "{name}"\nset = {{ {given} }}\n'
        text = study + arm + "[[budgets]]\nparameters = 800\n"
        try:
            cells = Plan(parse(text, check=False)).cells
        except ValueError as error:
            refused[name] = str(error)
        else:
            (cell,) = [c for c in cells if c.arm.name == "x"]
            sized[name] = cell.method
    assert set(refused) == {"Fusion", "S2FT"}  # what it joins has a size already; channels are chosen from data
    assert all("x: the closest that it comes to 800 parameters is" in text for text in refused.values())
    assert (sized["UniLoRA"].d, sized["NOLA"].k, sized["NOLA"].l) == (800, 67, 67)  # 6 * 2 * 67 = 804
    assert (sized["VeRA"].r, sized["GatedLoRA"].r) == (96, 2)  # twice the largest side, as far as it goes
    assert sized["Dropout"].inner.d == 800


# Starts from data

FROM_DATA = {
    "LoRASB": undula.LoRASB(r=4),
    "LoRAGA": undula.Centred(undula.LoRA(r=2), starts.LoRAGA()),
    "EVA": undula.Centred(undula.LoRA(r=2), starts.EVA()),
    "SHiRA": undula.SHiRA(r=1, mask=starts.masks.Gradient()),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"), hidden=64, intermediate=64)


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    prompts = [f"the {a} {b} was" for a in ("film", "food") for b in ("day", "angry", "sad", "fine")]
    rows = [{"text": p, "summary": w} for p in prompts for w in tiny.GOOD + tiny.BAD]
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", FROM_DATA)
def test_starts_from_data_find_it(name, bits, llama, continued, tmp_path):
    """Nobody gives a probe: the training's own rows are it.  What starts there is saved, and read without them."""
    if bits:
        pytest.importorskip("bitsandbytes")
    run = Run(model=llama, data=continued, task=CausalLM(generate=0), method=FROM_DATA[name], out=tmp_path, lr=1e-2,
              where=("q_proj", "down_proj"), max_steps=8, batch=4, bits=bits, save_every=8)  # fmt: skip
    report = undula.train(run)
    assert report["after"]["loss"] < report["before"]["loss"]
    assert evaluate(tmp_path) == report["after"]


def test_the_probe_is_asked_by_those_alone_who_need_it(usual, monkeypatch, tmp_path):
    """No row is made an example for a LoRA before the training; `probe_batches` of 4 rows for LoRA-GA."""
    asked = []
    own = Examples.__getitem__
    usual = dataclasses.replace(usual, gradient_checkpointing=False)  # whether it is needed is told by rows too
    monkeypatch.setattr(Examples, "__getitem__", lambda self, i: asked.append(i) or own(self, i))
    for method in (undula.LoRA(r=2), undula.SHiRA(r=1)):
        prepare(dataclasses.replace(usual, method=method))
    assert asked == []
    data_driven = dataclasses.replace(usual, method=FROM_DATA["LoRAGA"])
    prepare(dataclasses.replace(data_driven, probe_batches=3))
    assert len(asked) == len(set(asked)) == 12
    asked.clear()
    prepare(data_driven)
    assert len(asked) == 32
    with pytest.raises(ValueError, match="probe_batches is at least 1, found 0"):
        dataclasses.replace(usual, probe_batches=0)


# transformers.Trainer alone


@pytest.mark.parametrize("name", ["AdaLoRA", "DiffoRA, shared", "ReLoRA"])
def test_a_trainer_without_undula_train(name, bert, tmp_path):
    """It trains, saves the adapter beside the model, and goes on to the bit where the adapter was attached anew."""
    method, how = COURSES[name]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = [tokenizer(r["text"]) | {"labels": int(r["label"] == "good")} for r in tiny.reviews(40)]

    def trainer(*callbacks):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
        undula.attach(model, method, WHERE, full=["classifier"])
        arguments = TrainingArguments(str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, save_steps=5,
                                      learning_rate=1e-2, report_to=[], disable_tqdm=True)  # fmt: skip
        return Trainer(model, arguments, DataCollatorWithPadding(tokenizer), rows,
                       callbacks=[undula.allocating(how), *callbacks])  # fmt: skip

    through = trainer()
    through.train()
    adapter = undula.selected(through.model)
    loaded = undula.Adapter.load(tmp_path / "checkpoint-5")
    assert loaded.shapes == adapter.shapes
    shutil.rmtree(tmp_path / "checkpoint-10")
    shutil.rmtree(tmp_path / "checkpoint-12", ignore_errors=True)
    again = trainer()
    again.train(resume_from_checkpoint=True)
    found = undula.selected(again.model)
    assert found.methods == adapter.methods
    for (s, k, t), (_, _, wanted) in zip(found.tensors(), adapter.tensors(), strict=True):
        assert torch.equal(t, wanted), (s, k)
    assert all(torch.equal(t, adapter.full[n]) for n, t in found.full.items())
    (tmp_path / "checkpoint-5" / "allocator.json").unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint-5"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
