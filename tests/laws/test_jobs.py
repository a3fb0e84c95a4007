"""Many jobs at once: each one's weights are those that it would have alone."""

import dataclasses
import errno
import itertools
import json
import shutil
import signal

import pytest
import torch
import transformers

import undula
from tests.support import tiny
from undula import DoRA, Dropout, LoRA, Sum
from undula.jobs import checkpoint, ending
from undula.jobs.causal import Causal
from undula.jobs.checks import faults_of
from undula.jobs.course import Course
from undula.jobs.engine import Engine
from undula.jobs.kept import Best
from undula.jobs.planner import apart, flat, padded, together
from undula.jobs.view import Silent
from undula.optim.optimisers import (
    GORP,
    SGD,
    ALLoRA,
    LoRAFA,
    LoRAGGPO,
    LoRAMGPO,
    LoRAPro,
    LoRSum,
    Riemannian,
    SAMReference,
)
from undula.train import CausalLM, Classification, Interrupted, Run, Seq2Seq, page
from undula.train.tasks.step import Step

METHODS = [Dropout(LoRA(r=2), p=0.3), LoRA(r=2), DoRA(LoRA(r=3)), undula.LoRAN(r=2), undula.VeRA(r=4)]


@pytest.fixture(scope="module", autouse=True)
def no_pages():
    """Drawing takes most of the time of so small trainings."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(page, "write", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    pairs = [{"prompt": f"the {' '.join(['film'] * (i % 5))} is", "completion": f"very {w} and {w}"}
             for i, w in enumerate((tiny.GOOD + tiny.BAD) * 2)]  # fmt: skip
    return tiny.llama(folder / "llama"), tiny.jsonl(folder / "pairs.jsonl", pairs)


def run_of(base, out, method=METHODS[1], **more):
    model, data = base
    usual = {"lr": 1e-2, "max_steps": 3, "batch": 2, "eval_every": 0, "dtype": torch.float64, "warmup": 0.0,
             "eval_rows": 3, "task": CausalLM(generate=0)}  # fmt: skip
    return Run(model=model, data=data, method=method, out=out, **usual | more)


def several(base, folder):
    """Runs that differ in whatever may differ."""
    return {
        str(i): run_of(
            base, folder / str(i), method, seed=i, batch=1 + i % 3, accumulate=1 + i % 2, max_steps=2 + i % 3,
            lr=1e-2 / (1 + i), b_ratio=4.0 if i == 1 else None, max_grad_norm=0.1 if i == 2 else 0.0,
            **({"optimiser": LoRAPro()} if i == 2 else {}),
        )
        for i, method in enumerate(METHODS)
    }  # fmt: skip


def planned(pieces):
    """So small micro-batches that steps are spread over several."""
    return together(pieces, 40)


def weights(out):
    saved = undula.Adapter.load(out)
    return {(site, name): t for site, name, t in saved.tensors()} | {("", n): t for n, t in saved.full.items()}


def same(one, other, **how):
    one, other = weights(one), weights(other)
    assert set(one) == set(other)
    for key, t in one.items():
        torch.testing.assert_close(t, other[key], **how)


def alone(run, out):
    """The directory of the engine with this job alone."""
    Engine({"one": dataclasses.replace(run, out=out)}).run()
    return out


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """{name: (its run among others, its directory alone)}."""
    folder = tmp_path_factory.mktemp("trained")
    runs = several(llama, folder / "many")
    reports = Engine(runs, planner=planned).run()
    assert {name: report["state"] for name, report in reports.items()} == dict.fromkeys(runs, "done")
    return {name: (run, alone(run, folder / "alone" / name)) for name, run in runs.items()}


def test_among_others_each_job_has_the_weights_that_it_has_alone(trained):
    """With dropout too, whose numbers are a job's own."""
    for run, by_itself in trained.values():
        same(run.out, by_itself)


def test_each_job_may_have_an_optimiser_that_sees_pairs(llama, tmp_path):
    """Or it is refused with the reason: what acts on the forward passes would act on the others' too."""
    served = (ALLoRA(), ALLoRA(gradient=True, products=True), Riemannian(), LoRAPro())
    runs = {str(i): run_of(llama, tmp_path / str(i), LoRA(r=2), optimiser=how) for i, how in enumerate(served)}
    Engine(runs, planner=planned).run()
    for name, run in runs.items():
        same(run.out, alone(run, tmp_path / f"alone-{name}"))
    apart = (LoRAMGPO(), LoRAGGPO(), LoRSum(), SAMReference(), LoRAFA(), GORP(), LoRAPro(full=True))
    odd = {str(i): run_of(llama, tmp_path / f"odd{i}", LoRA(r=2), optimiser=how) for i, how in enumerate(apart)}
    told = faults_of(odd)
    assert set(told) == set(odd)
    assert all(run.optimiser.apart in told[name][0] for name, run in odd.items())


