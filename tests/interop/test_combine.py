"""`undula combine`, and the operations against PEFT's: equal where PEFT is right, and where it is not, by how much."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import undula
from tests.support import tiny
from tests.support.layers import net
from undula import combine
from undula.cli.main import app
from undula.combine import Elect, Magnitude, Merge, Sum
from undula.methods.fusion import GATES
from undula.train import searching
from undula.train.base import open_model
from undula.train.run import Run
from undula.train.tasks.classification import Classification

close = torch.testing.assert_close
NAMES = ("good", "bad")
ADAPTERS = ("first", "second")  # no names of layers: PEFT would take one for the other when it saves


def call(*words, code=0):
    """(output, errors) of `undula words...`, white space made one."""
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == code, (done.stdout, done.stderr)
    return " ".join(done.stdout.split()), " ".join(done.stderr.split())


def peft(tmp_path, *configs):
    """(PEFT's model with an adapter of each configuration, these adapters as undula reads them)."""
    torch.manual_seed(0)
    model = None
    for i, config in enumerate(configs):
        own = LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **config)
        if model is None:
            model = get_peft_model(net(), own, adapter_name=ADAPTERS[i])
        else:
            model.add_adapter(ADAPTERS[i], own)
    model.save_pretrained(tmp_path)
    return model, [undula.Adapter.load(tmp_path / name) for name in ADAPTERS]


def theirs(model, kind, weights=(1.0, 1.0), **options):
    """{layer: dW} of PEFT's combination."""
    name = f"made-{kind}-{len(model.peft_config)}"
    model.add_weighted_adapter(list(ADAPTERS), list(weights), name, combination_type=kind, **options)
    return {s: model.base_model.model.get_submodule(s).get_delta_weight(name).detach() for s in ("0", "2")}


def same(found, wanted):
    for site, dW in wanted.items():
        close(found.delta(site), dW, rtol=1e-4, atol=1e-5)


def test_sums_and_ties_are_pefts_where_peft_is_right(tmp_path):
    """Mixed ranks and alphas in its `cat` and `svd`; its `_svd` forms, which work on dW itself."""
    model, adapters = peft(tmp_path, {"r": 2, "lora_alpha": 6}, {"r": 3, "lora_alpha": 4})
    same(combine.named("stack")(adapters, [0.5, 1.5]), theirs(model, "cat", (0.5, 1.5)))
    same(combine.named("svd", rank=2)(adapters, [0.5, 1.5]), theirs(model, "svd", (0.5, 1.5), svd_rank=2))
    same(Merge(Magnitude(0.4), Elect(), rank=2)(adapters), theirs(model, "ties_svd", svd_rank=2, density=0.4))
    same(
        Merge(Magnitude(0.4), Sum(), rank=2)(adapters, [0.5, 1.5]),
        theirs(model, "magnitude_prune_svd", (0.5, 1.5), svd_rank=2, density=0.4),
    )


