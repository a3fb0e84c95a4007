"""`rates = "auto"` in a study: each arm's sweep begins around a rate that is found once, and kept beside the runs."""

import contextlib
import json
import sqlite3

import pytest
from typer.testing import CliRunner

from tests.support import tiny
from undula.cli.main import app
from undula.study import guess
from undula.study.drive import counted, foreseen, report, run
from undula.study.outcome import FINAL, SWEEP
from undula.study.rates import around
from undula.study.read import Faults, parse
from undula.study.spec import Arm, Sweep
from undula.study.store import Store
from undula.study.view import Silent
from undula.train.tuning import Tuned

TEXT = """
baseline = "LoRA"
seeds = [1, 2]
[train]
steps = 2
batch = 8
evaluations = 1
[sweep]
rates = "auto"
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
method = "none"
rates = [1e-2]
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    data = tiny.jsonl(folder / "reviews.jsonl", tiny.reviews(60))
    return TEXT.format(model=tiny.bert(folder / "bert"), data=data)


@pytest.fixture
def asked(monkeypatch):
    """The runs whose rate was looked for."""
    seen, real = [], guess.proposed

    def proposed(trial, sources):
        seen.append(trial)
        return real(trial, sources)

    monkeypatch.setattr(guess, "proposed", proposed)
    return seen


class Heard(Silent):
    def __init__(self):
        self.told = []

    def said(self, text):
        self.told.append(text)


def test_a_sweep_begins_around_what_is_found_and_what_goes_on_finds_nothing_anew(text, asked, tmp_path):
    heard = Heard()
    done = run(parse(text), tmp_path, view=heard)
    assert [(t.run.seed, t.tested, t.label) for t in asked] == [(1, False, "LoRA on reviews")]
    (found,) = Store(tmp_path / "runs.sqlite").rates().values()
    grid = around([found["lr"]], 10**0.5)
    swept = {seed: sorted(o.lr for o in done.outcomes if o.arm == "LoRA" and o.stage == SWEEP and o.seed == seed)
             for seed in (1, 2)}  # fmt: skip
    assert swept == {1: sorted(grid), 2: sorted(grid)}
    assert {o.seed for o in done.outcomes if o.arm == "LoRA" and o.stage == FINAL} == {1, 2}
    assert {o.lr for o in done.outcomes if o.arm == "head only"} == {1e-2}
    assert heard.told[0].startswith(f"LoRA ({asked[0].run.model}, reviews, as written): its sweep begins around ")
    assert f"reviews, as written) {found['lr']:g}" in (tmp_path / "report/report.md").read_text()
    with contextlib.closing(
        sqlite3.connect(tmp_path / "runs.sqlite")
    ) as db:  # as a kill leaves it: a final run is gone
        db.execute("delete from runs where key in (select key from runs where trial like '%\"tested\": true%' limit 1)")
        db.commit()
    again = run(parse(text), tmp_path)
    assert len(asked) == 1
    assert sorted((o.arm, o.lr, o.seed, o.stage, o.test) for o in again.outcomes if o.test is not None) == sorted(
        (o.arm, o.lr, o.seed, o.stage, o.test) for o in done.outcomes if o.test is not None
    )
    assert len(report(parse(text), tmp_path).outcomes) == len(done.outcomes)


def test_a_dry_run_finds_nothing_and_says_what_will_be(text, asked, tmp_path):
    path, out = tmp_path / "s.toml", tmp_path / "out"
    path.write_text(text)
    words = ["study", str(path), "--out", str(out), "--dry-run", "--no-pilot", "--json"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "told.json")])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "told.json").read_text())
    assert [cell["rates"] for cell in told["cells"]] == ["auto", "0.01"]
    assert told["runs"]["least"] == 2 * (3 + 1) + 2
    assert "rates to find first, to sweep around: 1, each" in done.output
    assert asked == []
    store = Store(out / "runs.sqlite")
    key = foreseen(parse(text), out).cells[0].asker.key
    store.keep_rate(key, {"lr": 2e-3})
    store.keep_rate(key, {"lr": 9.0})  # another process was later
    plan = foreseen(parse(text), out)
    assert plan.cells[0].told_rates == "auto, 0.00063, 0.002, 0.0063"
    assert counted(plan, out)["least"] == told["runs"]["least"]


def test_each_arm_and_data_set_is_asked_for_by_itself(text, monkeypatch, tmp_path):
    """One that grows, quantities of an arm's own settings, a sweep for all seeds: the keys differ where runs do."""
    more = text.replace(
        "[[methods]]", '[[data]]\nsource = "X"\nlabel = "again"\ntask = "classification"\n[[methods]]', 1
    )
    source = text.split('[[data]]\nsource = "')[1].split('"')[0]
    more = more.replace('"X"', f'"{source}"') + '[[methods]]\nname = "SGD"\nmethod = "lora"\noptimiser = "sgd"\n'
    seen = []

    def proposed(trial, sources):
        seen.append(trial)
        if len(seen) > 3:
            raise RuntimeError("no loss is finite")
        return Tuned(1e-3 * len(seen), "it was", 1.0, (), 1e-3, None, None, 1, 0, 0, 0.0, ("a note",))

    monkeypatch.setattr(guess, "proposed", proposed)
    heard, store = Heard(), Store(tmp_path / "runs.sqlite")
    plan = foreseen(parse(more), tmp_path)
    with pytest.raises(
        ValueError, match=r'^SGD \(.*again.*\): rates = "auto" finds none \(no loss is finite\): name some'
    ):
        guess.begun(plan, store, heard)
    assert len({t.key for t in seen}) == 4
    assert sum(text.endswith(": a note") for text in heard.told) == 3
    assert sorted(found["lr"] for found in store.rates().values()) == pytest.approx([1e-3, 2e-3, 3e-3])


def test_where_rates_may_be_auto(text):
    assert Sweep(rates="auto").rates is None
    assert Arm("head only", None, rates="auto").rates is None
    own = parse(text.replace('rates = "auto"', "rates = [1e-3]").replace("set = { r = 2 }", 'rates = "auto"'))
    assert [arm.rates for arm in own.arms] == [None, (1e-2,)]
    with pytest.raises(Faults, match=r'rates is a list of different rates greater than 0 or "auto", found .fast'):
        parse(text.replace('"auto"', '"fast"'))
    with pytest.raises(Faults, match=r'no .lr. here.*a study sweeps it: rates = \[1e-3, 3e-3\], or rates = "auto"'):
        parse(text + 'lr = "auto"\n')