def separately(pieces):
    return apart(pieces, 40)


def test_in_steps_of_their_own_jobs_have_the_weights_that_they_have_in_shared_ones(trained, tmp_path):
    """So that what is quicker may be chosen, at any round."""
    runs = {name: dataclasses.replace(run, out=tmp_path / name) for name, (run, _) in trained.items()}
    ways = itertools.cycle([separately, planned])

    def in_turn(pieces):
        return next(ways)(pieces)

    Engine(runs, planner=in_turn).run()
    for name, run in runs.items():
        same(run.out, trained[name][0].out)


@pytest.mark.parametrize("name", ["1", "2"])
def test_alone_in_the_engine_a_job_has_the_weights_of_train(name, trained, tmp_path):
    """Without dropout, which has other numbers there.  transformers computes the loss in float32."""
    run, by_itself = trained[name]
    undula.train(dataclasses.replace(run, out=tmp_path))
    same(tmp_path, by_itself, rtol=1e-5, atol=1e-5)


class Killed(BaseException):
    """What nothing catches, as a kill."""


class Watch(Silent):
    """Does what it is told after a job's step, and keeps what is said."""

    def __init__(self, **told):
        self.told, self.words = told, []

    def said(self, text):
        self.words.append(text)

    def stepped(self, job):
        if (what := self.told.get(f"at_{job.name}_{job.step}")) is not None:
            what()


def three(base, folder):
    """Runs of three lengths, with dropout, evaluations and checkpoints at each step."""
    more = {"save_every": 1, "eval_every": 2}
    return {
        "a": run_of(base, folder / "a", Dropout(LoRA(r=2), p=0.3), max_steps=5, optimiser=LoRAPro(), **more),
        "b": run_of(base, folder / "b", DoRA(LoRA(r=2)), max_steps=2, seed=1, **more),
        "c": run_of(base, folder / "c", undula.LoRAN(r=2), max_steps=4, seed=2, batch=3, optimiser=SGD(), **more),
    }


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """{name: its run}, trained without an interruption."""
    runs = three(llama, tmp_path_factory.mktemp("whole"))
    Engine(runs, planner=planned).run()
    return runs


def killed(*_):
    raise Killed


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["while all are saved", "while a job is measured", "on Ctrl-C", "on a full disk"])
def test_after_a_kill_each_job_goes_on_to_the_weights_of_the_uninterrupted_one(
    when, whole, llama, tmp_path, monkeypatch
):
    cut = three(llama, tmp_path)
    told = {"at_a_3": lambda: signal.raise_signal(signal.SIGINT)} if when == "on Ctrl-C" else {}
    first = Engine(cut, planner=planned, view=Watch(**told))
    with monkeypatch.context() as m:
        if when == "while all are saved":
            save, calls = checkpoint.save, iter(range(100))
            m.setattr(checkpoint, "save", lambda *args: killed() if next(calls) == 7 else save(*args))
        if when == "while a job is measured":
            m.setattr(ending, "report", killed)
        if when == "on a full disk":  # no job's fault: none of them has failed
            keep, calls = Best.on_evaluate, iter(range(100))
            m.setattr(Best, "on_evaluate", lambda *args, **how: full() if next(calls) == 2 else keep(*args, **how))
        ends = {"on Ctrl-C": Interrupted, "on a full disk": OSError}
        with pytest.raises(ends.get(when, Killed)):
            first.run()
    jobs = Engine(cut, planner=planned, resume=True)
    reports = jobs.run()
    assert [job.error for job in jobs.jobs.values()] == [None] * 3
    assert not list(tmp_path.rglob("*.part"))
    assert reports["a"]["resumed_from_step"] > 0
    for name, run in whole.items():
        same(run.out, cut[name].out, rtol=0, atol=0)
        assert reports[name]["losses"] == json.loads((run.out / "report.json").read_text())["losses"]
        assert reports[name]["evaluations"] == json.loads((run.out / "report.json").read_text())["evaluations"]