def test_where_peft_is_wrong(tmp_path):
    """Its `linear` adds factors, not updates; under rsLoRA whatever it combines comes out sqrt(new rank) too large; its
    TIES of halves is half as large."""
    model, adapters = peft(tmp_path / "plain", {"r": 2, "lora_alpha": 6}, {"r": 2, "lora_alpha": 6})
    found = combine.named("stack")(adapters)
    for site, dW in theirs(model, "linear").items():
        close(found.delta(site), sum(a.delta(site) for a in adapters))
        assert (dW - found.delta(site)).norm() > 0.5 * found.delta(site).norm()
    halves = theirs(model, "ties_svd", (0.5, 0.5), svd_rank=8, density=1.0)
    whole = Merge(Magnitude(1.0), Elect(), rank=8)(adapters, [0.5, 0.5])
    same(whole, {site: 2 * dW for site, dW in halves.items()})
    rs = {"r": 2, "lora_alpha": 6, "use_rslora": True}
    model, adapters = peft(tmp_path / "rs", rs, rs)
    for kind, options, how in (("cat", {}, "stack"), ("svd", {"svd_rank": 3}, "svd")):
        new = 4 if kind == "cat" else 3
        ours = combine.named(how, rank=new)(adapters)
        same(ours, {site: dW / new**0.5 for site, dW in theirs(model, kind, **options).items()})
    same(combine.named("stack")(adapters), {s: sum(a.delta(s) for a in adapters) for s in ("0", "2")})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Three adapters of one base that is nowhere; the last has a layer less."""
    tmp = tmp_path_factory.mktemp("plain")
    for i, where in enumerate((["0", "2"], ["0", "2"], ["0"])):
        torch.manual_seed(i)
        adapter = undula.attach(net(), undula.LoRA(r=2 + i), where)
        for p in adapter.parameters():
            p.data.normal_(std=0.3)
        adapter.save(tmp / "abc"[i], base="some/base")
    return tmp


def test_the_command_works_on_directories_alone(plain, tmp_path):
    """Without the base: weights one after another, what a layer lacks is told, and the card says of what it is made."""
    a, b, c = (plain / n for n in "abc")
    out, told = call("combine", a, b, c, "--how", "lego", "--rank", "3", "--weights", ".5", ".3", ".2", "--out",
                     tmp_path / "d", "--json", tmp_path / "d.json")  # fmt: skip
    assert "3 adapters by lego, weights 0.5 0.3 0.2: 2 layers, rank 3, " in out
    assert f"{c} has nothing at 1 of 2 layers: its update is zero there (2)" in told
    found = undula.Adapter.load(tmp_path / "d")
    with pytest.warns(combine.Missing):
        wanted = combine.LEGO(3)([undula.Adapter.load(p) for p in (a, b, c)], [0.5, 0.3, 0.2])
    same(found, {s: wanted.delta(s) for s in ("0", "2")})
    assert found.about["base_model_name_or_path"] == "some/base"
    card = (tmp_path / "d" / "README.md").read_text()
    assert "Combined of a (weight 0.5), b (weight 0.3), c (weight 0.2) by `lego`: `LEGO(rank=3" in card
    layers = json.loads((tmp_path / "d.json").read_text())["layers"]
    assert layers[0] == {"layer": "0", "rank": 3, "relative error": None}
    call("combine", f"{a}:0.5", f"{b}:-1", "--how", "task-arithmetic", "--out", tmp_path / "e")
    one, other = undula.Adapter.load(a), undula.Adapter.load(b)
    same(undula.Adapter.load(tmp_path / "e"), {"0": 0.5 * one.delta("0") - other.delta("0")})
    for i, weights in enumerate((["--weights", ".5", "-1e0"], ["--weights=0.5,-1"])):
        call("combine", a, b, "--how", "task-arithmetic", *weights, "--out", tmp_path / f"e{i}")
        same(undula.Adapter.load(tmp_path / f"e{i}"), {"0": 0.5 * one.delta("0") - other.delta("0")})
    out, _ = call("combine", a, b, "--how", "ties", "--density", "0.3", "--rank", "2", "--out", tmp_path / "f")
    assert "what the rank leaves out: 0." in out


def test_what_cannot_be_combined_is_refused_before_anything_is_written(plain, tmp_path):
    a, b = plain / "a", plain / "b"
    undula.Adapter.load(a).save(tmp_path / "other", base="another/base")
    for words, text in (
        ([a], "two adapters or more, found 1"),
        ([a, tmp_path / "other"], "is for some/base and"),
        ([a, b, "--how", "tise"], "no way to combine is called 'tise'"),
        ([a, b, "--weights", "1,2,3"], "2 adapters take 2 weights, found 3"),
        ([a, b, "--weights", "half"], "--weights takes numbers"),
        ([a, b, "--how", "ties", "--weights", "0", "0"], "nothing is left of the adapters"),
        ([a, b, "--hwo", "ties"], "No such option: --hwo"),
        ([f"{a}:1", b, "--weights", "1,2"], "by --weights or as DIR:0.5, not both"),
        ([a, b, "--density", "0.5"], "has no density"),
        ([a, b, "--how", "svd"], "say which (--rank 16"),
        ([a, b, "--data", "x.csv"], "the others look at no rows"),
        ([a, b, "--how", "regmean", "--set", "shrink=much"], "shrink is a number from 0 to 1, found 'much'"),
        ([a, b, "--how", "regmean", "--set", "shrink=2"], "RegMean.shrink is at least 0 and at most 1, found 2.0"),
        ([a, tmp_path / "nowhere"], "no adapter directory"),
        ([a, b, "--how", "gates", "--rank", "4"], "leave out --rank"),
        ([a, b, "--how", "gates", "--set", "share=some"], "share is a number above 0, found 'some'"),
        ([a, b, "--how", "gates", "--set", "rank=4"], "gates have no option rank; they have: share"),
        ([a, tmp_path / "other", "--how", "gates"], "adapter 1 is for some/base and adapter 2"),
    ):
        _, told = call("combine", *words, "--out", tmp_path / "out", code=2)
        assert text in told, (words, told)
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two that `undula train` could have left: classifiers of one task over one base."""
    tmp = tmp_path_factory.mktemp("runs")
    base, data = tiny.bert(tmp / "base"), tiny.jsonl(tmp / "d.jsonl", tiny.reviews(24))
    for i in range(2):
        run = Run(model=base, data=data, task=Classification(names=NAMES), method=undula.LoRA(r=2), out=tmp / "ab"[i],
                  where=("query",))  # fmt: skip
        model, _ = open_model(run.model, run.task, run.dtype, run.seed)
        adapter = undula.attach(model, run.method, ["query"], full=run.task.head(model))
        torch.manual_seed(i)
        for p in adapter.parameters():
            p.data.normal_(std=0.2)
        adapter.save(run.out, base=base, task="SEQ_CLS")
        run.save(None)
    return tmp


