"""One field is one setting: on the command line, in study files, in run.json, in comparisons; older files stay true."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from typer.testing import CliRunner

import undula
from tests.support import tiny
from tests.support.courses import COURSES
from undula import ranks
from undula.cli.main import app
from undula.io import files
from undula.kernels import units
from undula.optim.optimisers import (
    GORP,
    SGD,
    Adafactor,
    AdamW,
    LoRAFA,
    LoRAGGPO,
    LoRAMGPO,
    LoRAPro,
    LoRSum,
    SAMReference,
)
from undula.optim.schedules import Constant, Cosine, Linear
from undula.ranks.memory import moments
from undula.ranks.relora import Jagged
from undula.study.plan import Plan
from undula.study.read import Faults, parse
from undula.study.spec import Arm, Training
from undula.study.trial import Trial
from undula.train import Classification, Interrupted, Recipe, Run, prepare
from undula.train.recipe import Settings

PACKAGE = Path(undula.__file__).parent
OLD = Path(__file__).parents[1] / "fixtures" / "runs"


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    data = tiny.jsonl(folder / "rows.jsonl", tiny.reviews(60))
    return Run(
        tiny.bert(folder / "bert"), data, Classification(), undula.LoRA(r=2), folder / "unused",
        where=("query", "value"), lr=5e-3, max_steps=8, batch=8, save_every=3,
    )  # fmt: skip


# One place


ONCE = """
    colour: Count = option(7, "Of the adapter.")
    share: PartShare | None = option(None, "Of it.")
    dark: bool = option(False, "Whether.")
    names: tuple[str, ...] = option((), "Several.")
    title: str | None = option(None, "One.")
    second: Schedule = option(Linear(), "One of {names}.")
    by_name: Mapping[str, Method] = field(default_factory=dict, metadata=facts("Several methods."))
"""
CHILD = """
import json, sys
from pathlib import Path
import torch
from typer.testing import CliRunner
import undula
from undula.cli import app
from undula.study.read import parse
from undula.study.compare import _entries
from undula.study.plan import Plan
from undula.train import Classification, Run
from undula.cli import training

room, new = Path(sys.argv[1]), ("colour", "share", "dark", "names", "title", "second", "by_name")
def new_of(run):
    return {name: repr(getattr(run, name)) for name in new}

def called(*words):
    return CliRunner().invoke(app, ["train", *words], env={"COLUMNS": "200", "TERM": "dumb"})

typed = []
training._fit = lambda run, *_: typed.append(run)
done = called("--model", "base", "--data", "rows", "--task", "classification", "--out", str(room / "9"),
              "--colour", "9", "--share", "0.5", "--dark", "--names", "a", "--names", "b", "--title", "t",
              "--second", "jagged,cycles=3", "--by-name", "q=lora,r=2")
assert typed, done.output
study = '''
[train]
colour = 9
share = 0.5
dark = true
names = ["a", "b"]
title = "t"
second = { is = "jagged", cycles = 3 }
by_name = { q = { is = "lora", r = 2 } }
[[models]]
source = "base"
[[data]]
source = "rows"
task = "classification"
[[methods]]
method = "lora"
[[methods]]
method = "aurora"
colour = 5
dark = false
'''
plan = Plan(parse(study, check=False))
plain = Run(model="base", data="rows", task=Classification(), method=undula.LoRA(), out=room / "7")
for run in (plain, *typed):
    run.save(None)
    undula.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), undula.LoRA(r=1)).save(run.out)
try:
    parse(study.replace("colour = 9", "colour = 0").replace("dark = true", "dark = 1"), check=False)
except ValueError as error:
    fault = str(error)
