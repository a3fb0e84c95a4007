"""`undula train` on several processes, started as torchrun starts them: each has its rank in the environment."""

import dataclasses
import json

import pytest
import torch
import transformers

import undula
from tests.support import tiny
from undula.optim.optimisers import SGD, LoRAPro
from undula.train import CausalLM, Classification, Run, processes
from undula.train.prepared import prepare
from undula.train.trainer import trainer

from ..support.processes import together

SCRIPT = """
import dataclasses, gc, json, os, pathlib, shutil, signal, sys
import torch, transformers, undula
from typer.testing import CliRunner
from undula.cli import app
from undula.optim.optimisers import SGD, LoRAPro
from undula.train import CausalLM, Classification, Interrupted, Run, prepared

folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
usual = Run(model=str(folder / "llama"), data=str(folder / "pairs.jsonl"), task=CausalLM(generate=0),
            method=undula.LoRA(r=2), out=folder / "lm", lr=1e-2, batch=4, train_rows=64, max_steps=3, save_every=1)
classes = dataclasses.replace(usual, model=str(folder / "bert"), data=str(folder / "reviews.csv"),
                              task=Classification(), out=folder / "classes", batch=2, accumulate=2)
at_once = dataclasses.replace(classes, out=folder / "at-once", batch=4, accumulate=1, optimiser=LoRAPro(base=SGD()))
told = {}


class At(transformers.TrainerCallback):
    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **_):
        wrapped = [o for o in gc.get_objects() if type(o) is torch.nn.parallel.DistributedDataParallel]
        told["looks for unused"] = sorted({o.find_unused_parameters for o in wrapped})
        if state.global_step == self.step:
            self.what(control)


def raised(*args, **more):
    try:
        undula.train(*args, **more)
    except Exception as error:
        return [type(error).__name__, str(error)]


def interrupt(control):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGINT)


def stop(control):
    control.should_training_stop = control.should_training_stop or rank == 1


told["report"] = undula.train(usual)
told["again"] = raised(usual)
undula.train(classes, callbacks=[At(9, stop)])
undula.train(at_once)
told["looks"] = told["looks for unused"]
measured = dataclasses.replace(classes, out=folder / "measured", max_steps=6, eval_every=1, patience=2)
told["measured"] = undula.train(measured)
cut = dataclasses.replace(usual, out=folder / "cut")
told["interrupted"] = raised(cut, callbacks=[At(2, interrupt)])
torch.distributed.barrier()
if rank == 0:
    shutil.copytree(folder / "cut", folder / "left")
torch.distributed.barrier()
told["resumed"] = undula.train(cut, resume=True)["resumed_from_step"]
opened = prepared.open_model


def with_a_spare(*given):
    model, processor = opened(*given)
    model.model.layers[0].spare = torch.nn.Linear(4, 4)
    return model, processor


prepared.open_model = with_a_spare
early = dataclasses.replace(usual, out=folder / "early", train_rows=61)
told["early"] = undula.train(early, callbacks=[At(1, stop)])
told["looks with a spare"] = told["looks for unused"]
prepared.open_model = opened

line = f"train --model {folder}/llama --data {folder}/pairs.jsonl --task causal-lm --task-set generate=0 --max-steps 1"
shown = CliRunner().invoke(app, [*line.split(), "--out", str(folder / "typed")])
told["typed"] = [shown.exit_code, shown.output]
wrong = CliRunner().invoke(app, [*line.split(), "--out", str(folder / "typed")])
told["typed again"] = [wrong.exit_code, wrong.output]
os.environ["TORCHELASTIC_RUN_ID"] = "none"
told["eval"] = CliRunner().invoke(app, ["eval", str(folder / "typed")]).exit_code
del os.environ["WORLD_SIZE"]
told["unsaid"] = raised(dataclasses.replace(usual, out=folder / "unsaid"))
(folder / f"told{rank}.json").write_text(json.dumps(told))
"""


def _runs(folder):
    usual = Run(
        model=str(folder / "llama"),
        data=str(folder / "pairs.jsonl"),
        task=CausalLM(generate=0),
        method=undula.LoRA(r=2),
        out=folder / "lm",
        lr=1e-2,
        batch=8,
        train_rows=64,
        max_steps=3,
    )
    data = {"model": str(folder / "bert"), "data": str(folder / "reviews.csv"), "task": Classification()}
    classes = dataclasses.replace(usual, **data, out=folder / "classes")
    return usual, classes, dataclasses.replace(classes, out=folder / "at-once", optimiser=LoRAPro(base=SGD()))


@pytest.fixture(scope="module")
def two(tmp_path_factory, python):
    """(folder, what each of two processes told)."""
    folder = tmp_path_factory.mktemp("two")
    tiny.llama(folder / "llama")
    tiny.bert(folder / "bert")
    config = folder / "bert/config.json"  # masks of dropout are each process's own
    config.write_text(config.read_text().replace('_prob": 0.1', '_prob": 0.0'))
    tiny.table(folder / "reviews.csv", tiny.reviews(80))
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as f:
        for i in range(80):
            words = " ".join(tiny.WORDS[(i * k) % len(tiny.WORDS)] for k in range(1, 2 + i % 5))
            f.write(json.dumps({"prompt": f"the {tiny.WORDS[i % 10]}", "completion": words}) + "\n")
    together(python, folder, SCRIPT, 2)
    return folder, [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(2)]