def test_runs_of_one_task_are_a_run_again_and_rows_tell_regmean_its_inputs(runs, tmp_path):
    """The combination opens, and is measured, as what it is made of; heads are averaged, or dropped."""
    a, b = runs / "a", runs / "b"
    call("combine", a, b, "--how", "regmean", "--rows", "12", "--out", tmp_path / "d", "--weights", ".5,.5")
    found, parts = undula.Adapter.load(tmp_path / "d"), [undula.Adapter.load(p) for p in (a, b)]
    for name, t in found.full.items():
        close(t, (parts[0].full[name] + parts[1].full[name]) / 2)
    assert "Combined of a (weight 0.5), b (weight 0.5) by `regmean`" in (tmp_path / "d" / "README.md").read_text()
    assert set(undula.evaluate(tmp_path / "d")) >= {"accuracy"}
    assert undula.load(tmp_path / "d").predict("the film was good")["label"] in NAMES
    _, told = call("combine", a, b, "--how", "stack", "--out", tmp_path / "e", code=2)
    assert "train parameters in full cannot be added" in told
    call("combine", a, b, "--how", "stack", "--drop-full", "--out", tmp_path / "e")
    assert not undula.Adapter.load(tmp_path / "e").full


@pytest.mark.parametrize("data", [True, False], ids=["other rows", "own rows"])
def test_a_search_takes_the_best_of_its_trials(runs, tmp_path, data):
    pytest.importorskip("optuna")
    words = ["--data", runs / "d.jsonl"] if data else []
    out, _ = call("combine", runs / "a", runs / "b", "--search", "4", "--rows", "8", "--out", tmp_path / "d", "--json",
                  tmp_path / "d.json", *words)  # fmt: skip
    found = json.loads((tmp_path / "d.json").read_text())["search"]
    values = [t["value"] for t in found["trials"]]
    assert len(values) == 4
    assert found["best"] == max(v for v in values if v is not None)
    assert found["trials"][0]["how"] == "average"
    assert "the best of 4 trials" in out
    assert bool(undula.Adapter.load(tmp_path / "d").full) == data, "with rows of its own, each adapter keeps its head"


