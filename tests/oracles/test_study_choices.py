"""What a study decides: the rate of a sweep, the size for a budget, who may take a run."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import undula
from undula.core.method import Method
from undula.core.options import build_from
from undula.host.views import site
from undula.host.where import choose
from undula.io.toml import line_of, lines
from undula.study import spec
from undula.study.alive import LOOK, SILENCE, Owner, Watchman, birth
from undula.study.plan import Plan
from undula.study.rates import Decision, decide
from undula.study.read import Faults, read
from undula.study.sizes import at_rank, count, with_parameters
from undula.study.spec import Rows
from undula.study.store import Store
from undula.study.trial import Trial
from undula.study.watch import pruned
from undula.train import CausalLM, Classification, Run
from undula.train.tasks.task import Task

GRID = (1e-3, 1e-2)


def test_a_grid_grows_until_the_best_rate_is_inside():
    def score(lr):  # best at 0.1
        return -abs(torch.log10(torch.tensor(lr)).item() + 1)

    scores, asked = {}, []
    while (d := decide(GRID, scores, 10, 3, True)).more:
        asked += d.more
        scores |= {lr: score(lr) for lr in d.more}
    assert asked == [1e-3, 1e-2, 0.1, 1.0]
    assert d == Decision(chosen=0.1, bracketed=True)
    assert decide(GRID, {lr: -s for lr, s in scores.items()}, 10, 3, False) == d


def test_the_bound_of_a_grid_is_reported_as_unbracketed():
    scores = {}
    while (d := decide(GRID, scores, 10, 2, True)).more:
        scores |= {lr: lr for lr in d.more}  # the higher the better, for ever
    assert sorted(scores) == [1e-3, 1e-2, 0.1, 1.0]
    assert d == Decision(chosen=1.0, bracketed=False)


def test_failed_rates_are_worse_than_any_and_where_all_fail_the_grid_goes_down():
    assert decide(GRID, {1e-3: 0.5, 1e-2: None}, 10, 0, True) == Decision(chosen=1e-3, bracketed=False)
    scores = {1e-3: None, 1e-2: None}
    assert decide(GRID, scores, 10, 1, True) == Decision(more=(1e-4,))
    assert decide(GRID, scores | {1e-4: None}, 10, 1, True) == Decision()
    assert decide(GRID, scores | {1e-4: 0.1}, 10, 1, True) == Decision(chosen=1e-4, bracketed=False)


def test_what_an_older_form_tried_beyond_a_gap_changes_nothing():
    scores = {1e-3: 0.1, 1e-2: 0.5, 1.0: 0.9}
    assert decide(GRID, scores, 10, 2, True) == Decision(more=(0.1,))
    assert decide(GRID, scores | {0.1: 0.2}, 10, 2, True) == Decision(chosen=1e-2, bracketed=True)
    assert decide(GRID, scores | {0.1: 0.7}, 10, 2, True) == Decision(chosen=1.0, bracketed=False)


def test_of_equal_scores_the_lower_rate_wins():
    scores = {1e-3: 0.1, 1e-2: 0.5, 0.1: 0.5, 1.0: 0.2}
    assert decide((1e-3, 1e-2, 0.1, 1.0), scores, 10, 0, True).chosen == 1e-2


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(12, 30), nn.Linear(30, 7, bias=False))


def shapes(model):
    return {n: site(n, layer).shape for n, layer in choose(model, "*").items()}


METHODS = [undula.LoRA(r=3), undula.LoRAN(r=2, learn=("a",)), undula.AuroRA(), undula.DoRA(undula.LoRA(r=2)),
           undula.Dropout(undula.AuroRAStatic(r=3), 0.1)]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_parameters_are_counted_as_attach_makes_them(method, model):
    assert count(method, shapes(model)) == undula.attach(model, method, "*").num_parameters()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_rank_for_a_number_of_parameters_is_the_closest(method, model):
    where = shapes(model)
    each = [count(at_rank(method, r), where) for r in range(1, 13)]
    for wanted in (each[2], each[5] + 3, each[7] - 5):
        found = count(with_parameters(method, wanted, where), where)
        assert abs(found - wanted) == min(abs(n - wanted) for n in each)


def test_a_budget_that_cannot_be_met_is_refused(model):
    with pytest.raises(ValueError, match=r"the closest that it comes to 5 parameters is 79"):
        with_parameters(undula.LoRA(), 5, shapes(model))
    with pytest.raises(ValueError, match="the closest that it comes"):
        with_parameters(undula.LoRA(), 10**6, shapes(model))


SIZES = [
    (undula.UniLoRA(r=2), 100, undula.UniLoRA(r=2, d=100)),
    (undula.NOLA(r=2, k=6, l=3), 40, undula.NOLA(r=2, k=13, l=6)),  # 2 layers: 2 * (13 + 6) = 38
    (undula.VeRA(r=4), 67, undula.VeRA(r=15)),  # O is 30 and 7; a rank may be above both
    (undula.GatedLoRA(r=4, open=2, alpha=8), 79, undula.GatedLoRA(r=1, open=1, alpha=2.0)),
    (undula.Dropout(undula.UniLoRA(r=2), 0.1), 100, undula.Dropout(undula.UniLoRA(r=2, d=100), 0.1)),
    (undula.Centred(undula.DyLoRA(r=4, alpha=8)), 158, undula.Centred(undula.DyLoRA(r=2, alpha=4.0))),
]


@pytest.mark.parametrize(("method", "wanted", "found"), SIZES, ids=[repr(m) for m, _, _ in SIZES])
def test_the_size_that_parameters_follow(method, wanted, found, model):
    assert with_parameters(method, wanted, shapes(model)) == found


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (undula.UniLoRA(r=2), 2 * 79),  # no more than there are entries in all A and B
        (undula.NOLA(r=2), 2 * 2 * 60),  # no more matrices than A has entries
        (undula.VeRA(), 37 + 2 * 60),  # no rank above twice the largest side
        (undula.S2FT(), count(undula.S2FT(), {"0": (30, 12), "1": (7, 30)})),  # a share is no size
    ],
    ids=repr,
)
def test_no_size_beyond_sense(method, most, model):
    with pytest.raises(ValueError, match=f"the closest that it comes to 10,000 parameters is {most} "):
        with_parameters(method, 10_000, shapes(model))


def test_another_rank_keeps_alpha_over_r():
    assert at_rank(undula.DoRA(undula.LoRA(r=8, alpha=16)), 2) == undula.DoRA(undula.LoRA(r=2, alpha=4.0))


def owner_of(pid):
    """The name that the process `pid` of this machine would give itself."""
    return dataclasses.replace(Owner.this(), token="another", pid=pid, birth=birth(pid))


@pytest.mark.skipif(not Owner.this().boot or not Owner.this().space, reason="the kernel does not name itself")
def test_a_run_is_free_at_once_when_its_process_is_gone():
    look = Watchman(clock=lambda: 0.0)
    assert Owner.named(str(Owner.this())) == Owner.this()
    assert not look.gone("run", str(Owner.this()), 0.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        other = owner_of(child.pid)
        assert not look.gone("run", str(other), 0.0)
        assert look.gone(
            "run", str(dataclasses.replace(other, birth=other.birth + "9")), 0.0
        )  # a later one has its pid
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet asked after
        assert look.gone("run", str(other), 0.0)
    assert look.gone("run", str(other), 0.0)


@pytest.mark.parametrize("change", [{"boot": "another"}, {"space": "another"}, {"boot": "", "space": ""}])
def test_who_cannot_be_seen_is_gone_when_its_count_stands_still_by_the_lookers_own_clock(change):
    """Whatever its clock says, and though its machine may have this one's name and its number be taken here."""
    now = [0.0]
    look = Watchman(clock=lambda: now[0])
    other = str(dataclasses.replace(owner_of(1), **change))
    for name in (other, "host/1/1"):  # the second as older versions wrote it
        now[0] = 0.0
        for beat in range(100):  # it lives, and is looked at now and then
            assert not look.gone(name, name, 1e9 + beat)
            now[0] += SILENCE / 2
        last = now[0]
        while not look.gone(name, name, 1e9 + 99):
            now[0] += LOOK / 2
        assert SILENCE <= now[0] - last + SILENCE / 2 <= 2 * SILENCE
    assert not look.gone("again", other, 5.0)
    now[0] += 100 * SILENCE  # who looks was asleep itself: one look more is no proof
    assert not look.gone("again", other, 5.0)