def test_a_job_that_joins_late_and_those_that_end_early_change_no_other(llama, trained, tmp_path):
    """One diverges, one in its last step, one cannot even begin, one is stopped, one has no better evaluation."""
    runs = {
        "1": dataclasses.replace(trained["1"][0], out=tmp_path / "1"),
        "wild": run_of(llama, tmp_path / "wild", lr=1e38, max_steps=9),
        "last": run_of(llama, tmp_path / "last", lr=1e38, max_steps=1),
        "lost": run_of((llama[0], "nowhere.jsonl"), tmp_path / "lost"),
        "stopped": run_of(llama, tmp_path / "stopped", max_steps=50),
        "stale": run_of(llama, tmp_path / "stale", max_steps=50, eval_every=1, patience=1, lr=1e-12),
    }
    late = dataclasses.replace(trained["2"][0], out=tmp_path / "2")
    engine = Engine(runs, view=Watch(at_1_1=lambda: engine.add("2", late), at_1_3=lambda: engine.stop("stopped")))
    reports = engine.run()
    assert {name: job.state for name, job in engine.jobs.items()} == {
        "1": "done", "wild": "diverged", "last": "diverged", "lost": "failed", "stopped": "stopped", "stale": "done",
        "2": "done"
    }  # fmt: skip
    assert reports["wild"]["state"] == "diverged"
    assert "diverged at step" in engine.jobs["wild"].error
    assert "nowhere.jsonl" in engine.jobs["lost"].error
    assert reports["lost"] is None
    assert reports["stopped"]["steps"] < 9
    assert reports["stale"]["ended_early"]
    for name in ("1", "2"):
        same(tmp_path / name, trained[name][1])


def test_rows_that_a_model_would_not_keep_apart_are_padded_with_the_same_result(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(CausalLM, "step", lambda *_: Step(note="they would see each other"))
    runs = {name: dataclasses.replace(trained[name][0], out=tmp_path / name) for name in ("0", "2", "4")}
    engine = Engine(runs)
    engine.run()
    assert engine.base.size is padded
    for name, run in runs.items():
        same(run.out, trained[name][1])


def test_the_dropout_of_attention_is_each_jobs_own(llama, tmp_path):
    """Where each row is attended to by itself, in turn."""
    model = shutil.copytree(llama[0], tmp_path / "drops")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    base = (str(model), llama[1])
    runs = {name: run_of(base, tmp_path / name, seed=i, max_steps=2, batch=3) for i, name in enumerate("ab")}
    Engine(runs, planner=planned).run()
    same(runs["b"].out, alone(runs["b"], tmp_path / "alone"))
    still = alone(dataclasses.replace(runs["b"], model=llama[0]), tmp_path / "still")
    assert any(not torch.allclose(t, weights(still)[key]) for key, t in weights(runs["b"].out).items())


def test_what_jobs_cannot_share_is_said_at_once_and_of_all(llama, tmp_path):
    fine = run_of(llama, tmp_path / "a")
    odd = dataclasses.replace(fine, dtype=torch.float32, task=Seq2Seq(), allocator=undula.ranks.L2SP())
    with pytest.raises(ValueError, match=r"(?s)b: Seq2Seq cannot.*b: L2SP.*b: dtype is float32.*b: it writes to"):
        Engine({"a": fine, "b": odd})
    with pytest.raises(ValueError, match="no job"):
        Engine({})


def test_a_finished_job_is_an_ordinary_run_directory(trained):
    run, _ = trained["3"]
    report = json.loads((run.out / "report.json").read_text())
    assert report["trained_among"] == ["0", "1", "2", "4"]
    assert (report["state"], report["steps"]) == ("done", 2)
    assert Run.load(run.out).encode() == run.encode()
    assert undula.evaluate(run.out) == report["after"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A base, and rows of two and of three classes."""
    folder = tmp_path_factory.mktemp("encoders")
    rows = tiny.reviews(24)
    more = [{**row, "label": f"{row['label']}{i % 2}" if i % 3 else "odd"} for i, row in enumerate(rows)]
    return tiny.bert(folder / "bert"), [
        tiny.jsonl(folder / f"{n}.jsonl", r) for n, r in (("two", rows), ("more", more))
    ]


def classifiers(bert, folder):
    model, (two, more) = bert
    task = Classification()
    return {
        "a": run_of((model, two), folder / "a", Dropout(LoRA(r=2), p=0.3), task=task, seed=3, accumulate=2),
        "b": run_of((model, more), folder / "b", undula.AuroRA(r=2), task=task, batch=5, head_lr=1e-1),
        "c": run_of((model, two), folder / "c", DoRA(LoRA(r=2)), task=Classification(class_weights="balanced")),
        "d": run_of((model, two), folder / "d", None, task=task, max_steps=2),
        "e": run_of((model, more), folder / "e", task=task, full=("bert.pooler.dense",), exclude=("*pooler*",)),
    }


def test_each_classifier_has_the_head_that_it_has_alone_over_the_shared_body(bert, tmp_path):
    """With the base's own dropout, whose numbers are each job's own."""
    runs = classifiers(bert, tmp_path / "many")
    view = Watch()
    engine = Engine(runs, planner=lambda pieces: together(pieces, 80), view=view)
    reports = engine.run()
    assert engine.base.size is flat  # as in a training of one
    assert view.words == []  # they do mix
    assert {name: job.error for name, job in engine.jobs.items()} == dict.fromkeys(runs)
    for name, run in runs.items():
        same(run.out, alone(run, tmp_path / "alone" / name))
        assert undula.evaluate(run.out) == reports[name]["after"]
    assert len(weights(runs["b"].out)["", "classifier.bias"]) > 2


def test_without_dropout_a_classifier_is_that_of_train(bert, tmp_path):
    model = shutil.copytree(bert[0], tmp_path / "still")
    config = json.loads((model / "config.json").read_text())
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config | none))
    for name, run in classifiers((str(model), bert[1]), tmp_path / "jobs").items():
        if name in "be":
            undula.train(dataclasses.replace(run, out=tmp_path / name))
            same(tmp_path / name, alone(run, run.out), rtol=1e-5, atol=1e-5)


def test_activations_computed_again_ask_for_no_gradient_below_the_jobs(llama, tmp_path):
    """Transformers would have the embeddings' outputs want one, and all layers below the adapters run backward."""
    base = Causal()
    ready, _ = base.prepared(run_of(llama, tmp_path / "out", gradient_checkpointing=True), "out")
    ready.model.train()
    seen = []
    ready.model.model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].requires_grad))
    ready.model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert ready.model.is_gradient_checkpointing
    assert seen
    assert not any(seen)
    assert all(t.grad is not None for t in ready.adapter.parameters())