print(json.dumps({
    "help": [line for line in called("--help").output.splitlines() if "--colour" in line],
    "typed": new_of(typed[0]),
    "arms": [cell.arm.name for cell in plan.cells],
    "study": [new_of(cell.trial(1e-3, 1, False).run) for cell in plan.cells],
    "fault": fault,
    "written": [json.loads((room / n / "run.json").read_text())["run"].get("colour") for n in "79"],
    "read": [new_of(Run.load(room / n)) for n in "79"],
    "key": [Plan(parse(study.replace("colour = 9", f"colour = {n}"), check=False)).cells[0].trial(1e-3, 1, False).key
            for n in (7, 3)],
    "compared": [e.arm for e in _entries([room / "7", room / "9"])],
}))
"""


def test_a_field_that_is_added_in_one_place_is_everywhere(python, tmp_path):
    """A line in a copy of the package, for each kind of field: then option, key, entry and setting are there."""
    shutil.copytree(PACKAGE, tmp_path / "undula")
    path = tmp_path / "undula" / "train" / "recipe.py"
    head, mark, rest = path.read_text().partition("    epochs: Positive")
    path.write_text(head + ONCE.lstrip("\n") + mark + rest)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = [python, "-c", CHILD, str(tmp_path / "room")]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (line,) = found["help"]
    assert "Of the adapter." in line
    assert "default: 7" in line
    new = {"colour": "9", "share": "0.5", "dark": "True", "names": "('a', 'b')", "title": "'t'",
           "second": repr(Jagged(cycles=3)), "by_name": repr({"q": undula.LoRA(r=2)})}  # fmt: skip
    old = {"colour": "7", "share": "None", "dark": "False", "names": "()", "title": "None", "second": "Linear()",
           "by_name": "{}"}  # fmt: skip
    assert found["typed"] == new
    assert found["study"] == [new, new | {"colour": "5", "dark": "False"}]
    assert found["arms"] == ["LoRA", "AuroRA colour=5 dark=false"]
    assert "line 3: colour is at least 1, found 0" in found["fault"]
    assert "line 5: dark is true or false, found 1" in found["fault"]
    assert found["written"] == [None, 9]
    assert found["read"] == [old, new]
    assert found["key"][0] != found["key"][1]
    plain, other = found["compared"]
    assert plain == "LoRA(r=8) from 7"
    for told in ("colour=9", "share=0.5", "dark=true", 'names=["a", "b"]', "title=t", "second=", "by_name="):
        assert told in other


def test_every_setting_is_an_option_and_a_key():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for f in dataclasses.fields(Run):
        if f.metadata["offered"]:
            assert (f.metadata["flag"] or f"--{f.name.replace('_', '-')}") in shown, f.name
    assert {f.name for f in dataclasses.fields(Training)} == {f.name for f in dataclasses.fields(Settings)} | {
        "evaluations"
    }


# What was written before


@pytest.mark.parametrize("name", ["plain", "relora", "every", "head", "version1"])
def test_runs_that_older_versions_wrote_are_what_they_were(name, tmp_path):
    """Read, they write the same again; of older ones it is known that nothing was measured while they trained and that
    activations were not computed again, of version 1 how its rows were split."""
    shutil.copy(OLD / f"{name}.json", tmp_path / "run.json")
    told = json.loads((OLD / f"{name}.json").read_text())["run"]
    again = Run.load(tmp_path).encode()
    older = {"by_chance": True, "probe_batches": None} if name == "version1" else {}
    assert again == told | older | {"eval_every": 0.0, "gradient_checkpointing": False, "plain": True}


def test_a_run_of_relora_that_says_no_schedule_was_trained_by_the_linear_one(tmp_path):
    """Runs of versions without schedules; today's write the one that applies, the linear one too."""
    data = json.loads((OLD / "relora.json").read_text())
    del data["run"]["schedule"]
    (tmp_path / "run.json").write_text(json.dumps(data))
    old = Run.load(tmp_path)
    assert old.rates() == Linear()
    old.save(None)
    assert Run.load(tmp_path).rates() == Linear()
    assert dataclasses.replace(old, schedule=None).rates() == Jagged(3)


STUDY = """
seeds = [1, 2]
[train]
steps = 40
batch = 8
accumulate = 2
warmup = 0.1
weight_decay = 0.01
head_lr = 0.03
where = ["query", "value"]
evaluations = 4
[sweep]
rates = [1e-3]
extend = 0
[[models]]
source = "base"
dtype = "bfloat16"
[[data]]
source = "rows"
task = "classification"
train = 100
[[data]]
source = "others"
task = "causal-lm"
batch = 4
[[budgets]]
rank = 4
[[methods]]
method = "lora"
[[methods]]
method = "lora"
allocator = "relora"
allocate = { cycles = 4 }
[[methods]]
method = "loran"
set = { activation = { is = "sinter", a = 1e-3 } }
[[methods]]
method = "none"
[[methods]]
method = "full"
"""
KEYS = {  # as the version before recipes made them
    "LoRA": ("67581609f694be7b361b5eaa", "4abafd337bddd8604c2335ea"),
    "LoRA + ReLoRA": ("04efa6e46c9c3d90ad0f4709", "ce4e919e8545676b73b1f301"),
    "LoRAN": ("82c3b5acb1b77312a4c8fc92", "586f9824463348148ace3e65"),
    "head only": ("0880f2820a179848b6d0c9f7", "1354d3f00bc0625925a92d72"),
    "full fine-tuning": ("4549d241bd32c59cb8e537a3", "bc3bfd900f7dea271e88e08d"),
}


