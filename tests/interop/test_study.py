"""Studies on tiny models: the same table whatever interrupts them, every fault of a file at once."""

import contextlib
import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import types
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.study import drive, orders
from undula.study import report as report_package
from undula.study.drive import counted, estimate, report, run, warnings
from undula.study.outcome import FINAL, SWEEP
from undula.study.plan import Plan
from undula.study.read import Faults, parse, read
from undula.study.splits import opened
from undula.study.store import Record, Store
from undula.study.trial import Trial, perform
from undula.study.watch import Watch
from undula.train.base import open_model
from undula.train.tasks.task import Examples

SUM = 2 * (4 * 64 + 2 * 80) + 64  # of O + I over the linear layers of the tiny BERT: two blocks and the pooler
TEXT = """
title = "tiny"
seeds = [1, 2]
[train]
steps = 12
batch = 8
evaluations = 2
[sweep]
rates = [3e-3, 1e-2]
extend = 0
[[models]]
source = "{model}"
[[data]]
source = "{data}"
label = "reviews"
task = "classification"
set = {{ max_length = 16 }}
[[methods]]
method = "lora"
set = {{ r = 2 }}
[[methods]]
method = "aurora"
[[methods]]
method = "none"
"""
ONE = '[[methods]]\nmethod = "lora"\nset = { r = 2 }\n'


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    data = tiny.jsonl(folder / "reviews.jsonl", tiny.reviews(120))
    return {"model": tiny.bert(folder / "bert"), "data": data}


@pytest.fixture(scope="module")
def text(sources):
    return TEXT.format(**sources)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The study that nothing disturbed: its folder and what it came to."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(parse(text), out)


@pytest.fixture(scope="module")
def one(text):
    """The same study of LoRA alone."""
    return text.split("[[methods]]")[0] + ONE


@pytest.fixture(scope="module")
def brief(one):
    """And of one seed: two rates and the final run."""
    return one.replace("seeds = [1, 2]", "seeds = [1]")


@pytest.fixture
def store(whole, one, tmp_path):
    """A folder with the runs of LoRA as `whole` made them."""
    with contextlib.closing(sqlite3.connect(whole[0] / "runs.sqlite")) as made:
        made.execute("vacuum into ?", (str(tmp_path / "runs.sqlite"),))
    keys = list(Plan(parse(one)).trials())
    with contextlib.closing(sqlite3.connect(tmp_path / "runs.sqlite")) as db:
        db.execute(f"delete from runs where key not in ({', '.join('?' * len(keys))})", keys)
        db.commit()
    return tmp_path


def table(found, arm=None, seeds=(1, 2)):
    """Everything that is not a time or a memory, of one arm or all."""
    kept = ("arm", "stage", "lr", "seed", "validation", "test", "parameters", "deployed", "error", "losses")
    of = [o for o in found.outcomes if arm in (None, o.arm) and o.seed in seeds]
    return sorted(json.dumps({k: o.encode()[k] for k in kept}, sort_keys=True) for o in of)


def test_each_seed_sweeps_for_itself_and_the_chosen_run_alone_is_tested(whole):
    _, found = whole
    chosen = {(c.arm, c.seed): c for c in found.chosen}
    assert set(chosen) == {(arm, seed) for arm in ("LoRA", "AuroRA", "head only") for seed in (1, 2)}
    for (arm, seed), choice in chosen.items():
        sweep = [o for o in found.outcomes if (o.arm, o.stage, o.seed) == (arm, SWEEP, seed)]
        assert {o.lr for o in sweep} == {3e-3, 1e-2}
        assert all(o.test is None for o in sweep)  # the test rows are for final runs
        best = max(sweep, key=lambda o: (o.validation, -o.lr))
        assert (choice.lr, choice.bracketed) == (best.lr, False)
        (final,) = [o for o in found.outcomes if (o.arm, o.stage, o.seed) == (arm, FINAL, seed)]
        assert (final.lr, final.validation, final.losses) == (
            best.lr,
            best.validation,
            best.losses,
        )  # the same run again
        assert 0 <= final.test <= 1
        assert (final.steps, len(final.curve)) == (12, 2)
        assert final.seconds > 0
        assert final.cpu_seconds > 0
        assert max(v for _, v in final.curve) == final.validation