def test_where_the_first_job_cannot_begin_the_next_one_tells_how_the_model_takes_steps(llama, tmp_path, monkeypatch):
    """Else rows would stand behind each other whether the model keeps them apart or not, and a model that trains by
    more than its labels would be refused once alone."""
    lost = run_of(llama, tmp_path / "lost", where="nowhere")
    engine = Engine({"lost": lost, "fine": run_of(llama, tmp_path / "fine", max_steps=1)})
    engine.run()
    assert [job.state for job in engine.jobs.values()] == ["failed", "done"]
    assert engine.base.step.gather is not None

    def refused(*_):
        raise ValueError("trains by more than its labels")

    monkeypatch.setattr(Causal, "_see", refused)
    engine = Engine({name: run_of(llama, tmp_path / name, max_steps=1) for name in "ab"})
    engine.run()
    assert [job.state for job in engine.jobs.values()] == ["failed"] * 2


def test_a_model_whose_experts_are_to_be_evenly_used_is_refused(llama, tmp_path):
    """By transformers' own weight of that, 1e-3."""
    folder = tmp_path / "moe"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "num_local_experts": 3}  # fmt: skip
    config = transformers.MixtralConfig(vocab_size=len(tiny.tokenizer(folder)), output_router_logits=True, **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    engine = Engine({"a": run_of((str(folder), llama[1]), tmp_path / "a", max_steps=1, dtype=torch.float32)})
    engine.run()
    assert engine.jobs["a"].state == "failed"
    assert "trains by more than its labels" in engine.jobs["a"].error


def test_whatever_fails_of_a_job_ends_it_alone(trained, llama, tmp_path, monkeypatch):
    """A row, a step of the optimiser, an evaluation."""
    wrong = ("next_step", "stepped", "evaluate")
    runs = {name: run_of(llama, tmp_path / name, eval_every=0.5) for name in wrong}
    runs["1"] = dataclasses.replace(trained["1"][0], out=tmp_path / "1")

    def failing(what, usual):
        def call(course, *given):
            if course.job.name == what:
                raise RuntimeError(f"no {what}")
            return usual(course, *given)

        return call

    for what in wrong:
        monkeypatch.setattr(Course, what, failing(what, getattr(Course, what)))
    engine = Engine(runs)
    engine.run()
    assert {name: job.error for name, job in engine.jobs.items()} == {
        **{what: f"RuntimeError: no {what}" for what in wrong}, "1": None
    }  # fmt: skip
    same(tmp_path / "1", trained["1"][1])


def test_a_job_may_be_added_before_the_others_begin_and_none_when_all_have_ended(llama, tmp_path):
    runs = {name: run_of(llama, tmp_path / name, max_steps=1) for name in "123"}
    engine = Engine({"1": runs["1"]})
    engine.add("2", runs["2"])
    engine.run()
    assert [job.state for job in engine.jobs.values()] == ["done"] * 2
    with pytest.raises(RuntimeError, match="'3' was not begun"):
        engine.add("3", runs["3"])


@pytest.mark.parametrize("where", ["adapter", "within a sum", "model"])
def test_dropout_that_would_be_computed_again_is_refused_before_anything_begins(where, llama, tmp_path):
    model, data = llama
    if where == "model":
        model = shutil.copytree(model, tmp_path / "drops")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    drops = Dropout(LoRA(r=2), p=0.3)
    method = {"adapter": drops, "within a sum": Sum((LoRA(r=2), drops), (1.0, 1.0)), "model": LoRA(r=2)}[where]
    run = run_of((str(model), data), tmp_path / "a", method, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"a: gradient_checkpointing computes dropout again.*(Dropout\(|=0.5 in)"):
        Engine({"a": run})