def cells(text):
    return {(c.arm.name, c.rows.label): c for c in Plan(parse(text, check=False)).cells}


def trials(text):
    """{(arm, data): a run of it}"""
    return {name: cell.trial(1e-3, 1, True) for name, cell in cells(text).items()}


def test_runs_of_studies_are_found_again_under_their_keys():
    """A store that an older version filled is not filled again."""
    found = trials(STUDY)
    assert {(arm, data): t.key for (arm, data), t in found.items()} == {
        (arm, data): key for arm, keys in KEYS.items() for data, key in zip(("rows", "others"), keys, strict=True)
    }
    whole = "[train]\nepochs = 3\nweight_decay = 0\n" + ROOM + '[[methods]]\nmethod = "lora"\n'  # 3 and not 3.0
    found["LoRA", "d"] = trials(whole)["LoRA", "d"]
    assert found["LoRA", "d"].key == "fe5b99635b7613c593e1f988"
    for t in found.values():
        assert Trial.decode(json.loads(json.dumps(t.encode()))).key == t.key


# Optimisers and schedules


class Seen(TrainerCallback):
    """Notes the optimiser at work; presses Ctrl-C once."""

    def __init__(self, stop=None):
        self.stop, self.optimizer, self.rates = stop, None, []

    def on_pre_optimizer_step(self, args, state, control, **found):
        self.optimizer = getattr(found["optimizer"], "optimizer", found["optimizer"])
        self.rates.append([g["lr"] for g in self.optimizer.param_groups])
        if state.global_step == self.stop:
            os.kill(os.getpid(), 2)


COURSE = (  # optimiser, schedule, the class that it is
    (AdamW(beta2=0.99, eps=1e-6), Cosine(), torch.optim.AdamW),
    (SGD(), Constant(), torch.optim.SGD),
    (SGD(momentum=0.5, nesterov=True), Jagged(cycles=2), torch.optim.SGD),
    (Adafactor(), Linear(), None),
    (Adafactor(beta1=0.9), Cosine(), None),
    (LoRAPro(base=AdamW(beta2=0.99)), Linear(), None),
    (LoRAMGPO(rho=0.5), Linear(), None),
    (LoRAPro(full=True), Linear(), None),
    (LoRAGGPO(sigma=0.1), Linear(), None),
    (LoRSum(), Linear(), None),
    (SAMReference(), Linear(), None),
    (LoRAFA(), Linear(), None),
    (GORP(project=1), Linear(), None),
)


def test_sams_share_is_refused_where_it_has_no_part():
    assert SAMReference(conflict=True).conflict
    with pytest.raises(ValueError, match=r"SAMReference.lam has no part in it with conflict, found 0.3"):
        SAMReference(conflict=True, lam=0.3)


def test_sams_reference_goes_with_methods_that_have_no_pairs(usual, tmp_path):
    run = dataclasses.replace(usual, method=undula.BlockLoRA(r=4, blocks=2), out=tmp_path / "out", max_steps=2)
    with pytest.raises(ValueError, match=r"moves pairs of factors A and B, and BlockLoRA.* has none"):
        dataclasses.replace(run, optimiser=LoRAPro())
    undula.train(dataclasses.replace(run, optimiser=SAMReference()))
    assert all(bool(f["B"].any()) for f in undula.Adapter.load(run.out).factors.values())


@pytest.mark.parametrize(("optimiser", "schedule", "kind"), COURSE, ids=repr)
def test_every_optimiser_trains_and_resumes_to_the_bit(optimiser, schedule, kind, usual, tmp_path):
    """With the head's own rate and a weight decay; run.json brings optimiser and schedule back."""
    how = {"optimiser": optimiser, "schedule": schedule, "head_lr": 1e-2, "weight_decay": 0.1}
    whole, cut = (dataclasses.replace(usual, out=tmp_path / name, **how) for name in ("whole", "cut"))
    seen = Seen()
    undula.train(whole, callbacks=(seen,))
    assert kind is None or type(seen.optimizer) is kind
    group, constants = seen.optimizer.param_groups[0], getattr(optimiser, "base", optimiser).made()[1]
    assert {name: group[name] for name in constants} == constants
    factor = schedule.multiplier(8, 1)
    for step, rates in enumerate(seen.rates):
        assert set(rates) == {usual.lr * factor(step), 1e-2 * factor(step)}
    with pytest.raises(Interrupted):
        undula.train(cut, callbacks=(Seen(stop=4),))
    again = Run.load(cut.out)
    assert (again.optimiser, again.rates()) == (optimiser, schedule)
    assert undula.train(again, resume=True)["resumed_from_step"] == 5
    mine, theirs = (undula.Adapter.load(run.out) for run in (cut, whole))
    assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    moved = [f["B"].abs().max().item() for f in theirs.factors.values()]
    assert min(moved) > 0