def test_deployed_forms_are_measured(whole):
    final = [o for o in whole[1].outcomes if o.stage == FINAL]
    for o in final:
        forms = {"LoRA": {"merged"}, "AuroRA": {"least squares", "substituted"}, "head only": set()}[o.arm]
        assert set(o.deployed) == set(o.deployed_error) == forms
        if o.arm == "LoRA":
            assert o.deployed["merged"] == o.test
            assert o.deployed_error["merged"] < 1e-5
    assert {o.parameters for o in final if o.arm == "head only"} == {0}
    lora = next(o for o in final if o.arm == "LoRA")
    assert lora.parameters == 2 * SUM
    assert lora.head_parameters > 0


def test_full_fine_tuning_counts_every_parameter_but_the_heads(text, sources):
    from transformers import AutoModel

    study = parse(text + '[[methods]]\nmethod = "full"\n')
    cell = next(c for c in Plan(study).cells if c.arm.full)
    found = perform(cell.trial(1e-3, 0, False), Watch())
    assert found["parameters"] == sum(p.numel() for p in AutoModel.from_pretrained(sources["model"]).parameters())
    assert found["head_parameters"] == 2 * 32 + 2


def test_what_has_ended_is_not_run_again(whole, text):
    out, found = whole
    before = Store(out / "runs.sqlite").records(Plan(parse(text)).trials())
    again = run(parse(text), out)
    assert Store(out / "runs.sqlite").records(Plan(parse(text)).trials()) == before
    assert again.outcomes == found.outcomes


def test_runs_on_other_rows_are_not_mixed_in(brief, sources, tmp_path):
    path = tmp_path / "changing.jsonl"
    tiny.jsonl(path, tiny.reviews(120))
    study = parse(brief.replace(sources["data"], str(path)))
    first = run(study, tmp_path / "o").outcomes
    tiny.jsonl(path, [*tiny.reviews(119), {"text": "another film", "label": "bad"}])
    with pytest.raises(
        ValueError, match=f"reviews: {len(first)} of the runs here were made on other rows .* another --out"
    ):
        run(study, tmp_path / "o")
    assert any("made on other rows" in w for w in warnings(study, tmp_path / "o"))  # what a dry run says
    found = report(study, tmp_path / "o")
    assert found.outcomes == first
    assert "were made on other rows than there are now" in (found.report.parent / "report.md").read_text()


def test_runs_on_another_model_are_not_mixed_in(brief, tmp_path):
    """The folder is the same, its weights are not."""
    import safetensors.torch

    model = tiny.bert(tmp_path / "bert")
    study = parse(re.sub(r'source = ".*bert"', f'source = "{model}"', brief))
    run(study, tmp_path / "o")
    path = tmp_path / "bert" / "model.safetensors"
    weights = {k: 0.3 * v for k, v in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"3 of the runs here were made with another model .* another --out"):
        run(study, tmp_path / "o")


def changed(out, change):
    """The store of `out` with every result changed."""
    with contextlib.closing(sqlite3.connect(out / "runs.sqlite")) as db:
        for key, trial, result in db.execute("select key, trial, result from runs").fetchall():
            made = change(key, json.loads(trial), json.loads(result))
            db.execute("update runs set key = ?, result = ? where key = ?", (made[0], json.dumps(made[1]), key))
        db.commit()


def test_runs_that_were_made_with_other_things_are_told(one, store):
    study = parse(one)
    assert not [w for w in warnings(study, store) if "alike" in w]
    seen = []

    def half(key, trial, result):
        seen.append(key)
        if len(seen) % 2:
            result["made"]["versions"]["torch"] = "1.0"
        return key, result

    changed(store, half)
    (told,) = [w for w in warnings(study, store) if "alike" in w]
    assert "the runs were not all made alike: 3 with" in told
    assert "torch 1.0" in told
    assert told in (report(study, store).report.parent / "report.md").read_text().replace("\\_", "_")


@pytest.fixture(scope="module")
def shared(one, tmp_path_factory):
    """The study with one rate for all seeds, and its folder."""
    text, out = one.replace("extend = 0", "extend = 0\nseeds = [0]"), tmp_path_factory.mktemp("shared")
    return text, out, run(parse(text), out)