def test_a_run_that_was_given_to_another_is_not_overwritten(tmp_path):
    task = Classification()
    run = Run(model="m", data="d", task=task, method=undula.LoRA(), out=tmp_path)
    trial, mine = Trial(run, Rows("d", task), 1, 0, tested=False), Store(tmp_path / "runs.sqlite")
    other = Store(tmp_path / "runs.sqlite")
    other.worker, other.others.gone = "elsewhere", lambda *_: True
    assert mine.claim(trial)
    assert other.claim(trial)  # it took this process for lost
    mine.finish(trial, {"validation": 0.1})
    assert other.records([trial.key])[trial.key].state == "running"
    other.finish(trial, {"validation": 0.5})
    mine.fail(trial, "late")
    assert not other.claim(trial)  # it has ended, whoever is gone since
    assert mine.records([trial.key])[trial.key].result == {"validation": 0.5}


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "runs.sqlite").write_text("a text that is long enough to be looked at" * 99)
    with pytest.raises(OSError, match=r"the runs in .*runs.sqlite cannot be read or written: file is not a database"):
        Store(tmp_path / "runs.sqlite")


def test_options_of_a_table_are_taken_as_they_are():
    data = CausalLM
    made = build_from(Task, "causal-lm", {"format": {"is": "chat", "instruction": "Sum up: "}, "generate": 3})
    assert isinstance(made, data)
    assert (made.format.instruction, made.generate) == ("Sum up: ", 3)
    named = build_from(Task, "classification", {"names": ["Sports, news", "Tech"]})
    assert named.names == ("Sports, news", "Tech")
    loran = build_from(Method, "loran", {"r": 2, "activation": {"a": 0.02}, "learn": ["a"]})
    assert loran == undula.LoRAN(r=2, activation=undula.activations.Sinter(a=0.02), learn=("a",))
    assert build_from(Method, "dora", {"inner": {"is": "lora", "r": 4}}) == undula.DoRA(undula.LoRA(r=4))
    with pytest.raises(ValueError, match="lora is named already"):
        build_from(Method, "lora", {"is": "lora", "r": 8})
    with pytest.raises(LookupError, match="no method is called '3'"):
        build_from(Method, "dora", {"inner": {"is": 3}})