def test_a_training_goes_on_orthogonal_to_what_the_one_before_has_used(usual, tmp_path):
    """By the command line: `--from RUN --optimiser gorp`; a run that was trained otherwise is refused."""
    one, other = tmp_path / "one", tmp_path / "other"
    words = ["train", "--model", usual.model, "--data", usual.data, "--task", "classification", "--lr", 5e-3,
             "--max-steps", 3, "--batch", 8, "--eval-rows", 4]  # fmt: skip

    def call(*more):
        return CliRunner().invoke(app, [str(w) for w in (*words, *more)])

    first = ("--where", "query", "--set", "r=2")
    assert call(*first, "--optimiser", "gorp,energy=0.5", "--out", one).exit_code == 0
    done = call("--from", one, "--optimiser", "gorp,energy=0.5", "--out", other)
    assert done.exit_code == 0, done.output
    bases, more = (files.read_state(place, "tasks")[1] for place in (one, other))
    begun, ended = (undula.Adapter.load(place) for place in (one, other))
    for site, name, t in ended.tensors():
        S, moved = bases[f"{site}.{name}"], t - begun.factors[site][name]
        moved = moved.T if name == "A" else moved
        assert S.shape[1] > 0
        assert (S.T @ moved).abs().max() < 1e-6 < moved.abs().max()
        assert torch.equal(more[f"{site}.{name}"][:, : S.shape[1]], S)
    assert call(*first, "--out", tmp_path / "plain").exit_code == 0
    refused = call("--from", tmp_path / "plain", "--optimiser", "gorp", "--out", tmp_path / "c")
    assert refused.exit_code != 0
    assert "train the task before with it too" in " ".join(refused.output.split())


def test_the_usual_optimiser_is_the_trainers_own(tmp_path):
    """Who says nothing gets what `transformers.Trainer` takes by itself, constants and kernel."""
    own, constants = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), report_to=[]))
    kind, ours = AdamW().made()
    assert kind is own
    assert ours == {name: value for name, value in constants.items() if name != "lr"}


def test_adafactors_step_is_the_papers(usual):
    """One step of a matrix from zero: the gradient over the root of its factored second moment, at the run's rate."""
    torch.manual_seed(0)
    g = torch.randn(3, 4, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    kind, constants = Adafactor(clip=100.0).made()
    p.grad = g.clone()
    kind([p], lr=0.1, **constants).step()
    v = g.square().mean(1, keepdim=True) * g.square().mean(0, keepdim=True) / g.square().mean()
    torch.testing.assert_close(p.detach(), -0.1 * g / v.sqrt())


@pytest.mark.parametrize("name", ["AdaLoRA", "LoRASC"])
def test_allocators_work_over_gradient_descent(name, usual, tmp_path):
    """One of ranks and one that begins anew; the others in a loop, see `test_courses`."""
    method, how = COURSES[name]
    run = dataclasses.replace(usual, method=method, allocator=how, optimiser=SGD(), max_steps=12, out=tmp_path, lr=1e-2)
    assert undula.train(run)["state"] == "done"


def test_adafactor_and_allocators_are_refused_together(usual):
    """It remembers sums, of which no entry can begin again: said before anything is opened, and in own loops too."""
    with pytest.raises(ValueError, match=r"ReLoRA.*Adafactor\(.* remembers sums .* AdamW"):
        dataclasses.replace(usual, allocator=ranks.ReLoRA(), optimiser=Adafactor())
    told = fault(STUDY.replace("[train]\n", '[train]\noptimiser = "adafactor"\n'), "optimiser = ")
    assert "LoRA + ReLoRA: ReLoRA(cycles=4" in told
    p = torch.nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.ones(3, 4)
    kind, constants = Adafactor(beta1=0.9).made()
    for optimizer in (kind([p], lr=0.1, **constants), torch.optim.Adafactor([p])):
        optimizer.step()
        with pytest.raises(TypeError, match=r"Adafactor keeps .* sums of rows and columns.*AdamW"):
            moments(optimizer, p)


def test_constants_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match=r"SGD\.nesterov .* momentum > 0"):
        SGD(momentum=0.0, nesterov=True)
    with pytest.raises(TypeError, match=r"AdamW has no option betas, lr; .* beta1 and beta2\. .* Run\(lr=\.\.\.\)"):
        AdamW(betas=(0.9, 0.99), lr=0.1)