@pytest.mark.parametrize("version", [0, 1])
def test_what_an_older_version_found_is_read_as_what_it_was(one, shared, tmp_path, version):
    """One rate for all seeds: such a store opens with [sweep] seeds, no win is called, and without that line it is
    said what the runs are, and what would bring them back."""
    text, out, found = shared
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    former = {t.key: t.formers[version] for t in Plan(parse(text)).trials().values()}

    def older(key, trial, result):
        return former[key], {k: v for k, v in result.items() if k not in ("made", "cpu_seconds")}

    changed(tmp_path, older)
    again = run(parse(text), tmp_path)  # nothing is made anew
    assert [(o.arm, o.lr, o.seed, o.test) for o in again.outcomes] == [
        (o.arm, o.lr, o.seed, o.test) for o in found.outcomes
    ]
    assert {c.seed for c in again.chosen} == {None}
    (told,) = [w for w in warnings(parse(one), tmp_path) if "chose one rate" in w]
    assert "2 runs in" in told
    assert "write [sweep] seeds = [0]" in told


def test_runs_of_a_version_that_trained_otherwise_are_told_and_made_again(one, store):
    study = parse(one)
    former = {t.key: t.formers[0] for t in Plan(study).trials().values()}
    count = len(Plan(study).known(Store(store / "runs.sqlite")))
    changed(store, lambda key, trial, result: (former[key], result))
    (told,) = [w for w in warnings(study, store) if "earlier version" in w]
    with pytest.raises(ValueError, match=rf"(?s)no run of this study has ended yet .*{re.escape(told)}"):
        report(study, store)
    assert told.startswith(f"{count} runs in {store}")
    assert "made anew" in told
    assert not Plan(study).known(Store(store / "runs.sqlite"))


def test_before_an_allocator_reaches_its_budget_nothing_is_chosen(text):
    """What is measured is an adapter of the size that was asked for, and its open ranks are noted."""
    method = '[[methods]]\nname = "LoRA"\nmethod = "adalora"\nset = { r = 6 }\nallocator = "adalora"\n'
    arm = text.split("[[methods]]")[0] + method + "allocate = { target = 1, every = 2 }\n"
    (cell,) = Plan(parse(arm.replace("evaluations = 2", "evaluations = 6"))).cells
    watch = Watch()
    found = perform(cell.trial(1e-2, 1, True), watch)
    assert len(found["curve"]) == 6
    late = [v for step, v in found["curve"] if step >= watch.counts_from]
    assert 0 < watch.counts_from <= 12
    assert len(late) < 6
    assert found["validation"] == max(late)
    assert found["ranks"] == 1 * len(watch.kept.methods)


def test_of_equal_points_the_last_is_kept():
    watch = Watch()
    assert watched(watch, [0.5] * 3, steps=3, evaluations=3) == 3
    assert (watch.kept, watch.best, len(watch.curve)) == (3, 0.5, 3)


def test_points_before_the_budget_is_reached_are_not_chosen():
    watch = Watch()
    allocator = types.SimpleNamespace(counts_from=lambda steps, adapter: 7)
    watched(watch, [0.9, 0.8, 0.9, 0.4, 0.6, 0.5], evaluations=6, allocator=allocator)
    assert [step for step, _ in watch.curve] == [2, 4, 6, 8, 10, 12]
    assert (watch.best, watch.kept) == (0.6, 2)


def test_what_halving_compares_with_does_not_depend_on_who_runs_beside(text):
    """A rate waits for those before it, and is compared with these alone, in whichever order they ended."""
    swept = (
        text.replace("rates = [3e-3, 1e-2]", "rates = [1e-3, 3e-3, 1e-2]\nhalving = 2").split("[[methods]]")[0] + ONE
    )
    plan = Plan(parse(swept))
    search = plan.searches[0]
    runs = {lr: search.sweep(lr)[0] for lr in (1e-3, 3e-3, 1e-2)}

    def done(value):
        return Record(
            "done", 1, "w", 0.0, {"validation": value, "curve": [(6, value), (12, value)], "pruned": False}, None
        )

    known = {}
    assert search.due(known) == [runs[3e-3]]
    assert search.rivals(runs[3e-3], known) == []
    known[runs[3e-3].key] = done(0.5)
    (second,) = search.due(known)
    assert [r[-1][1] for r in search.rivals(second, known)] == [0.5]
    for lr in (1e-3, 1e-2):  # of another process, or of another form: it stands behind
        if runs[lr] is not second:
            known[runs[lr].key] = done(0.9)
    assert [r[-1][1] for r in search.rivals(second, known)] == [0.5]
    assert {t.run.seed for t in plan.due({})} == {1, 2}  # other seeds need not wait