def test_a_run_is_the_same_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    task = Classification()
    runs = [Run(model="m", data=d, task=task, method=undula.LoRA(), out=tmp_path)
            for d in ("d.jsonl", str(tmp_path / "d.jsonl"))]  # fmt: skip
    keys = {Trial(run, Rows(run.data, task), 1, 0, tested=False).key for run in runs}
    assert len(keys) == 1
    assert Trial.decode(Trial(runs[0], Rows("d.jsonl", task), 1, 0, False).encode()).rows.source == runs[1].data


def test_a_study_built_as_a_value_is_checked_before_it_runs():
    task = Classification()
    arms = (spec.Arm("a", undula.LoRA()), spec.Arm("a", undula.DoRA()))
    budgets = (spec.Budget(rank=4, parameters_of="b"),)
    wrong = spec.Study(
        "t", arms, (spec.Base("m"),), (spec.Rows("d", task),), budgets, seeds=(0, 1), sweep=spec.Sweep(seeds=(0,))
    )
    with pytest.raises(ValueError, match="two of the methods") as caught:
        Plan(wrong)
    for part in ("two of the methods are called 'a'", "no method is called 'LoRA'; there are: a, a",
                 "no method is called 'b'; there are: a, a",
                 "none of them may be a seed of it"):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"Study.seeds is at least 0, found -1"):
        dataclasses.replace(wrong, seeds=(0, -1))