def test_loraplus_is_a_setting(usual, tmp_path):
    """The factors B at so many times the rate, the head at its own, all else at the run's; a method without B says so
    before anything is measured."""
    seen, run = Seen(), dataclasses.replace(usual, b_ratio=4.0, head_lr=1e-2, schedule=Constant(), warmup=0.0)
    undula.train(dataclasses.replace(run, out=tmp_path / "plus"), callbacks=(seen,))
    assert all(set(rates) == {usual.lr, 4 * usual.lr, 1e-2} for rates in seen.rates)
    fast = [p for g in seen.optimizer.param_groups if g["lr"] == 4 * usual.lr for p in g["params"]]
    assert {tuple(p.shape) for p in fast} == {(32, 2)}  # B of every query and value, and nothing else
    assert len(fast) == 4
    with pytest.raises(ValueError, match=r"LoRA\+ .* nothing that trains in this model is one"):
        undula.train(dataclasses.replace(run, method=undula.SHiRA(r=1), out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_settings_have_one_name_each():
    """`steps` is what a study file says for max_steps; what other libraries call a setting is told its name here."""
    assert Training(steps=3) == Training(max_steps=3)
    with pytest.raises(TypeError, match="max_steps is given twice"):
        Training(steps=3, max_steps=3)
    for name, told in (("optimizer", "optimiser"), ("learning_rate", "lr"), ("num_train_epochs", "epochs")):
        with pytest.raises(TypeError, match=rf"Run has no option {name}; it has: model, data, .* called {told}"):
            Run("m", "d", Classification(), undula.LoRA(), "o", **{name: 1})
    with pytest.raises(TypeError, match="Run has 5 options without their names, found 6"):
        Run("m", "d", Classification(), undula.LoRA(), "o", "query")


WRONG = (
    ({"where": re.compile("q")}, "where of a run is text"),
    ({"where": ["query", 3]}, "where of a run is text.* found 3"),
    ({"exclude": 3}, "exclude of a run is text"),
    ({"full": [None]}, "full of a run is text"),
    ({"overrides": {"q": "lora"}}, "overrides are methods by pattern"),
    ({"overrides": undula.LoRA()}, "overrides are methods by pattern"),
    ({"optimiser": torch.optim.SGD}, r"Run\.optimiser is a Optimiser"),
    ({"optimiser": None}, r"Run\.optimiser is a Optimiser"),
    ({"dtype": 3}, "no dtype is called '3'; there are: float32"),
    ({"dtype": torch.int8}, "no dtype is called 'int8'; there are: float32"),
    ({"schedule": "cosine"}, r"Run\.schedule is a Schedule"),
)


@pytest.mark.parametrize(("changes", "told"), WRONG, ids=repr)
def test_what_no_file_could_hold_is_refused_when_a_run_is_made(changes, told, usual):
    with pytest.raises((TypeError, ValueError, LookupError), match=told):
        dataclasses.replace(usual, **changes)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("has", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_a_type_that_fits_the_machine_is_chosen_once(device, has, chosen, usual, tmp_path, monkeypatch):
    """What is written is what was chosen: where the run goes on there may be other units.  Of a GPU its own count."""
    gpu = device == "cuda"
    for name in units.CPU:
        monkeypatch.setattr(torch.cpu, name, lambda: has != gpu, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has)
    run = dataclasses.replace(usual, dtype="auto", out=tmp_path / "run")
    assert run.dtype == getattr(torch, chosen)
    run.save(None)
    study = STUDY.replace('dtype = "bfloat16"', 'dtype = "auto"')
    assert parse(study, check=False).models[0].dtype == chosen
    for name in units.CPU:
        monkeypatch.delattr(torch.cpu, name)  # of a version of torch that does not tell
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dataclasses.replace(usual, dtype="auto").dtype == torch.float32
    assert Run.load(run.out) == run
    assert Recipe.load(run.out / "run.toml").dtype == run.dtype


def test_what_does_nothing_is_said(usual):
    """Settings of layers where none is adapted; another schedule than the allocator's; a recipe without a place."""
    idle = {"exclude": "query", "overrides": {"*": undula.LoRA(r=1)}, "b_ratio": 2.0}
    notes = "\n".join(prepare(dataclasses.replace(usual, method=None, **idle)).notes)
    for name in ("where", *idle):
        assert f"{name}=" in notes
        assert notes.count("does nothing: without a method no layer is adapted") == 4
    other = dataclasses.replace(usual, allocator=ranks.ReLoRA(cycles=2), schedule=Constant())
    assert "brings the schedule Jagged(cycles=2" in "\n".join(prepare(other).notes)
    recipe = Recipe(**{f.name: getattr(usual, f.name) for f in dataclasses.fields(Recipe)})
    assert Run.of(recipe, usual.out) == usual
    with pytest.raises(TypeError, match=r"Run\.of\(recipe, out\)"):
        undula.train(recipe)


# The layers


def test_excluded_layers_stay_as_they_are(usual, tmp_path):
    ready = prepare(dataclasses.replace(usual, exclude="*.layer.1.*"))
    assert {name.split(".")[3] for name in ready.adapter.factors} == {"0"}
    with pytest.raises(LookupError, match=r"nowhere\.\*"):
        prepare(dataclasses.replace(usual, exclude=["nowhere.*"]))


def test_the_command_line_says_all_of_it(usual, tmp_path):
    """Choices with options, in one text or apart, and what is not said stays at its default."""
    words = ["train", "--model", usual.model, "--data", usual.data, "--task", "classification,max_length=16",
             "--out", str(tmp_path / "o"), "--set", "r=2", "--where", "query", "--where", "value",
             "--exclude", "*.1.*", "--override", "*.value=aurora,r=3", "--full", "pooler.dense.bias",
             "--optimiser", "sgd", "--optimiser-set", "momentum=0.5", "--schedule", "jagged,cycles=2",
             "--max-grad-norm", "0", "--max-steps", "4", "--batch", "8"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    run = Run.load(tmp_path / "o")
    wanted = Run(
        model=usual.model, data=usual.data, task=run.task, method=undula.LoRA(r=2), out=run.out, max_steps=4, batch=8,
        where=("query", "value"), exclude=("*.1.*",), overrides={"*.value": undula.AuroRA(r=3)},
        full=("pooler.dense.bias",), optimiser=SGD(momentum=0.5), schedule=Jagged(2), max_grad_norm=0.0,
        gradient_checkpointing=False,  # what was chosen, by need
    )  # fmt: skip
    assert run == wanted
    assert run.task.max_length == 16


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--optimiser", "lion"), "no optimiser is called 'lion'; there are: adafactor, adamw, "),
        (("--optimiser", "sgd,momentum=2"), "SGD.momentum is at least 0 and below 1, found 2"),
        (("--optimiser-set", "beta3=1"), "AdamW has no option beta3; it has: beta1, beta2, eps"),
        (("--schedule-set", "cycles=2"), "--schedule-set has the options of a schedule: name one with --schedule"),
        (("--method", "none", "--exclude", "q"), "these would do nothing: leave out --exclude"),
        (("--allocator", "relora", "--optimiser", "adafactor"), "remembers sums"),
    ],
)
def test_what_the_command_line_cannot_mean(words, told, usual, tmp_path):
    given = ["train", "--model", usual.model, "--data", usual.data, "--task", "classification"]
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "o"), *words])
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())
    assert not (tmp_path / "o").exists()