def _close(one, other):
    one, other = undula.Adapter.load(one), undula.Adapter.load(other)
    for site, f in one.factors.items():
        for name, t in f.items():
            torch.testing.assert_close(other.factors[site][name], t, rtol=1e-4, atol=1e-5)
    for name, t in one.full.items():
        torch.testing.assert_close(other.full[name], t, rtol=1e-4, atol=1e-5)
    assert any(bool(f["B"].any()) for f in one.factors.values())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_two_processes_train_as_one_with_twice_the_rows(two, tmp_path, which):
    """Completions of unequal lengths (a mean over tokens), a head with and without accumulated batches (a mean over
    rows).  The losses too: Adam would hide gradients that are twice as large."""
    folder, _ = two
    run = _runs(folder)[which]
    undula.train(dataclasses.replace(run, out=tmp_path / "alone"))
    _close(tmp_path / "alone", run.out)
    reports = [json.loads((out / "report.json").read_text()) for out in (tmp_path / "alone", run.out)]
    losses = [[loss for _, loss in report["losses"]] for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_first_measures_writes_and_speaks_for_all(two):
    folder, told = two
    assert told[0]["report"] == told[1]["report"] == json.loads((folder / "lm/report.json").read_text())
    assert (told[0]["report"]["processes"], told[0]["report"]["rows_in_a_step"]) == (2, 8)
    assert "2 processes train with 4 rows each: 8 rows in a batch" in told[0]["report"]["data"]["notes"]
    (code, shown), (other, silent) = told[0]["typed"], told[1]["typed"]
    assert (code, other, silent) == (0, 0, "")
    assert "1 steps of 32 rows on 2 processes" in shown
    assert "2 processes train with 16 rows each: 32 rows in a batch" in shown


def test_the_first_measures_while_it_trains_and_all_agree_on_the_best_and_the_end(two, tmp_path):
    """Evaluations, the adapter that is kept and the step it ends at are those of one process with twice the rows."""
    folder, told = two
    run = dataclasses.replace(_runs(folder)[1], out=tmp_path / "alone", max_steps=6, eval_every=1, patience=2)
    alone, both = undula.train(run), told[0]["measured"]
    assert told[0]["measured"] == told[1]["measured"]
    assert (both["steps"], both["best"]["step"]) == (alone["steps"], alone["best"]["step"])
    assert [p["step"] for p in both["evaluations"]] == [p["step"] for p in alone["evaluations"]]
    for one, other in zip(alone["evaluations"], both["evaluations"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    _close(run.out, folder / "measured")


def test_a_directory_that_holds_a_run_is_refused_by_all(two):
    _, told = two
    assert told[0]["again"][0] == "FileExistsError"
    assert told[1]["again"][0] == "Elsewhere"
    assert "holds a run already" in told[0]["typed again"][1]
    assert [t["typed again"][0] for t in told] == [2, 2]
    assert told[1]["typed again"][1] == ""


def test_a_signal_to_one_stops_all_with_a_whole_checkpoint(two, tmp_path):
    """The line to go on with starts as many; another number would train other steps, and is refused."""
    folder, told = two
    for each in told:
        kind, text = each["interrupted"]
        assert kind == "Interrupted"
        assert f"torchrun --nproc-per-node 2 -m undula train --resume {folder / 'cut'}" in text
        assert each["resumed"] == 2
    whole, resumed = (undula.Adapter.load(folder / name) for name in ("lm", "cut"))
    for site, f in whole.factors.items():
        for name, t in f.items():
            assert torch.equal(resumed.factors[site][name], t), (site, name)
    with pytest.raises(ValueError, match="trains on 2 processes, and 1 were started"):
        undula.train(dataclasses.replace(_runs(folder)[0], out=folder / "left", batch=4), resume=True)


def test_what_stops_one_stops_all_and_rows_that_count_twice_are_told(two):
    _, told = two
    for each in told:
        assert (each["early"]["state"], each["early"]["steps"]) == ("stopped", 1)
        assert any(
            "61 rows are no multiple of 8: in each epoch 3 rows count twice" in n
            for n in each["early"]["data"]["notes"]
        )


def test_unused_parameters_are_looked_for_where_there_are_some(two):
    _, told = two
    for each in told:
        assert each["looks"] == [False]
        assert True in each["looks with a spare"]  # of DistributedDataParallel that lives still others may be there


def test_other_verbs_are_refused_under_torchrun(two):
    assert [t["eval"] for t in two[1]] == [2, 2]


def test_processes_that_the_environment_does_not_name_are_refused(two):
    """A group of two that transformers would not see: each would train by itself."""
    for each in two[1]:
        assert each["unsaid"][0] == "RuntimeError"
        assert "says that 1 processes were started, and 2 are joined" in each["unsaid"][1]


def test_processes_that_are_not_joined_do_not_train(two, monkeypatch, tmp_path):
    run = dataclasses.replace(_runs(two[0])[0], out=tmp_path / "out")
    ready = prepare(run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were started, and 1 are joined"):
        trainer(ready.run, ready.model, ready.train, ())


def test_one_process_uses_one_of_several_devices(two, monkeypatch, tmp_path):
    """`nn.DataParallel`, which the Trainer would take, cannot copy an adapted model."""

    class Two(transformers.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(CausalLM, "arguments", lambda _, **settings: Two(**settings))
    ready = prepare(dataclasses.replace(_runs(two[0])[0], out=tmp_path / "out"))
    made = trainer(ready.run, ready.model, ready.train, ())
    assert made.args.n_gpu == 1
    assert made.args.train_batch_size == 8


@pytest.mark.parametrize("what", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_cuts_the_model_is_refused(monkeypatch, what):
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    with pytest.raises(ValueError, match="cuts the model"):
        processes.join()