# (reduction, more is better, the run's curve, the curves before it, whether it ends), a digit an evaluation.  Decided
# by Optuna 5.0.0, SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction), which is no dependency any more.
HALVED = (
    (4, False, "342040053", "4 2324 24 21 92411 578156593", False),
    (2, False, "043", "51 33 210012101 50424 89", False),
    (3, False, "355", "00 47112 02 684833969", False),
    (3, True, "201", "5330", True),
    (2, True, "2", "", False),
    (2, True, "91", "2", False),
    (4, True, "20", "0", False),
    (4, True, "6", "", False),
    (2, False, "1043", "21", False),
    (2, False, "4599", "25 2302 121021200 6984 35214503 12021001", True),
    (2, False, "12", "50041521 21 9606 960271427 44003 303", True),
    (2, True, "76582369", "002 222000220 251033500 021 51240003 42240554", False),
    (3, True, "1", "225 4", True),
    (2, True, "22030533", "412 5 10 146546118", False),
    (2, True, "8477", "96 111330601", False),
    (2, True, "4104", "41 1002 7 317643039 01", False),
    (4, True, "202220210", "68757738 01221 041241342 71180132 0 211532434", False),
    (3, False, "0433", "344105051 945 2 333015112 00331345 2", False),
    (4, True, "02", "002202102 53671 7 51942 5504 011101120 1 222", False),
    (4, False, "1", "43", False),
    (2, True, "0552", "11210112 100", False),
    (2, False, "01", "041101555 0 504", False),
    (2, True, "01", "01 224 14004421 0012", True),
    (3, True, "06", "", False),
    (2, False, "58066065", "4351 25201", False),
    (4, True, "1", "0010 27626 0112 35", True),
    (3, True, "420", "01205 926 05314325 1 01122211 4 514 0", True),
    (2, False, "16", "2 298", False),
    (4, False, "63778570", "245 02 3 14522", False),
    (4, True, "3351", "3 3 2020 60501904 432943167 31235531 2852 11", False),
    (2, True, "22222221", "06031 102220021 22111", False),
    (4, True, "01", "20 0 120 12 68 12 20112 2040", False),
    (3, True, "11110000", "448 232510240 3", False),
    (2, False, "22", "1201 01131", True),
    (4, True, "55", "34789 4430 1 63", False),
    (2, False, "45", "012102210 84331845 53 220 55902 0200", True),
    (2, True, "77", "112202102 221111002", False),
    (3, False, "23", "212", False),
    (2, True, "0121", "35734524 4 22010 0030 2", True),
    (2, False, "0202", "1221 55330324 70916", True),
    (2, True, "0", "000222020 1972 04560", False),
    (3, True, "22212011", "2102 223302424", False),
    (2, True, "2122", "1 12222120 856431953 85225 090925544 343 02 1", False),
    (3, False, "203", "6 200 29188966", True),
    (3, False, "2102", "210 202221110 54102 20212 05514121", False),
    (4, False, "6446", "10", False),
    (3, False, "33", "101", False),
    (4, False, "41452203", "", False),
    (2, False, "7568", "51340404 001", True),
    (4, False, "9", "0 21121133 269 020212000 4 0", True),
    (2, False, "04", "112212001 21001 51663 1315 4022 40443", True),
    (3, False, "4", "20021012 305343112 1424 2 57 03429546", True),
    (3, False, "1", "0112 1473", True),
    (2, False, "53", "2 11 1010 04252 535144020 10202201", True),
    (4, False, "4038", "212 00052052", True),
    (2, False, "88", "22455210 3965 3132 559669684 33634828", True),
    (2, False, "62", "30069 2 11122 305254779 503 021221211", True),
    (3, True, "0", "0081 4 20", True),
    (4, False, "5978", "21211221", True),
    (2, True, "5411", "18272", True),
    (2, True, "00", "0566 22220 12122101 00 04535", True),
    (3, True, "121", "0 02002 66246 4013 20 4446 4 005", True),
    (2, False, "1022", "8 122122111 1", True),
    (4, False, "3", "20210 010 72 3513 325451024 454 1 00100", True),
    (4, True, "1", "2 5331 1201", True),
    (2, False, "1212", "1 1220 22121 1 202002112", True),
    (4, False, "5", "01111 472406179 01 50 9480", True),
    (4, False, "5", "022002201 413 220102010", True),
    (2, True, "21", "78974591", True),
    (2, False, "22", "100", True),
    (4, True, "0", "2222 54114242 44034413 415 48477 4 165 02120202", True),
    (2, False, "2021", "6 10000 454 112 210 37806508 18 22", True),
)