# Studies


SAID = {
    'exclude = ["*.1.*"]': {"exclude": ("*.1.*",)},
    'full = ["pooler.*"]': {"full": ("pooler.*",)},
    "probe_batches = 2": {"probe_batches": 2},
    "max_grad_norm = 0.0": {"max_grad_norm": 0.0},
    'optimiser = "sgd"': {"optimiser": SGD()},
    'optimiser = { is = "adamw", beta2 = 0.95 }': {"optimiser": AdamW(beta2=0.95)},
    'schedule = "cosine"': {"schedule": Cosine()},
    "epochs = 2": {"epochs": 2},
    "steps = 3": {"max_steps": 3},
}
ROOM = '[[models]]\nsource = "m"\n[[data]]\nsource = "d"\ntask = "classification"\n'
TWO = '[[methods]]\nmethod = "lora"\nname = "LoRA"\n{own}\n[[methods]]\nmethod = "lora"\nname = "other"\n'


@pytest.mark.parametrize("line", SAID)
def test_a_study_says_it_for_all_runs_or_for_one_arm(line):
    """In [train] for all, in [[methods]] for that arm alone; who says nothing is what it was."""
    (name, value), plain = *SAID[line].items(), getattr(Training(), next(iter(SAID[line])))
    for text, found in (
        (f"[train]\n{line}\n{ROOM}{TWO.format(own='')}", {"LoRA": value, "other": value}),
        (ROOM + TWO.format(own=line), {"LoRA": value, "other": plain}),
    ):
        runs = {arm: t.run for (arm, _), t in trials(text).items()}
        assert {arm: getattr(run, name) for arm, run in runs.items()} == found
        assert all(isinstance(run, Recipe) for run in runs.values())


