"""`undula tune` and `--lr auto`: what they find, what they leave as it was, what they refuse."""

import dataclasses
import json
import math
import random

import numpy
import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula import penalties
from undula.cli.main import app
from undula.jobs.checks import check
from undula.optim.optimisers import SGD, LoRAPro
from undula.study.rates import around
from undula.train import CausalLM, Classification, Interrupted, Recipe, Run, prepare, tuning
from undula.train.trainer import trainer
from undula.train.trying import trying


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    data = tiny.jsonl(folder / "rows.jsonl", tiny.reviews(60))
    return Run(
        tiny.bert(folder / "bert"), data, Classification(), undula.LoRA(r=2), folder / "unused",
        where=("query", "value"), max_steps=8, batch=8, head_lr=1e-2, lr="auto",
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning-lm")
    rows = [{"prompt": "the film was", "completion": row["text"]} for row in tiny.reviews(30)]
    data = tiny.jsonl(folder / "rows.jsonl", rows)
    return Run(
        tiny.llama(folder / "llama"), data, CausalLM(generate=0), undula.DoRA(undula.LoRA(r=2)), folder / "unused",
        where=("q_proj", "up_proj"), max_steps=8, batch=4, lr="auto",
    )  # fmt: skip


def everything(model):
    """All that tuning could change, as bytes and texts."""
    tensors = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    drawn = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    own = {k: v for k, v in vars(model).items() if not k.startswith("_require_grads")}  # a list of hooks that is empty
    other = {k: repr(v) for k, v in own.items() if not isinstance(v, torch.Tensor | dict)}
    return tensors, drawn, modes, hooks, [p.grad is None for p in model.parameters()], other


def same(before, after):
    (tensors, drawn, *rest), (others, others_drawn, *others_rest) = before, after
    assert {n: t.dtype for n, t in tensors.items()} == {n: t.dtype for n, t in others.items()}
    assert all(torch.equal(t, others[n]) for n, t in tensors.items())
    assert torch.equal(drawn[0], others_drawn[0])
    assert drawn[1:] == others_drawn[1:]
    assert rest == others_rest


CASES = {
    "packed rows, dropout": ("usual", {"method": undula.Dropout(undula.LoRA(r=2), p=0.3)}),
    "the fused head": ("written", {}),
    "half a model": ("written", {"dtype": torch.bfloat16, "gradient_checkpointing": True, "accumulate": 2}),
    "all parameters": ("usual", {"method": None, "where": "all-linear", "full": ("*",)}),
    "plain descent": ("usual", {"optimiser": SGD()}),
}


def made(run, folder):
    """What the run begins with, as making a Trainer of it leaves it (use_cache, hooks that transformers hangs in)."""
    ready = prepare(run)
    trainer(dataclasses.replace(ready.run, lr=1.0, out=folder / "made"), ready.model, ready.train, ())
    return ready


@pytest.mark.parametrize("case", CASES)
def test_a_rate_is_found_and_everything_is_as_it_was(case, request, tmp_path):
    name, changes = CASES[case]
    run = dataclasses.replace(request.getfixturevalue(name), **changes)
    ready = made(run, tmp_path)
    before = everything(ready.model)
    found = tuning.tuned(ready)
    same(before, everything(ready.model))
    losses = [loss for _, loss in found.curve if math.isfinite(loss)]
    assert dict(found.curve)[found.lowest] <= min(losses) + tuning.FLAT * found.before
    assert min(losses) < found.before
    assert tuning.LOWEST * 0.1 <= found.lr <= tuning.HIGHEST
    assert found.edge == pytest.approx(tuning.bound(run.optimiser) / found.curvature)
    assert found.lr == pytest.approx((tuning.BELOW * found.lowest * tuning.ABOVE * found.edge) ** 0.5, rel=0.06)
    assert found.gradients == run.accumulate * len(found.curve) + 2 * tuning.PRODUCTS
    assert json.loads(json.dumps(found.encode()))["lr"] == found.lr


def test_the_test_moves_what_follows_the_rate_and_nothing_else(usual):
    """The head keeps its rate, B has its multiple."""
    with trying(prepare(dataclasses.replace(usual, b_ratio=4.0))) as walk:
        walk.step(1e-3)
        rates = {id(p): g["lr"] for g in walk.optimiser.param_groups for p in g["params"]}
        named = {n: rates[id(p)] for n, p in walk.model.named_parameters() if id(p) in rates}
        assert {lr for n, lr in named.items() if n.endswith(".B")} == {4e-3}
        assert {lr for n, lr in named.items() if n.endswith(".A")} == {1e-3}
        assert {lr for n, lr in named.items() if n.startswith("classifier")} == {1e-2}
        assert {rate for _, rate in walk.followed} == {1.0, 4.0}


def test_a_step_of_the_test_is_the_trainings(usual, tmp_path):
    """The first step of a run without a warm-up, at its rate, ends at the same factors to the bit."""
    run = dataclasses.replace(usual, lr=3e-3, warmup=0.0, head_lr=None, out=tmp_path / "out", keep_best=False)
    ready = prepare(run)
    with trying(ready) as walk:
        walk.step(3e-3)
        tried = [p.detach().clone() for p in ready.adapter.parameters()]
    fitter = trainer(dataclasses.replace(run, max_steps=8), ready.model, ready.train, (Once(),))
    fitter.evaluate = lambda *_, **__: {}
    fitter.train()
    assert all(torch.equal(p, q) for p, q in zip(tried, ready.adapter.parameters(), strict=True))


class Once(TrainerCallback):
    """Ends a training after its first step, which draws as the test's does."""

    def on_train_begin(self, args, state, control, **_):
        torch.manual_seed(args.seed)

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = True


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_a_training_finds_its_rate_writes_it_and_goes_on_with_it(usual, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        undula.train(dataclasses.replace(usual, out=out, save_every=2), callbacks=[Killed()])
    told = json.loads((out / "run.json").read_text())
    assert told["run"]["lr"] == told["tuned"]["lr"] == undula.tune(usual).lr
    assert f"lr = {told['run']['lr']}" in (out / "run.toml").read_text()
    monkeypatch.setattr(tuning, "tuned", None)  # nothing is found again
    report = undula.train(dataclasses.replace(usual, out=out, save_every=2), resume=True)
    assert report["run"]["lr"] == told["run"]["lr"]
    assert report["tuned"] == told["tuned"] == json.loads((out / "run.json").read_text())["tuned"]


def test_auto_is_written_and_read_like_a_rate(usual, tmp_path):
    assert usual.lr is None
    usual_at = dataclasses.replace(usual, out=tmp_path / "out")
    usual_at.save(None)
    assert Run.load(tmp_path / "out") == usual_at
    assert Recipe.load(tmp_path / "out" / "run.toml").lr is None
    (tmp_path / "run.toml").write_text(
        'model = "m"\ndata = "d"\ntask = "classification"\nmethod = "lora"\nlr = "auto"\n'
    )
    assert Recipe.load(tmp_path / "run.toml").lr is None


def test_an_optimiser_without_a_known_preconditioner_goes_by_the_range_test(usual):
    found = undula.tune(dataclasses.replace(usual, optimiser=LoRAPro(), penalty=(penalties.GroupLasso(0.1),)))
    assert found.edge is None
    assert found.lr == pytest.approx(tuning.BELOW * found.lowest, rel=0.06)
    assert any("no preconditioner is known here" in note for note in found.notes)
    assert any("found without GroupLasso" in note for note in found.notes)


def test_few_rows_and_nothing_to_learn(usual, tmp_path):
    rows = tiny.reviews(40)
    few = dataclasses.replace(usual, data=tiny.jsonl(tmp_path / "few.jsonl", rows), train_rows=1, batch=1)
    assert any("(1 in all)" in note for note in undula.tune(few).notes)
    ready = made(few, tmp_path)
    with torch.no_grad():
        ready.model.classifier.weight.fill_(torch.inf)
    before = everything(ready.model)
    with pytest.raises(ValueError, match="the loss is nan before any step"):
        tuning.tuned(ready)
    same(before, everything(ready.model))
    with pytest.raises(ValueError, match="the loss is not finite after a step at 1e-05"):
        tuning._lowest([(1e-5, torch.nan), (1e-4, torch.inf)], 2.0)
    assert tuning._lowest([(1e-5, 2.0), (1e-4, 1.995), (1e-3, 2.005), (1e-2, 2.2), (1e-1, torch.nan)], 2.0) == 1e-3


def test_what_cannot_find_a_rate_says_so(usual, tmp_path, monkeypatch):
    ready = prepare(usual)
    with pytest.raises(ValueError, match=r"lr is auto, which undula\.train and undula\.tune find"):
        trainer(usual, ready.model, ready.train, ())
    with pytest.raises(ValueError, match="lr is auto, which is found for one training at a time"):
        check({"a": dataclasses.replace(usual, out=tmp_path / "a")})
    monkeypatch.setattr(tuning.processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="lr is auto, which one process finds: find it by `undula tune`"):
        tuning.with_rate(ready, False)


@pytest.mark.parametrize(
    ("losses", "ended"),
    [
        ([1.0, 1.1, 0.9], False),
        ([1.0, 1.1, 1.7], True),
        ([1.0, float("nan")], True),
        ([1.0, 0.5, *[1.06] * 5], False),
        ([1.0, 0.5, *[1.06] * 6], True),
        ([1.0, 0.5, *[1.04] * 9], False),
    ],
)
def test_a_range_test_ends_where_higher_rates_do_harm(losses, ended):
    assert tuning._ended(losses, [1.0, 1.1]) is ended


STUDY = """
[train]
steps = 4
batch = 8
[[models]]
source = "{model}"
[[data]]
source = "{data}"
task = "classification"
[[methods]]
method = "lora"
set = {{ r = 2 }}
[[methods]]
method = "none"
"""


def test_the_arms_of_a_study(usual, tmp_path):
    path, to = tmp_path / "a.toml", tmp_path / "a.json"
    path.write_text(STUDY.format(model=usual.model, data=usual.data))
    done = CliRunner().invoke(app, ["tune", "--study", str(path), "--json", str(to)])
    assert done.exit_code == 0, done.output
    told = json.loads(to.read_text())
    assert [row["method"] for row in told["found"]] == ["LoRA", "head only"]
    low, middle, high = told["rates"]["LoRA"]
    assert middle == told["found"][0]["rate"]
    assert low < middle < high
    assert f"LoRA: rates = [{low:g}, {middle:g}, {high:g}]" in done.output
    assert around([1e-4, 1e-3, 1e-2], 10.0) == (1e-4, 1e-3, 1e-2)
    done = CliRunner().invoke(app, ["tune", "--study", str(path), "--batch", "4"])
    assert "--study takes everything from its file: leave out --batch" in done.output


def words(run, *more):
    return [
        "--model", run.model, "--data", run.data, "--task", "classification", "--set", "r=2", "--where", "query",
        "--where", "value", "--max-steps", "2", "--batch", "8", *more,
    ]  # fmt: skip


def test_the_verb(usual, tmp_path):
    to, plot = tmp_path / "found.json", tmp_path / "found.svg"
    done = CliRunner().invoke(app, ["tune", *words(usual, "--json", str(to), "--plot", str(plot))])
    assert done.exit_code == 0, done.output
    found = json.loads(to.read_text())
    assert f"--lr {found['lr']:g}   (the loss of 2 batches was lowest at {found['lowest']:.2g}" in done.output
    assert f"proposed: {found['lr']:g}" in plot.read_text()
    assert sorted(tmp_path.iterdir()) == [to, plot]
    done = CliRunner().invoke(app, ["train", *words(usual, "--lr", "auto", "--out", str(tmp_path / "out"))])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/run.json").read_text())["run"]["lr"] == found["lr"]
    assert f"The rate {found['lr']:g} was found" in done.output
    done = CliRunner().invoke(app, ["train", *words(usual, "--lr", "fast", "--out", str(tmp_path / "no"))])
    assert "'fast' is not a valid float, nor 'auto'" in done.output
    assert "tune needs --data, --task" in CliRunner().invoke(app, ["tune", "--model", usual.model]).output


def test_a_loss_that_no_rate_changes_has_no_rate(written):
    """A head of zeros answers alike whatever stands below it; once 30 was proposed."""
    ready = prepare(dataclasses.replace(written, method=undula.LoRA(r=2)))
    with torch.no_grad():
        ready.model.lm_head.weight.zero_()
    with pytest.raises(ValueError, match=r"after steps at rates of 1e-05 to 100 alike: what trains does not change it"):
        tuning.tuned(ready)