@pytest.mark.parametrize("case", HALVED, ids=lambda case: "-".join(map(str, case[:4])).replace(" ", "."))
def test_successive_halving_decides_as_optuna_does(case):
    """On random curves with ties, rivals that end early, and curves that end between two rungs."""
    reduction, more_is_better, curve, rivals, ends = case

    def line(digits):
        return [(10 * i, int(d) / 10) for i, d in enumerate(digits, 1)]

    assert pruned(line(curve), [line(r) for r in rivals.split()], reduction, more_is_better) is ends


def test_only_what_was_read_is_forgotten(tmp_path):
    """Another process may have taken a failed run since."""
    task = Classification()
    run = Run(model="m", data="d", task=task, method=undula.LoRA(), out=tmp_path)
    trial, store = Trial(run, Rows("d", task), 1, 0, tested=False), Store(tmp_path / "runs.sqlite")
    store.claim(trial)
    store.fail(trial, "no memory")
    failed = store.records([trial.key])
    store.forget(failed)
    assert store.claim(trial)
    store.forget(failed)
    assert store.records([trial.key])[trial.key].state == "running"


def test_lines_of_a_study_file():
    text = (
        'title = "t"\n\n[sweep]\nrates = [\n  1e-3,\n]\n[[methods]]\nname = "a"\n'
        "[[methods]]\n  set = { r = 2 }\n[methods.more]\nx.y = 1\n"
    )
    where = lines(text)
    assert where["sweep", "rates"] == 4
    assert where["methods", 1, "set"] == 10
    assert where["methods", 1, "more", "x", "y"] == 12
    assert line_of(("methods", 1, "set", "r"), where) == 10
    assert line_of(("methods", 0, "rates"), where) == 7
    assert line_of(("nothing",), where) is None


@pytest.mark.parametrize("quotes", ['"""', "'''"])
def test_what_stands_in_a_text_is_no_table_and_no_key(quotes):
    """Texts, lists and names may hold anything that looks like TOML."""
    text = (
        f"title = {quotes}\n[[methods]]\nseeds = [1]\n{quotes}\nseeds = [  # ] = [[data]]\n  1,\n]\n"
        '[[methods]]\n"a.b" = "c = 1"\nset = { note = "}", r = 2 }\n[[methods]]\nname = "[[methods]]"\n'
    )
    where = lines(text)
    told = {path: line for path, line in where.items() if len(path) < 3 or path[2] in ("a.b", "name")}
    assert told == {
        ("title",): 1, ("seeds",): 5, ("methods", 0): 8, ("methods", 0, "a.b"): 9, ("methods", 1): 11,
        ("methods", 1, "name"): 12,
    }  # fmt: skip
    assert line_of(("methods", 0, "set"), where) == 10


@pytest.mark.parametrize("nest", ["x = " + "[" * 50_000 + "]" * 50_000, "x = " + "{a=" * 400 + "1" + "}" * 400])
def test_a_file_that_is_no_study_is_refused_by_its_name(tmp_path, nest):
    path = tmp_path / "s.toml"
    path.write_text(nest)
    with pytest.raises(Faults, match=r"s\.toml cannot be run.*\n.*(deep in one another|not TOML)"):
        read(path)
    path.write_bytes(b"title = 'a'\nbaseline = '\xe9'\n")
    with pytest.raises(Faults, match=r"s\.toml cannot be run.*\n  line 2: not UTF-8: byte 0xe9"):
        read(path)


def test_a_run_is_taken_once(tmp_path):
    task = Classification()
    run = Run(model="m", data="d", task=task, method=undula.LoRA(), out=tmp_path)
    trial, store = Trial(run, Rows("d", task), 1, 0, tested=False), Store(tmp_path / "runs.sqlite")
    assert store.claim(trial)
    assert not Store(tmp_path / "runs.sqlite").claim(trial)  # this process has it, and lives
    store.finish(trial, {"validation": 0.5})
    assert not store.claim(trial)
    before = store.path.read_bytes()
    assert Store(store.path).records([trial.key])[trial.key].result == {"validation": 0.5}
    assert store.path.read_bytes() == before  # reading writes nothing