def test_overrides_of_a_study():
    text = f'{ROOM}{TWO.format(own="""overrides = { "*.value" = { is = "aurora", r = 3 } }""")}'
    found = {arm: t.run.overrides for (arm, _), t in trials(text).items()}
    assert found == {"LoRA": {"*.value": undula.AuroRA(r=3)}, "other": {}}


def test_relora_keeps_its_own_schedule_where_a_study_has_one_for_all():
    """Without its re-warm-up it would be another method: an arm says so itself, or it is not so."""
    arm = '[[methods]]\nmethod = "lora"\nallocator = "relora"\nallocate = { cycles = 2 }\n'
    own = f'{arm}name = "own"\nschedule = "constant"\n'
    text = f'[train]\nschedule = "cosine"\n{ROOM}{TWO.format(own="")}{arm}{own}'
    found = {name: t.run.rates() for (name, _), t in trials(text).items()}
    assert found == {"LoRA": Cosine(), "other": Cosine(), "LoRA + ReLoRA": Jagged(2), "own": Constant()}


def test_an_arm_may_have_nothing_of_what_the_others_have():
    own = "full = []\nexclude = []\noverrides = {}"
    text = f'[train]\nfull = ["norm"]\nexclude = ["q"]\noverrides = {{ v = "aurora" }}\n{ROOM}{TWO.format(own=own)}'
    found = {arm: t.run for (arm, _), t in trials(text).items()}
    assert (found["LoRA"].full, found["LoRA"].exclude, found["LoRA"].overrides) == ((), (), {})
    assert (found["other"].full, found["other"].exclude) == (("norm",), ("q",))


def test_an_arm_is_called_by_what_is_its_own():
    """Two arms that differ by nothing but a setting are told apart in every table."""
    text = (
        ROOM
        + '[[methods]]\nmethod = "lora"\n[[methods]]\nmethod = "lora"\noptimiser = { is = "sgd", momentum = 0.5 }\n'
    )
    text += 'steps = 9\nexclude = ["q"]\n'
    assert [arm for arm, _ in trials(text)] == ["LoRA", 'LoRA optimiser=SGD(momentum=0.5) steps=9 exclude=["q"]']


def fault(text, line):
    """What is said of the line that holds `line`."""
    with pytest.raises(Faults) as caught:
        parse(text, check=False)
    lines = text.splitlines()
    return next(why for number, why in caught.value.found if number and line in lines[number - 1])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('optimiser = "lion"', "no optimiser is called 'lion'; there are: ALLoRA, Adafactor, AdamW, "),
        ('optimiser = { is = "sgd", momentum = 2 }', "SGD.momentum is at least 0 and below 1, found 2"),
        ("schedule = 3", "schedule is a text or a table, found 3"),
        ("exclude = [1]", "exclude is a list of names and globs, found [1]"),
        ('overrides = { "*.q" = "lorra" }', "no method is called 'lorra'"),
        ("probe_batches = 0", "probe_batches is at least 1, found 0"),
        ("optimizer = 3", "did you mean optimiser?"),
        ("steps = 3\nepochs = 2", "steps = 3 decides how long a run is"),
    ],
)
@pytest.mark.parametrize("place", ["train", "methods"])
def test_faults_of_settings_stand_at_their_line(line, told, place):
    text = ROOM + TWO.format(own=line) if place == "methods" else f"[train]\n{line}\n{ROOM}{TWO.format(own='')}"
    assert told in fault(text, line.splitlines()[-1])


def test_settings_that_an_arm_or_a_budget_cannot_have():
    """An allocator that does not know a method, a budget that would size a part alone, layers that none adapts."""
    gated = '[[methods]]\nmethod = "gatedlora"\nallocator = "budget"\nallocate = { total = 8 }\n'
    mixed = f'[train]\noverrides = {{ "*.q" = "aurora" }}\n{ROOM}{TWO.format(own="")}{gated}'
    assert "GatedLoRA + Budget: Budget(" in fault(mixed, "overrides")
    sized = f'[[budgets]]\nrank = 2\n{ROOM}{TWO.format(own="""overrides = { "*.q" = "aurora" }""")}'
    assert "overrides stay as written" in fault(sized, "overrides")
    counted = f'[[budgets]]\nparameters = 100\n{ROOM}{TWO.format(own="""full = ["norm"]""")}'
    assert "what trains in full" in fault(counted, "full")
    head = f'{ROOM}[[methods]]\nmethod = "none"\nexclude = ["q"]\n{TWO.format(own="")}'
    assert "would do nothing" in fault(head, "exclude")
    long = f"[train]\nsteps = 9\n{ROOM}{TWO.format(own='epochs = 2')}"
    assert "LoRA: steps = 9 decides" in fault(long, "epochs")
    with pytest.raises(ValueError, match="an arm has no setting colour; there are: where, exclude"):
        Arm("a", undula.LoRA(), own={"colour": 3})
    with pytest.raises(ValueError, match=r"Training\.batch is at least 1"):
        Arm("a", undula.LoRA(), own={"batch": 0})