def ended(out):
    try:
        with sqlite3.connect(f"file:{out / 'runs.sqlite'}?mode=ro", uri=True, timeout=10) as db:
            return db.execute("select count(*) from runs where state != 'running'").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


@pytest.fixture(scope="module")
def processes():
    """Others than this one, forked from one that has imported what studies need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["undula.study.drive", "undula.study.report", "transformers.trainer", "datasets",
                                    "transformers.models.bert.modeling_bert", "sklearn.metrics"])  # fmt: skip
    return context


MOMENTS = [  # (what is patched, at which call death comes, whether before it or after)
    (Store, "claim", 2, False),  # the first run has ended
    (Watch, "evaluate", 3, False),  # of two in each run: the second has ended
    (Store, "finish", 1, True),
    (report_package, "write_report", 1, True),
]


def killed(moment, text, out):
    """Runs the study in `out`, and dies by SIGKILL at this moment."""
    owner, name, last, before = MOMENTS[moment]
    whole, calls = getattr(owner, name), []

    def deadly(*given, **options):
        calls.append(name)
        found = None if before and len(calls) == last else whole(*given, **options)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, deadly)
    run(parse(text), out)


def test_kills_at_every_moment_give_the_same_table(whole, brief, processes, tmp_path):
    """Within each stage of a run, one process after another; then to the end."""
    for moment in range(len(MOMENTS)):
        child = processes.Process(target=killed, args=(moment, brief, tmp_path))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, MOMENTS[moment]
    study = parse(brief)
    found = run(study, tmp_path)
    records = Store(tmp_path / "runs.sqlite").records(Plan(study).trials())
    assert Counter(r.attempts for r in records.values()) == {1: 1, 2: 1, 3: 1}  # three deaths came within a run
    assert table(found) == table(whole[1], "LoRA", [1])


def sharing(both, text, out):
    """Runs the study in `out`; the first run is recorded when the other process has one too."""
    finish, first = Store.finish, [True]

    def waiting(*given):
        if first.pop():
            both.wait(120)
        first.append(False)
        finish(*given)

    Store.finish = waiting
    run(parse(text), out)


def test_two_processes_share_a_study(whole, brief, processes, tmp_path):
    both = processes.Barrier(2)
    children = [processes.Process(target=sharing, args=(both, brief, tmp_path)) for _ in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    study = parse(brief)
    records = Store(tmp_path / "runs.sqlite").records(Plan(study).trials())
    assert {r.attempts for r in records.values()} == {1}
    assert len({r.worker for r in records.values()}) == 2
    assert table(run(study, tmp_path)) == table(whole[1], "LoRA", [1])


def test_a_run_that_another_process_begins_while_a_study_opens_stays_its_own(brief, tmp_path, monkeypatch):
    plan, known = Plan(parse(brief)), Plan.known
    store, other = Store(tmp_path / "runs.sqlite"), Store(tmp_path / "runs.sqlite")
    key, trial = next(iter(plan.trials().items()))

    def begun_meanwhile(plan, store):
        found = known(plan, store)
        assert other.claim(trial)
        return found

    monkeypatch.setattr(Plan, "known", begun_meanwhile)
    drive._delete_stale(plan, store, retry_failed=False)
    assert store.records([key])[key].state == "running"


def test_a_failed_run_is_recorded_and_the_rest_goes_on(text, tmp_path):
    two = text.removesuffix('[[methods]]\nmethod = "none"\n').replace("seeds = [1, 2]", "seeds = [1]")
    study = parse(two.replace("rates = [3e-3, 1e-2]", "rates = [3e-3, 1e38]"))
    found = run(study, tmp_path)
    failed = [o for o in found.outcomes if o.error]
    assert {o.lr for o in failed} == {1e38}
    assert all("Diverged" in o.error for o in failed if o.arm == "LoRA")
    assert {(c.arm, c.lr) for c in found.chosen} >= {("LoRA", 3e-3), ("AuroRA", 3e-3)}
    assert Counter(o.stage for o in found.outcomes if not o.error and o.arm == "LoRA") == {SWEEP: 1, FINAL: 1}


def test_successive_halving_prunes_the_hopeless(one, tmp_path, monkeypatch):
    """And the training ends there.  The figures are given: what so few steps come to may hang on rounding."""

    def evaluate(watch, step):
        watch.best = {1e-2: 0.9, 1e-1: 0.8}[watch.ready.run.lr]
        watch.curve.append((step, watch.best))
        watch.kept = watch.ready.adapter.copy()

    monkeypatch.setattr(Watch, "_evaluate", evaluate)
    swept = one.replace("rates = [3e-3, 1e-2]", "rates = [1e-2, 1e-1]\nhalving = 2").replace("[1, 2]", "[1]")
    found = run(parse(swept), tmp_path)
    runs = {(o.lr, o.stage): (o.pruned, o.steps, len(o.curve)) for o in found.outcomes}
    assert runs == {(1e-2, SWEEP): (False, 12, 2), (1e-1, SWEEP): (True, 6, 1), (1e-2, FINAL): (False, 12, 2)}


class Given:
    """A task whose figures are given."""

    more_is_better = True

    def __init__(self, figures):
        self.figures = iter(figures)

    def choose(self, *_):
        return next(self.figures)


def watched(watch, figures, steps=12, evaluations=2, allocator=None):
    """Leads a watch through a run that comes to these figures, without a model; how many steps it came to.  What
    is kept is how many points were."""
    kept = []
    adapter = types.SimpleNamespace(parameters=list, copy=lambda: kept.append(0) or len(kept))
    run = types.SimpleNamespace(task=Given(figures), batch=1, allocator=allocator, procedure=allocator)
    watch.begin(types.SimpleNamespace(adapter=adapter, run=run, model=None, held=None), evaluations)
    control = types.SimpleNamespace(should_training_stop=False)
    for step in range(1, steps + 1):
        watch.on_step_end(None, types.SimpleNamespace(global_step=step, max_steps=steps), control)
        if control.should_training_stop:
            return step
    return steps


def test_rates_are_halved_by_one_seed_and_made_whole_when_halving_is_off(one, tmp_path, monkeypatch):
    """By each seed apart every rate could lose once, and none would be left to choose."""
    figures = {(2, 1e-3): 0.6, (2, 1e-2): 0.9, (2, 1e-1): 0.7, (5, 1e-2): 0.5, (5, 1e-3): 0.8, (5, 1e-1): 0.9}

    def given(trial, watch, sources):
        steps = watched(watch, [figures.get((trial.run.seed, trial.run.lr), 0.5)] * 2)
        return {"validation": watch.best, "curve": watch.curve, "pruned": watch.pruned, "steps": steps,
                "wall_seconds": 1.0, "rows_digest": sources.digest(trial.rows, trial.split_seed)}  # fmt: skip

    monkeypatch.setattr(orders, "perform", given)
    swept = one.replace("rates = [3e-3, 1e-2]\nextend = 0", "rates = [1e-3, 1e-2, 1e-1]\nextend = 0\nseeds = [2, 5]")
    swept = swept.replace("seeds = [1, 2]", "seeds = [3, 4]", 1)
    found = run(parse(swept.replace("extend = 0", "extend = 0\nhalving = 2")), tmp_path)
    sweep = {(o.lr, o.seed): o.pruned for o in found.outcomes if o.stage == SWEEP}
    assert sweep == {(1e-2, 2): False, (1e-2, 5): False, (1e-3, 2): True, (1e-1, 2): True}
    assert {o.lr for o in found.outcomes if o.stage == FINAL} == {found.chosen[0].lr} == {1e-2}
    assert counted(Plan(parse(swept)), tmp_path)["least"] > 0  # as a dry run tells it
    again = run(parse(swept), tmp_path)
    whole = {(o.lr, o.seed): o.validation for o in again.outcomes if o.stage == SWEEP}
    assert whole == {(lr, seed): figure for (seed, lr), figure in figures.items()}
    assert not any(o.pruned for o in again.outcomes)


def test_a_rate_at_which_one_of_the_runs_failed_is_not_chosen(one):
    """However good the others were: their mean would be that of the lucky seeds."""
    shared = one.replace("extend = 0", "extend = 0\nseeds = [3, 4]")
    (search,) = Plan(parse(shared)).searches
    low, high = search.sweep(3e-3), search.sweep(1e-2)
    done = {t.key: Record("done", 1, "w", 0.0, {"validation": v, "pruned": False}, None)
            for t, v in ((low[0], 0.4), (low[1], 0.6), (high[0], 0.9))}  # fmt: skip
    known = done | {high[1].key: Record("failed", 1, "w", 0.0, None, "Diverged")}
    assert search.scores(known) == {3e-3: 0.5, 1e-2: None}
    assert search.decision(known).chosen == 3e-3


class Impatient:
    """Presses Ctrl-C at the second run."""

    def __init__(self):
        self.seen = 0

    def counts(self, counts): ...
    def step(self, step, steps): ...
    def ended(self, ended): ...

    def begun(self, trial):
        self.seen += 1
        if self.seen == 2:
            raise KeyboardInterrupt


def test_an_interrupted_study_goes_on_in_the_same_process(whole, brief, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(parse(brief), tmp_path, view=Impatient())
    assert ended(tmp_path) == 1
    assert not any(
        r.state == "running" for r in Store(tmp_path / "runs.sqlite").records(Plan(parse(brief)).trials()).values()
    )
    assert table(run(parse(brief), tmp_path)) == table(whole[1], "LoRA", [1])


def test_a_report_says_that_a_study_is_not_complete(whole, text):
    longer = parse(text.replace("seeds = [1, 2]", "seeds = [1, 2, 3]"))
    told = (report(longer, whole[0]).report.parent / "report.md").read_text()
    assert "The study is not complete:" in told
    assert "9 at least are to come" in told  # two rates and a final run for each arm
    assert "not complete" not in (report(parse(text), whole[0]).report.parent / "report.md").read_text()


def test_the_head_alone_has_a_pilot_too(text, tmp_path):
    alone = text.split("[[methods]]")[0] + '[[methods]]\nmethod = "none"\n'
    found = estimate(parse(alone.replace("[train]", 'baseline = "head only"\n[train]', 1)), tmp_path)
    assert 0 < found.seconds_least <= found.seconds_most


def test_equal_parameters(text):
    study = parse(text + '[[budgets]]\nparameters_of = "LoRA"\nrank = 4\n[[budgets]]\nrank = 4\n')
    cells = {(c.arm.name, c.budget.label): c for c in Plan(study).cells}
    assert cells["LoRA", "parameters of LoRA at r=4"].method == undula.LoRA(r=4, alpha=32.0)
    wanted = cells["AuroRA", "parameters of LoRA at r=4"]
    assert wanted.wanted == 4 * SUM
    assert wanted.method.r == 3  # with H and the splines 3,117 are closer to 3,584 than the 4,208 of rank 4
    same = [cells["LoRA", b].trial(1e-3, 0, False).key for b in ("parameters of LoRA at r=4", "r=4")]
    assert same[0] == same[1]  # one run serves both tables


def test_heads_have_a_rate_of_their_own_but_where_they_train_alone(text):
    study = parse(text.replace("steps = 12", "steps = 12\nhead_lr = 0.03") + '[[methods]]\nmethod = "full"\n')
    rates = {c.arm.name: c.trial(1e-3, 0, False).run.head_lr for c in Plan(study).cells}
    assert rates == {"LoRA": 0.03, "AuroRA": 0.03, "full fine-tuning": 0.03, "head only": None}


def test_a_dry_run_tells_runs_and_time_and_runs_nothing(text, tmp_path):
    (tmp_path / "s.toml").write_text(text)
    words = ["study", str(tmp_path / "s.toml"), "--out", str(tmp_path / "o"), "--dry-run"]
    done, plain = (CliRunner().invoke(app, [*words, *more]) for more in (["--json", "-"], ["--no-pilot"]))
    told = json.loads(done.stdout)
    assert told["runs"] == {"ended": 0, "failed": 0, "least": 18, "most": 18}
    assert (told["sweeps"], told["shared"]) == (6, False)
    assert told["decidable"] == {"seeds": 2, "single": 2, "single_decidable": 0, "pooled": 0, "pooled_decidable": 0,
                                 "seeds_for_pooled": 0, "seeds_for_every": 7, "shared": False}  # fmt: skip
    assert 0 < told["hours"]["least"] <= told["hours"]["most"] < 1
    assert "each of the 2 seeds has its own" in " ".join(plain.output.split())
    assert not (tmp_path / "o").exists()


def test_the_command_runs_a_study_and_writes_the_report(one, tmp_path):
    brief = one.replace("rates = [3e-3, 1e-2]", "rates = [3e-3]").replace("seeds = [1, 2]", "seeds = [1]")
    named = brief.replace("[[methods]]", '[[methods]]\nname = "mine"')
    (tmp_path / "s.toml").write_text(f'baseline = "mine"\n{named}')
    done = CliRunner().invoke(app, ["study", str(tmp_path / "s.toml"), "--out", str(tmp_path), "--json", "-"])
    told = json.loads(done.stdout)
    assert (told["runs"], told["failed"]) == (1, 0)  # one rate: nothing to choose
    assert "[1 of 1] mine on reviews, lr 0.003, seed 1: validation " in done.stderr
    assert "mine" in Path(told["report"]).read_text()
    files = {"report.html", "report.md", "tables.tex", "table.csv", "runs.csv", "runs.parquet", "plots"}
    assert {p.name for p in Path(told["report"]).parent.iterdir()} == files


FAULTY = """
seeds = [0, 1]
colour = "red"
[train]
step = 5
batch = -1
[sweep]
rates = []
seeds = [0]
[[models]]
source = "/nowhere"
[[data]]
source = "bundled:nothing"
task = "clasification"
[[data]]
source = "{data}"
task = "classification"
[[budgets]]
rank = 4
parameters = 10
[[methods]]
method = "lorra"
[[methods]]
method = "lora"
set = {{ rank = 2 }}
[[methods]]
name = "head only"
method = "none"
"""


def test_every_fault_of_a_file_is_listed_with_its_line(sources, tmp_path):
    path = tmp_path / "faulty.toml"
    path.write_text(FAULTY.format(**sources))
    with pytest.raises(Faults) as caught:
        read(path)
    found = dict(caught.value.found)
    wanted = {2: "none of them may be a seed of it", 3: "there is no 'colour' here", 5: "did you mean steps?",
              6: "batch is at least 1, found -1", 8: "rates greater than 0", 14: "no task is called 'clasification'",
              18: "a budget is", 22: "no method is called 'lorra'", 25: "LoRA has no option rank"}  # fmt: skip
    for line, part in wanted.items():
        assert part in found[line], (line, found)
    assert any("no method is called 'LoRA'; there are: head only" in t for _, t in caught.value.found)


def test_numbers_that_no_run_could_have_are_faults_with_their_lines(text):
    head = text.replace("[train]\n", '[train]\nwarmup = 1.5\nweight_decay = -1.0\nwhere = ["q", 1]\nhead_lr = nan\n')
    head = head.replace("rates = [3e-3, 1e-2]", "rates = [nan, inf]").replace("seeds = [1, 2]", "seeds = [-1, 2]")
    bad = (
        head.replace('task = "classification"', 'task = "classification"\nsplits = { tset = "test" }')
        + '[[budgets]]\nrank = 4\n[[budgets]]\nrank = 4\n[[methods]]\nmethod = "lora"\n'
    )
    with pytest.raises(Faults) as caught:
        parse(bad)
    lines = bad.splitlines()
    told = {(lines[line - 1] if line else None, fault) for line, fault in caught.value.found}
    for line, part in (
        ("warmup = 1.5", "warmup is at least 0 and below 1, found 1.5"),
        ("weight_decay = -1.0", "weight_decay is at least 0, found -1.0"),
        ('where = ["q", 1]', "a list of names and globs"),
        ("head_lr = nan", "head_lr is a number"),
        ("rates = [nan, inf]", "rates greater than 0"),
        ("seeds = [-1, 2]", "seeds is at least 0, found -1"),
        ('splits = { tset = "test" }', "splits gives names to train, validation, test"),
        ("[[budgets]]", "two of the budgets are called 'r=4'"),
        ("[[methods]]", "two of the methods are called 'LoRA'"),
    ):
        assert any(at == line and part in fault for at, fault in told), (line, told)
    same = text.replace('task = "classification"', 'task = "classification"\nsplits = { test = "train" }')
    with pytest.raises(Faults, match="rows of 'train' would be learned from and measured on"):
        parse(same)
    with pytest.raises(Faults, match="rows of 'validation' would be learned from and measured on"):
        parse(same.replace('test = "train"', 'train = "validation"'))
    seeds = text.replace("seeds = [1, 2]", "seeds = [1.5]").replace("extend = 0", "extend = 0\nseeds = [1, -1]")
    with pytest.raises(Faults, match=r"2 fault\(s\)") as caught:  # and no clash with seeds that nobody gave
        parse(seeds)
    assert [seeds.splitlines()[line - 1] for line, _ in caught.value.found] == ["seeds = [1.5]", "seeds = [1, -1]"]


def test_every_arm_that_a_budget_does_not_fit_is_named_with_the_budgets_line(text):
    bad = text + "[[budgets]]\nrank = 2\n[[budgets]]\nparameters = 9\n"
    with pytest.raises(Faults) as caught:
        parse(bad)
    assert {line for line, _ in caught.value.found} == {bad.splitlines().index("parameters = 9")}
    assert sorted(fault.partition(":")[0] for _, fault in caught.value.found) == ["AuroRA", "LoRA"]


def test_models_data_and_budgets_are_looked_at_before_anything_runs(text, sources, tmp_path):
    one = tiny.jsonl(tmp_path / "one.jsonl", [{"text": f"a film {i}", "label": "good"} for i in range(30)])
    blank = tiny.jsonl(tmp_path / "blank.jsonl", [{"text": " " * (i == 3), "label": i % 2} for i in range(30)])
    bad = text.replace(sources["model"], "/nowhere/model").replace(
        "[[methods]]", f'[[data]]\nsource = "{one}"\ntask = "classification"\n[[data]]\nsource = "{blank}"\n'
        'task = "classification"\n[[methods]]', 1)  # fmt: skip
    with pytest.raises(Faults) as caught:
        parse(bad)
    told = [t for _, t in caught.value.found]
    assert len(told) == 3
    assert any("no model could be opened at '/nowhere/model'" in t for t in told)
    assert any("holds only ['good']" in t for t in told)
    assert any("line 4" in t and "blank.jsonl" in t for t in told)
    with pytest.raises(Faults, match="LoRA: the closest that it comes to 9 parameters"):
        parse(text + "[[budgets]]\nparameters = 9\n")


def test_rows_that_stand_in_two_splits_are_reported(text, sources, tmp_path):
    folder = tmp_path / "leaky"
    folder.mkdir()
    rows = [{"text": f"a film number {i}", "label": i % 2} for i in range(40)]
    tiny.jsonl(folder / "train.jsonl", rows)
    tiny.jsonl(folder / "test.jsonl", [*rows[:3], *({"text": f"new {i}", "label": i % 2} for i in range(9))])
    study = parse(text.replace(sources["data"], str(folder)))
    (told,) = warnings(study)
    assert told.startswith("reviews: ")
    assert told.endswith("rows stand in train too")


def test_replacing_sources(text, sources, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(text.replace(sources["model"], "roberta-base"))
    study = read(path, {"roberta-base": sources["model"]})
    assert study.models[0].source == sources["model"]
    assert estimate(study, tmp_path).seconds_least > 0


def test_the_report_is_written(whole):
    out, found = whole
    assert found.report.is_relative_to(out)
    assert "LoRA" in (out / "report" / "report.html").read_text()
    with (out / "report" / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found.outcomes)


def test_a_language_model_as_it_is(tmp_path):
    """Without a method and without a head nothing trains: the model is measured once, with no rate to choose."""
    rows = [{"prompt": f"the day was {i}", "completion": r["text"]} for i, r in enumerate(tiny.reviews(40))]
    data, model = tiny.jsonl(tmp_path / "rows.jsonl", rows), tiny.llama(tmp_path / "llama")
    text = TEXT.format(model=model, data=data).replace('task = "classification"', 'task = "causal-lm"')
    text = text.replace("steps = 12", "steps = 2").replace('[[methods]]\nmethod = "aurora"\n', "")
    found = run(parse(text.replace('method = "none"', 'name = "untrained"\nmethod = "none"')), tmp_path / "out")
    ours = [o for o in found.outcomes if o.arm == "untrained"]
    assert [(o.stage, o.steps, o.parameters) for o in ours] == [(FINAL, 0, 0)]
    trial = next(t for t in found_trials(tmp_path / "out") if t.run.method is None)
    task, parts = opened(trial.rows, trial.split_seed)
    base, processor = open_model(model, task, trial.run.dtype, seed=0)
    assert ours[0].test == task.score(base, Examples(task, parts["test"], processor), 8)["loss"]
    assert {c.arm for c in found.chosen} == {"LoRA"}
    assert all(o.test < ours[0].test for o in found.outcomes if o.arm == "LoRA" and o.stage == FINAL)


def found_trials(out):
    with sqlite3.connect(out / "runs.sqlite") as store:
        return [Trial.decode(json.loads(text)) for (text,) in store.execute("select trial from runs")]
