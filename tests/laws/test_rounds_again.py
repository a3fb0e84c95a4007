"""Rounds that go on after an end, with what they began with and nothing else; trainings of one process, in turn."""

import copy
import dataclasses
import threading
import time
import warnings

import pytest
import torch

import undula
from tests.laws.test_rounds import asked, desk, home, parties, rows  # noqa: F401
from tests.support import tiny
from undula.cli.federating import kinds_of
from undula.core.turns import turn
from undula.federated import FFA, FLASC, FedIT
from undula.federated import messages as M
from undula.federated.client import Client
from undula.federated.desk import Desk
from undula.federated.report import told
from undula.federated.rounds import federate
from undula.federated.rows import Rows
from undula.federated.server import Server
from undula.federated.spec import Party, changed
from undula.train import Classification, forget


def stops(record):
    raise KeyboardInterrupt


def test_rows_of_a_client_that_changed_meanwhile_are_told(home, tmp_path):  # noqa: F811
    """As many as before, in another order: what they would train is something else."""
    f, paths, mine = parties(home, tmp_path, max_steps=1)
    f, out = dataclasses.replace(f, rounds=2), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        federate(f, out, told=stops)
    tiny.jsonl(paths["south"], mine[::-1])
    with pytest.raises(ValueError, match=r"^the rows of south: not what the federation in .* began with\. Put it back"):
        federate(f, out, resume=True)
    tiny.jsonl(paths["south"], mine)
    with pytest.raises(KeyboardInterrupt):
        federate(f, out, resume=True, told=stops)


def test_a_setting_that_changed_meanwhile_is_told_by_its_name(home):  # noqa: F811
    """By the line of the file that says it, and a client by its own."""
    north, south = (Party(name, f"{name}.csv") for name in ("north", "south"))
    given = {"split": None, "clients": (north, south)}
    before = asked(home, federated=given).encode()
    for now, odd in (
        (asked(home, federated=given), []),
        (asked(home, FFA(), federated={**given, "rounds": 3}, lr=0.5, batch=2), ["rounds", "how", "batch", "lr"]),
        (asked(home, federated={**given, "clients": (north, dataclasses.replace(south, r=1))}), ["client south"]),
        (asked(home, federated={**given, "clients": (south, north)}), ["the order of clients"]),
        (asked(home, federated={**given, "clients": (north,)}), ["client south"]),
    ):
        assert list(changed(before, now.encode())) == odd


def test_an_adapter_that_rounds_begin_from_and_that_changed_meanwhile_is_told(home, desk, tmp_path):  # noqa: F811
    place, out = tmp_path / "before", tmp_path / "out"
    desk.first.save(place)
    f = asked(home, begin_from=str(place), method=None, where="all-linear")
    Server(f, out)
    desk.first.map(lambda factors: {k: t + 1 for k, t in factors.items()}).save(place)
    with pytest.raises(ValueError, match=r"^the adapter that it begins from: not what"):
        Server(f, out, resume=True)


@pytest.mark.parametrize(("how", "refused"), [(FFA(), True), (FLASC(from_start=True), True), (FedIT(), False)], ids=str)
def test_a_start_that_is_in_no_message_is_the_one_that_rounds_began_with(how, refused, home, tmp_path):  # noqa: F811
    """Another version of torch may draw other numbers: clients would train on those, the server counts from these."""
    known = Rows(asked(home, how))
    f, out = known.settled(known.asked), tmp_path / "out"
    first = Desk(f, known.server)
    Server(f, out, known, first)
    other = copy.copy(first)
    other.first = M.filled(first.first, {name: t + 1 for name, t in M.named(first.first).items()})
    if refused:
        with pytest.raises(ValueError, match=r"^numbers that clients draw themselves: not what"):
            Server(f, out, known, other, resume=True)
    else:
        Server(f, out, known, other, resume=True)
    Server(f, out, known, first, resume=True)


def test_rows_that_the_model_cannot_take_leave_nothing(home, tmp_path, caplog):  # noqa: F811
    """Of those that a client measures on alone that is told."""
    f, paths, mine = parties(home, tmp_path)
    odd = [{"text": "zzz", "label": "good"}] * 4
    tiny.jsonl(paths["south"], odd)
    with pytest.raises(ValueError, match="the tokenizer knows nothing of the south rows"):
        federate(f, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
    (tmp_path / "both").mkdir()
    for part, some in ("train", mine), ("validation", odd):
        tiny.jsonl(tmp_path / f"both/{part}.jsonl", some)
    known = Rows(dataclasses.replace(f, clients=(dataclasses.replace(f.clients[1], data=str(tmp_path / "both")),)))
    Client(known.asked, "south", known)
    assert "the tokenizer knows nothing of the south validation rows" in caplog.text


VERBS = [
    undula.train,
    undula.tune,
    undula.study,
    undula.train_many,
    federate,
    lambda *given: forget(*given, ()),
]


@pytest.mark.parametrize("verb", VERBS, ids=["train", "tune", "study", "train_many", "federate", "forget"])
def test_trainings_of_one_process_take_turns(verb, caplog):
    """All draw from one source of random numbers."""
    done = []

    def asks():
        try:
            verb(None, None) if verb is federate else verb(None)
        except (TypeError, ValueError, AttributeError):
            done.append(verb)

    thread = threading.Thread(target=asks, daemon=True)
    with turn():
        thread.start()
        until = time.monotonic() + 60
        while "another training is under way in this process" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert not done
    thread.join(60)
    assert done == [verb]


def test_labels_of_rows_that_have_several_are_counted():
    assert kinds_of([[0, 2], [], [2]]) == kinds_of([0, 1, 1]) == 2


def test_an_epsilon_that_nothing_bounds_is_said_to_be_so():
    assert told(None) == "unbounded"


def test_a_client_of_one_class_is_measured_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Classification(names=("bad", "good")).metrics(torch.tensor([[0.0, 1.0]] * 2), [1, 1])
    assert (found["accuracy"], found["mcc"]) == (1.0, 0.0)