def test_a_budget_counts_the_layers_that_an_arm_adapts(usual):
    """With its own `where` and `exclude`: half of the layers, twice the rank."""
    text = f"""
[train]
where = ["query"]
[[models]]
source = "{usual.model}"
[[data]]
source = "{usual.data}"
task = "classification"
[[budgets]]
parameters_of = "LoRA"
rank = 2
[[methods]]
method = "lora"
[[methods]]
method = "lora"
name = "half"
exclude = ["*.1.*"]
"""
    assert {c.arm.name: c.method.r for c in Plan(parse(text)).cells} == {"LoRA": 2, "half": 4}


# Going on from an adapter


def test_a_training_goes_on_from_a_squeezed_adapter(usual, tmp_path):
    """Trained at rank 4, squeezed to 2, trained on: it begins with what the squeezed adapter measures, at its ranks and
    with its head; stopped and resumed it is the same."""
    first = dataclasses.replace(usual, method=undula.LoRA(r=4), out=tmp_path / "first")
    undula.train(first)
    less, place = tmp_path / "less", tmp_path / "told"
    words = ["squeeze", str(first.out), "--budget", "7", "--out", str(less), "--json", str(place)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    told, twins = json.loads(place.read_text()), [first.out / p.name for p in less.iterdir()]
    assert first.out / "run.json" in twins
    done = CliRunner().invoke(app, [*words[:2], "--size", "5k", "--out", str(tmp_path / "tiny")])
    assert re.search(r"what goes with the adapter \(its run, its card\) takes [\d,]+ bytes", done.output), done.output
    assert told["bytes_before"] == sum(p.stat().st_size for p in twins)  # of the same files
    assert Run.load(tmp_path / "less").model == first.model
    less = undula.Adapter.load(tmp_path / "less")
    run = dataclasses.replace(
        usual, method=None, where=Settings.where, begin_from=str(tmp_path / "less"), out=tmp_path / "on"
    )
    report = undula.train(run)
    assert report["before"] == pytest.approx(undula.evaluate(tmp_path / "less"))
    found = undula.Adapter.load(run.out)
    assert found.methods == less.methods
    assert all(not torch.equal(t, found.factors[s][k]) for s, k, t in less.tensors())
    assert Run.load(run.out).begin_from == str(tmp_path / "less")
    assert Run.load(run.out).method == less.method

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise MemoryError

    again = dataclasses.replace(run, out=tmp_path / "again")
    with pytest.raises(MemoryError):
        undula.train(again, callbacks=(Stop(),))
    undula.train(Run.load(again.out), resume=True)
    resumed = undula.Adapter.load(again.out)
    assert all(torch.equal(t, resumed.factors[s][k]) for s, k, t in found.tensors())


def test_what_a_training_cannot_go_on_from_is_refused(usual, tmp_path):
    bare = undula.attach(
        prepare(dataclasses.replace(usual, out=tmp_path / "x")).model, undula.LoRA(r=2), name="b"
    ).copy()
    dataclasses.replace(bare, full={}).save(tmp_path / "bare")
    from_it = {"where": Settings.where, "method": None, "begin_from": tmp_path / "bare", "out": tmp_path / "y"}
    with pytest.raises(ValueError, match=r"does not hold classifier.*trains in full here"):
        prepare(dataclasses.replace(usual, **from_it))
    with pytest.raises(ValueError, match="goes on with the adapter there, at its layers: leave out where"):
        dataclasses.replace(usual, begin_from=tmp_path / "bare")
    with pytest.raises(ValueError, match=r"has LoRA\(r=2.*goes on with that; found SoRA"):
        prepare(dataclasses.replace(usual, **{**from_it, "method": undula.SoRA()}))
    bare.save(tmp_path / "other", base="elsewhere/model")
    with pytest.raises(ValueError, match="is for elsewhere/model, and this run trains on"):
        prepare(dataclasses.replace(usual, **{**from_it, "begin_from": tmp_path / "other"}))
    with pytest.raises(FileNotFoundError):
        prepare(dataclasses.replace(usual, **{**from_it, "begin_from": tmp_path / "nowhere"}))
