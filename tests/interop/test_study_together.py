"""Runs of a study that share a model and their steps: the figures of separate runs."""

import pytest
from typer.testing import CliRunner

from tests.support import tiny
from undula.cli.main import app
from undula.jobs.base import Base
from undula.jobs.packing import Packing
from undula.jobs.planner import flat as in_one_row
from undula.jobs.trial import APART, Taken, Tried
from undula.study import report
from undula.study.drive import run
from undula.study.outcome import FINAL
from undula.study.plan import Plan
from undula.study.read import parse
from undula.study.store import Store
from undula.study.together import Figures
from undula.study.view import Silent

HEAD = """
title = "tiny"
seeds = [1, 2]
[train]
steps = 4
batch = 4
evaluations = 4
max_grad_norm = 0.0
[[models]]
source = "{model}"
dtype = "float64"
"""
BASELINE = 'baseline = "AuroRA"'
TEXTS = {
    "language": HEAD + """
[sweep]
rates = [3e-3, 1e-2, 1e38]
extend = 0
halving = 2
[[data]]
source = "{data}"
label = "pairs"
task = "causal-lm"
set = {{ generate = 0 }}
[[methods]]
method = "lora"
set = {{ r = 2 }}
[[methods]]
method = "none"
name = "untrained"
""",
    "classes": BASELINE + HEAD + """
[sweep]
rates = [1e-1]
extend = 0
[[data]]
source = "{data}"
label = "reviews"
task = "classification"
set = {{ max_length = 16 }}
[[methods]]
method = "aurora"
""",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    """Drawing takes longer than so small trainings."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(report, "_draw", lambda *_: "<svg ></svg>")
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    rows = tiny.reviews(60)
    pairs = [{"prompt": row["text"], "completion": row["label"]} for row in rows]
    model = tiny.llama(folder / "llama")
    return {"language": {"model": model, "data": tiny.jsonl(folder / "pairs.jsonl", pairs)},
            "classes": {"model": model, "data": tiny.jsonl(folder / "reviews.jsonl", rows)}}  # fmt: skip


@pytest.fixture(scope="module", params=list(TEXTS))
def made(request, sources, tmp_path_factory):
    """(the study, what its runs came to one after the other)."""
    text = TEXTS[request.param].format(**sources[request.param])
    return text, run(parse(text), tmp_path_factory.mktemp("separate"))


def figures(found):
    """{which run: everything of it that is no time and no memory}."""
    kept = ("validation", "test", "others", "parameters", "head_parameters", "steps", "pruned", "deployed", "losses",
            "curve", "error")  # fmt: skip
    return {(o.arm, o.stage, o.lr, o.seed): {k: o.encode()[k] for k in kept} for o in found.outcomes}


def same(one, other):
    one, other = figures(one), figures(other)
    assert set(one) == set(other)
    for which, mine in one.items():
        assert mine["error"] == other[which]["error"]
        for name, value in mine.items():
            assert flat(value) == pytest.approx(flat(other[which][name]), rel=1e-6, abs=1e-6), (which, name)


def flat(value):
    """Numbers in a row."""
    if isinstance(value, dict):
        return flat(list(value.items()))
    if isinstance(value, list | tuple):
        return [number for each in value for number in flat(each)]
    return [] if value is None or isinstance(value, str) else [float(value)]


class Watching(Silent):
    """Keeps what is said, and presses Ctrl-C when so many runs have ended."""

    def __init__(self, patience=1000):
        self.words, self.patience, self.begun_now, self.at_once = [], patience, 0, 0

    def said(self, text):
        self.words.append(text)

    def begun(self, trial):
        self.begun_now += 1
        self.at_once = max(self.at_once, self.begun_now)

    def ended(self, ended):
        self.begun_now -= 1
        self.patience -= 1
        if not self.patience:
            raise KeyboardInterrupt


def test_runs_made_together_have_the_figures_of_separate_ones_after_an_interruption_too(made, tmp_path):
    """Sweeps that halve, rates that diverge, heads of their own, merged and collapsed forms."""
    text, separate = made
    view = Watching(1)
    with pytest.raises(KeyboardInterrupt):
        run(parse(text), tmp_path, view=view, together=3)
    assert 2 <= view.at_once <= 3
    store, keys = Store(tmp_path / "runs.sqlite"), Plan(parse(text)).trials()
    records = store.records(keys)
    assert len(records) == 1
    assert not any(record.state == "running" for record in records.values())
    found = run(parse(text), tmp_path, together=3)
    same(separate, found)
    marked = [r.result["made"].get("together", False) for r in store.records(keys).values() if r.result is not None]
    assert any(marked)
    told = (found.report.parent / "report.md").read_text()
    assert "together with others" in told
    assert "not all made alike" not in told
    if "classification" in text:  # what is tested is the best point, not the last
        assert any(o.validation != o.curve[-1][1] for o in found.outcomes if o.stage == FINAL)
    for o in found.outcomes:
        if o.stage == FINAL and o.arm == "LoRA":
            assert o.deployed["merged"] == pytest.approx(o.test)


LORA, DROPS = ('method = "lora"', 'method = "dropout"\nset = { inner = { is = "lora" }, p = 0.1 }')


def with_arms(sources, *arms, seeds="[1, 2]"):
    """The study of classes with these methods, one rate each."""
    head = TEXTS["classes"].removeprefix(BASELINE).format(**sources["classes"]).split("[[methods]]")[0]
    named = (f'[[methods]]\nname = "{name}"\n{arm}\n' for name, arm in zip(("LoRA", "other"), arms, strict=False))
    return head.replace("[1, 2]", seeds) + "".join(named)


def marks(text, out):
    """{arm: whether its runs were made together with others}."""
    records = Store(out / "runs.sqlite").records(Plan(parse(text)).trials())
    assert all(record.result is not None for record in records.values())
    return {(trial.run.method.public().__name__, "together" in records[key].result["made"])
            for key, trial in Plan(parse(text)).trials().items()}  # fmt: skip


def test_what_draws_random_numbers_is_made_one_after_the_other_and_said(sources, tmp_path):
    """They would be others than those of a run by itself."""
    text, path = with_arms(sources, LORA, DROPS), tmp_path / "study.toml"
    path.write_text(text)
    found = CliRunner().invoke(app, ["study", str(path), "--out", str(tmp_path), "--together", "4"])
    assert "dropout draws other numbers among others: Dropout(" in " ".join(found.output.split())
    assert marks(text, tmp_path) == {("LoRA", True), ("Dropout", False)}
    with pytest.raises(ValueError, match=r"no runs of this study can be made together: dropout.*Dropout\("):
        run(parse(with_arms(sources, DROPS)), tmp_path / "none", together=2)
    refused = CliRunner().invoke(app, ["study", str(path), "--dry-run", "--no-pilot", "--together", "2"])
    assert "--together would do nothing here: --dry-run runs nothing" in " ".join(refused.output.split())


def test_where_sharing_steps_gains_nothing_the_rest_is_made_one_after_the_other(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(Packing, "loses", True)
    view, text = Watching(), with_arms(sources, LORA, seeds="[1, 2, 3]")
    run(parse(text), tmp_path, view=view, together=2)
    assert [words for words in view.words if "gains nothing here" in words]
    assert marks(text, tmp_path) == {("LoRA", True), ("LoRA", False)}


@pytest.mark.parametrize("how", ["fails", "draws"])
def test_a_run_that_cannot_be_made_among_others_is_made_by_itself(how, sources, tmp_path, monkeypatch):
    """And its record is that of a run by itself."""

    def broken(self, course, going_on):
        raise MemoryError("too much for so many")

    if how == "fails":
        monkeypatch.setattr(Figures, "before", broken)
    else:
        monkeypatch.setattr(Base, "draws", lambda *_: True)
    view, text = Watching(), with_arms(sources, LORA)
    run(parse(text), tmp_path, view=view, together=2)
    told = {"fails": "made by itself: MemoryError: too much for so many", "draws": "random numbers are drawn"}[how]
    assert any(told in words for words in view.words)
    assert marks(text, tmp_path) == {("LoRA", False)}


def test_what_was_tried_to_its_end_says_whether_sharing_loses():
    packing = Packing()
    packing.tried = Tried(64, in_one_row, lambda: 1.0, lambda: 0)
    assert not packing.loses
    packing.tried.decode([{"shape": [2, 3], "ways": ["wholes/1", APART],
                           "taken": [["wholes/1", 0, 2.0], ["wholes/1", 1, 2.0], [APART, 2, 1.0]]}])  # fmt: skip
    assert not packing.loses  # its second round may be slow
    packing.tried.trials[2, 3].taken.append(Taken(APART, 3, 1.1))
    assert packing.loses