def test_no_share_is_taken_of_what_is_not_above_zero(runs, tmp_path, monkeypatch):
    """A correlation below zero: twice as bad would count as twice as good."""
    pytest.importorskip("optuna")
    monkeypatch.setattr(searching, "_measured", lambda *_: -0.5)
    _, told = call("combine", runs / "a", runs / "b", "--search", "2", "--rows", "8", "--out", tmp_path / "d", code=2)
    assert "a reaches -0.5 alone (accuracy), of which there are no shares: search on other rows (--data)" in told
    assert not (tmp_path / "d").exists()


def test_adapters_behind_gates_are_the_sum_until_they_train_and_then_answer_as_any_adapter(runs, tmp_path):
    out, _ = call(
        "combine", runs / "a", runs / "b", "--how", "gates", "--out", tmp_path / "g", "--json", tmp_path / "j"
    )
    assert "2 adapters behind gates" in out
    gates = undula.Adapter.load(tmp_path / "g")
    assert {type(m) for m in gates.methods.values()} == {undula.Fusion}
    trains = sum(5 * shape[0] for shape in gates.shapes.values()) + sum(t.numel() for t in gates.full.values())
    assert json.loads((tmp_path / "j").read_text())["trains"] == trains
    texts = [row["text"] for row in tiny.reviews(6, seed=3)]
    call(
        "combine", runs / "a", runs / "b", "--how", "stack", "--weights", "1,1", "--drop-full", "--out", tmp_path / "s"
    )
    opened, summed = undula.load(tmp_path / "g"), undula.Adapter.load(tmp_path / "s")
    before = answers(opened, texts)
    undula.detach(opened.model)
    undula.attach(opened.model, replace(summed, full=gates.full))
    assert answers(opened, texts) == pytest.approx(before, abs=1e-5)
    data = tiny.jsonl(tmp_path / "more.jsonl", tiny.reviews(24, seed=5))
    call("train", "--from", tmp_path / "g", "--model", runs / "base", "--data", data, "--task", "classification",
         "--task-set", f"names={','.join(NAMES)}", "--lr", "1e-1", "--max-steps", "6", "--batch", "8", "--out",
         tmp_path / "t")  # fmt: skip
    trained = undula.Adapter.load(tmp_path / "t")
    for site, f in trained.factors.items():
        moved = {k for k, t in f.items() if not torch.equal(t, gates.factors[site][k])}
        assert moved == set(GATES)
    assert answers(undula.load(tmp_path / "t"), texts) != pytest.approx(before, abs=1e-3)


def test_heads_are_left_behind_the_gates_where_that_is_asked(runs, tmp_path):
    call("combine", runs / "a", runs / "b", "--how", "gates", "--drop-full", "--set", "share=0.5", "--out",
         tmp_path / "g")  # fmt: skip
    found = undula.Adapter.load(tmp_path / "g")
    assert not found.full
    assert all((f["w_out"] == 1).all() for f in found.factors.values())
    assert "behind gates, which start half open: 0.5 of the sum." in (tmp_path / "g" / "README.md").read_text()


@pytest.mark.parametrize("how", ["gates", "average"])
def test_runs_of_several_tasks_have_none_together_and_that_is_said(runs, tmp_path, how):
    shutil.copytree(runs / "b", tmp_path / "b")
    run = Run.load(tmp_path / "b")
    replace(run, task=replace(run.task, names=("dull", "fun"))).save(None)
    _, told = call("combine", runs / "a", tmp_path / "b", "--how", how, "--out", tmp_path / "c")
    assert f"trained for several tasks, so {tmp_path / 'c'} names none" in told
    assert not (tmp_path / "c" / "run.json").exists()
    assert "`undula train --from" in (tmp_path / "c" / "README.md").read_text()


def answers(opened, texts):
    return [p for row in opened.predict(texts) for p in row["probabilities"].values()]
