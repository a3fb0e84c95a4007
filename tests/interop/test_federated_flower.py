"""Rounds by Flower: those of one process, to the bit, and nothing but adapters and counts on the wire."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

import undula
from tests.support import tiny
from undula.federated import FFA, FLASC, Exact, FedIT, FedSVD
from undula.federated.client import Client
from undula.federated.flat import flat
from undula.federated.messages import Failure
from undula.federated.private import DPSGD
from undula.federated.rounds import clients_of, federate
from undula.federated.server import Server
from undula.federated.spec import Federation, Party, written
from undula.train import Classification, Recipe

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.mod import fixedclipping_mod, message_size_mod
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg, FedMedian, Krum
from flwr.supercore.task_identity import TaskIdentity

from undula.federated.flower import Rounds, client_app, run
from undula.federated.flower.keys import write_certificates, write_pair
from undula.federated.flower.records import check_settings, numbers, record, reply_of, settings
from undula.federated.flower.runtime import Place

NAMES = ("north", "south", "west")
COUNTS = {"num-examples", "loss", "steps"}


@pytest.fixture
def parties(tmp_path):
    """A function: a federation of clients with rows of their own."""
    rows, base = tiny.reviews(200), tiny.bert(tmp_path / "base")

    def made(how, names=NAMES, rounds=2, **more):
        files = {
            name: tiny.jsonl(tmp_path / f"{name}.jsonl", rows[10 + 30 * i : 40 + 30 * i])
            for i, name in enumerate(names)
        }
        own = tiny.jsonl(tmp_path / "server.jsonl", rows[:10])
        recipe = Recipe(base, own, Classification(), undula.LoRA(r=2), lr=1e-2, max_steps=2, batch=4)
        clients = tuple(Party(name, file) for name, file in files.items())
        return Federation(recipe, rounds, how=how, clients=clients, **more)

    return made


class Grid:
    """Nodes in this process.  What goes over the wire is in `sent`; `lies`: {client: what it answers instead}."""

    def __init__(self, federation, folder, app=None, lies=(), settings=None):
        self.app, self.lies, self.sent, self.up, self.number = (
            app or client_app(),
            dict(lies),
            [],
            [],
            itertools.count(),
        )
        self.nodes = {name: 100 + i for i, name in enumerate(federation.names)}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.config, self.kept = {}, {name: RecordDict() for name in self.nodes}  # what a node keeps between messages
        for name in self.nodes:
            given = folder / f"{name}.given.json"
            given.write_text(json.dumps((settings or {}).get(name, federation).encode()))
            self.config[name] = {"federation": str(given), "client": name}

    def get_nodes(self):
        return [SimpleNamespace(name=name, node_id=node) for name, node in self.nodes.items()]

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message {next(self.number)}"
            got = self.carried(message)
            name = next(n for n, node in self.nodes.items() if node == got.metadata.dst_node_id)
            context = Context(1, got.metadata.dst_node_id, self.config[name], self.kept[name], {})
            try:
                reply = self.lies[name](got) if name in self.lies else self.app(got, context)
            except Exception as error:  # as Flower's own process of a client does
                reply = Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=got)
            if reply is not None:
                self.up.append((name, reply))
                replies.append(self.carried(reply))
        return replies

    def carried(self, message):
        wire = message_to_proto(message)
        self.sent.append(wire.SerializeToString())
        return message_from_proto(wire)


def rounds_of(federation, out, by=None, **more):
    """(the server after all rounds, the grid)."""
    out.parent.mkdir(exist_ok=True)
    grid = Grid(federation, out.parent, **more)
    rounds = Rounds(Server(federation, out), by)
    rounds.go_on(grid)
    return rounds.server, grid


def bytes_of(out):
    return (out / "state.safetensors").read_bytes()


@pytest.mark.parametrize("how", [FedSVD(), FLASC()], ids=str)
def test_rounds_are_those_of_one_process_to_the_bit_and_adapters_and_counts_alone_go_out(tmp_path, parties, how):
    f = parties(how, fraction=0.5)
    here = federate(f, tmp_path / "here")
    there, grid = rounds_of(f, tmp_path / "there")
    assert there.records == here["rounds"]
    assert bytes_of(tmp_path / "there") == bytes_of(tmp_path / "here")

    trained = [reply.content for _, reply in grid.up if "arrays" in reply.content]
    assert len(trained) == 2 * len(f.chosen(1))
    for content in trained:
        assert set(content) == {"arrays", "metrics"}
        assert set(content["metrics"]) == COUNTS
        names = {n.rpartition(".")[2] for n in content["arrays"]}
        assert names == ({"packed"} if how.sparse else {"B", "weight", "bias"})  # of layers, and of the head
    wire = b"".join(grid.sent)
    texts = {row["text"] for row in tiny.reviews(200)}
    assert not [text for text in texts if text.encode() in wire]
    assert str(tmp_path).encode() not in wire


def test_clients_with_parts_of_the_adapter_are_sent_theirs_alone(tmp_path, parties):
    """And a client whose file says other parts refuses."""
    f = parties(FedSVD())
    less = (dataclasses.replace(f.clients[0], r=1), dataclasses.replace(f.clients[1], where="query"), f.clients[2])
    f = dataclasses.replace(f, clients=less)
    here = federate(f, tmp_path / "here")
    there, grid = rounds_of(f, tmp_path / "there")
    assert there.records == here["rounds"]
    assert "failed" not in str(there.records)
    assert bytes_of(tmp_path / "there") == bytes_of(tmp_path / "here")
    sizes = {name: sum(a.data.__len__() for a in reply.content["arrays"].values()) for name, reply in grid.up
             if "arrays" in reply.content}  # fmt: skip
    assert max(sizes["north"], sizes["south"]) < sizes["west"]
    other = dataclasses.replace(f, clients=(f.clients[0], dataclasses.replace(f.clients[1], where=None), f.clients[2]))
    with pytest.raises(ValueError, match="clients: not as in the server's file"):
        check_settings(other, settings(f), "south")
    private = {"privacy": DPSGD(noise=1.0, delta=1e-3)}
    stricter = dataclasses.replace(
        f, clients=(dataclasses.replace(f.clients[0], epsilon=0.5), *f.clients[1:]), **private
    )
    f = dataclasses.replace(f, **private)
    check_settings(stricter, settings(f), "north")  # a budget is a client's own
    with pytest.raises(ValueError, match="epsilon: not as in the server's file"):
        check_settings(f, settings(stricter), "north")
    check_settings(f, settings(stricter), "south")
    assert "north" not in settings(stricter)
    with pytest.raises(ValueError, match="cannot stand beside the part that north has"):
        Rounds(there, FedMedian())


def lie(content):
    return lambda message: Message(content, reply_to=message)


def test_replies_that_are_none_are_records_and_the_round_goes_on(tmp_path, parties):
    vast = Array(
        "float32", (2, 2), "numpy.ndarray", Array(np.zeros((2, 2), np.float32)).data.replace(b"(2, 2)", b"(9, 9)")
    )
    counts = MetricRecord({"num-examples": 3, "loss": 0.1, "steps": 2})
    f = parties(FFA(), names=(*NAMES, "east", "other"), rounds=1, timeout=5.0)
    lies = {
        "north": lie(RecordDict({"arrays": ArrayRecord({"B": vast}), "metrics": counts})),
        "south": lie(RecordDict({"metrics": counts, "more": MetricRecord({"rows": [1, 2]})})),
        "west": lambda message: None,
        "east": lambda message: Message(Error(5, "Node unavailable"), reply_to=message),
    }
    server, _ = rounds_of(f, tmp_path / "out", lies=lies)
    clients = server.records[1]["clients"]
    assert {name: c.get("failed") for name, c in clients.items()} == {
        **{"north": "refused", "south": "refused", "west": "late", "east": "absent", "other": None}
    }
    assert "stayed" not in server.records[1]


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999999), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "-" * 9000 + "1,), }",
        "{'descr': " + "[" * 150 + "]" * 150 + ", 'fortran_order': False, 'shape': (2,), }",
        "no header",
    ],
)
def test_arrays_of_another_size_than_they_say_are_refused_before_any_is_made(header):
    text = header.encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)
    arrays = ArrayRecord({"B": Array("float32", (2,), "numpy.ndarray", data)})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    found = reply_of(Message(content, dst_node_id=1, message_type="train"))
    assert isinstance(found, Failure)
    assert found.kind == "refused"
    assert "B is no array of numbers" in found.why


def test_arrays_come_back_as_they_went():
    given = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.asfortranarray(np.ones((2, 3))),
        "c": np.zeros(()),
    }
    found = numbers(record(given))
    for name, a in given.items():
        np.testing.assert_array_equal(found[name], a)
        assert found[name].dtype == a.dtype


def test_what_an_error_says_stays_with_the_client(tmp_path, parties, capfd):
    f = parties(FFA(), rounds=1)
    other = dataclasses.replace(f, recipe=dataclasses.replace(f.recipe, lr=0.5))
    missing = dataclasses.replace(
        f, clients=(f.clients[0], Party("south", str(tmp_path / "secret" / "rows.csv")), f.clients[2])
    )
    server, grid = rounds_of(f, tmp_path / "out", settings={"north": other, "south": missing})
    clients = server.records[1]["clients"]
    assert clients["north"]["failed"] == clients["south"]["failed"] == "error"
    assert "ValueError" in clients["north"]["why"]
    assert "secret" not in json.dumps(server.records)
    assert b"secret" not in b"".join(grid.sent)
    said = capfd.readouterr().err
    assert "lr: not as in the server's file" in said
    assert "secret" in said
    assert "failed" not in clients["west"]


def each_b(server, grid):
    """{name: B} of every client, of the first layer."""
    replies = [numbers(reply.content["arrays"]) for _, reply in grid.up if "arrays" in reply.content]
    name = next(n for n in replies[0] if n.endswith(".B"))
    site = name.removesuffix(".B")
    return np.stack([r[name] for r in replies]), server.adapter.factors[site]["B"].detach().numpy()


def test_robust_strategies_make_one_of_the_clients_b(tmp_path, parties):
    f = parties(FFA(), rounds=1)
    server, grid = rounds_of(f, tmp_path / "median", by=FedMedian())
    theirs, B = each_b(server, grid)
    np.testing.assert_array_equal(B, np.median(theirs, axis=0))
    server, grid = rounds_of(f, tmp_path / "krum", by=Krum(min_train_nodes=3))
    theirs, B = each_b(server, grid)
    assert any(np.array_equal(B, b) for b in theirs)

    with pytest.raises(ValueError, match="FedMedian cannot stand beside FLASC"):
        Rounds(Server(dataclasses.replace(f, how=FLASC()), tmp_path / "packed"), FedMedian())
    with pytest.raises(RuntimeError, match="FedMedian waits for more nodes than the 3 that are"):
        rounds_of(f, tmp_path / "more", by=FedMedian(min_available_nodes=9))


def test_mods_and_wrappers_of_differential_privacy_stand_within(tmp_path, parties):
    f, clip = parties(FFA(), rounds=1), 1e-3
    by = DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1e-9, clip, 3)
    app = client_app([message_size_mod, fixedclipping_mod])
    server, _ = rounds_of(f, tmp_path / "within", by=by, app=app)
    assert all(0 < c["change"] < clip * 1.01 for c in server.records[1]["clients"].values())
    assert "stayed" not in server.records[1]

    f = parties(FFA(), rounds=2)
    around = DifferentialPrivacyClientSideFixedClipping(Rounds(Server(f, tmp_path / "around")), 1.0, clip, 3)
    grid = Grid(f, tmp_path, app=app)
    with pytest.raises(RuntimeError, match="give it as server_app"):
        around.start(grid, around.strategy.last, 2)


SECURE = SecAggPlusWorkflow(3, 2, max_weight=30.0, clipping_range=1.0)


@pytest.mark.parametrize("how", [FFA(), FedSVD(), FedIT()], ids=str)
def test_a_secure_aggregation_tells_the_server_the_mean_alone(tmp_path, parties, how):
    f = parties(how)
    server, grid = rounds_of(f, tmp_path / "secure", by=SECURE, app=client_app([secaggplus_mod]))
    plain, seen = rounds_of(f, tmp_path / "plain")
    assert len(grid.up) == 2 * 3 * 4 + 3  # four stages of three clients in each round, and what they measure
    # numbers are rounded by 1 / 2^21, and B and A of FedSVD are those of a product
    assert_close(flat(server.adapter), flat(plain.adapter), rtol=0, atol=1e-4 if how.remakes else 5e-6)
    ends = [a.data[-32:] for _, m in seen.up[:3] for a in m.content["arrays"].values()]
    own = [data for data in ends if data not in seen.sent[0]]  # none that nothing has moved from what they were sent
    assert own
    assert all(any(data in m for m in seen.sent) for data in own)
    assert not any(data in m for data in own for m in grid.sent)
    for told in server.records[1:]:
        assert not {"bias", "stayed"} & set(told)
        assert all("change" not in c and c["num-examples"] == 27 for c in told["clients"].values())
    assert any("SecAgg+" in note for note in server.notes)


@pytest.mark.parametrize("stage", [3, 4])
def test_who_falls_out_of_a_secure_aggregation_counts_where_its_numbers_have_come(tmp_path, parties, stage):
    f, one, stages = parties(FFA(), rounds=1), "west", []
    app = client_app([secaggplus_mod])
    grid = Grid(f, tmp_path, app=app)

    def falls_out(message):  # once its keys are shared: the others have to take its masks out of the sum
        stages.append(message)
        if len(stages) == stage:
            raise RuntimeError("gone")
        return app(message, Context(1, grid.nodes[one], grid.config[one], grid.kept[one], {}))

    grid.lies[one] = falls_out
    rounds = Rounds(Server(f, tmp_path / "out"), SECURE)
    rounds.go_on(grid)
    left, _ = rounds_of(dataclasses.replace(f, clients=f.clients[: stage - 1]), tmp_path / "open")
    assert ("gone" in rounds.server.records[1]["clients"][one].get("why", "")) == (stage == 3)
    # clipping_range / 2^21 times max_weight over the mean of the rows, 27, and float32's own
    assert_close(flat(rounds.server.adapter), flat(left.adapter), rtol=0, atol=30 / 27 / 2**21 + 1e-8)


def test_rows_are_private_within_a_secure_aggregation(tmp_path, parties):
    pytest.importorskip("opacus")
    f = parties(FFA(), rounds=1, privacy=DPSGD(epsilon=8.0, delta=1e-3, seed=3))
    server, _ = rounds_of(f, tmp_path / "secure", by=SECURE, app=client_app([secaggplus_mod]))
    plain, _ = rounds_of(f, tmp_path / "open")
    assert server.moved
    assert_close(flat(server.adapter), flat(plain.adapter), rtol=0, atol=5e-6)
    assert server.records[1]["privacy"] == plain.records[1]["privacy"]
    assert not any("loss" in client for client in server.records[1]["clients"].values())


def test_what_does_not_fit_a_secure_aggregation_is_refused(tmp_path, parties, capfd):
    app = client_app([secaggplus_mod])

    def told(by, app, how=FFA()):
        with pytest.raises(RuntimeError, match="no client got through") as caught:
            rounds_of(parties(how, rounds=1), tmp_path / str(len(list(tmp_path.iterdir()))), by=by, app=app)
        return capfd.readouterr().err + str(caught.value)

    assert "a weight of 27 is above max_weight=20" in told(SecAggPlusWorkflow(3, 2, max_weight=20.0), app)
    assert "above clipping_range=1e-06" in told(SecAggPlusWorkflow(3, 2, max_weight=30.0, clipping_range=1e-6), app)
    assert "client_app(mods=[secaggplus_mod])" in told(SECURE, client_app())
    assert "KeyError" in told(None, app)  # a client that is asked for its own numbers does not give them
    for how in (Exact(), FLASC()):
        with pytest.raises(ValueError, match="SecAggPlusWorkflow cannot stand beside"):
            Rounds(Server(parties(how), tmp_path / type(how).__name__), SECURE)


def test_parties_agree_on_what_noise_is_set_by(parties):
    """A client whose file has fewer of its rounds than the server's would have less noise than the record says."""
    how = DPSGD(epsilon=3.0, delta=1e-3)
    f = parties(FFA(), privacy=how)
    for name, change in (("fraction", {"fraction": 0.5}), ("min_clients", {"min_clients": 2})):
        with pytest.raises(ValueError, match=name):
            check_settings(dataclasses.replace(f, **change), settings(f), "north")
    with pytest.raises(ValueError, match="names"):
        check_settings(parties(FFA(), NAMES[:2], privacy=how), settings(f), "north")
    # without privacy a client need not know others
    check_settings(parties(FFA(), NAMES[:1]), settings(parties(FFA())), "north")


def test_keys_that_a_kill_has_cut_short_are_made_anew(tmp_path, parties):
    place = Place(tmp_path / "out", parties(FFA()))
    (place.folder / "node").mkdir(parents=True)
    (place.folder / "ca.pem").write_bytes(b"")
    (place.folder / "node" / "north.key").write_bytes(b"")
    place.prepare(None)
    made = {p: p.read_bytes() for p in place.folder.rglob("*") if p.suffix in (".pem", ".key", ".pub")}
    assert len(made) == 3 + 2 * len(NAMES)
    assert all(made.values())
    place.prepare(None)
    assert {p: p.read_bytes() for p in made} == made


def test_keys_are_their_owners_alone(tmp_path):
    write_certificates(tmp_path, ("server.example", "10.1.2.3"))
    write_pair(tmp_path, "north")
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}
    with pytest.raises(FileExistsError):
        write_pair(tmp_path, "north")


@pytest.mark.timeout(300)
def test_three_processes_on_loopback_make_the_bits_of_one(tmp_path, parties):
    f = parties(FedSVD(), names=NAMES[:2])
    here = federate(f, tmp_path / "here")
    there = run(f, tmp_path / "there", told=(told := []).append)
    odd = {"out", "versions", "notes"}
    assert {k: v for k, v in there.items() if k not in odd} == {k: v for k, v in here.items() if k not in odd}
    assert (tmp_path / "there" / "report.html").is_file()
    assert bytes_of(tmp_path / "there") == bytes_of(tmp_path / "here")
    assert [r["round"] for r in told] == [1, 2]
    flower = tmp_path / "there" / "flower"
    assert stat.S_IMODE(flower.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in flower.rglob("*.key")} == {0o600}
    assert "Activated" in (flower / "logs" / "superlink.txt").read_text()
    with pytest.raises(FileExistsError, match="--resume goes on with it"):
        run(f, tmp_path / "there")


@pytest.mark.timeout(300)
def test_a_secure_aggregation_of_processes(tmp_path, parties):
    app = tmp_path / "secure_app.py"
    app.write_text(
        "from flwr.client.mod import secaggplus_mod\n"
        "from flwr.server.workflow import SecAggPlusWorkflow\n"
        "from undula.federated.flower import client_app, server_app\n"
        "server = server_app(by=SecAggPlusWorkflow(3, 2, max_weight=30.0, clipping_range=1.0))\n"
        "client = client_app(mods=[secaggplus_mod])\n"
    )
    f = parties(FFA(), rounds=1)
    there = run(f, tmp_path / "there", app=app)
    federate(f, tmp_path / "here")
    for name, t in load_file(tmp_path / "here" / "state.safetensors").items():
        assert_close(load_file(tmp_path / "there" / "state.safetensors")[name], t, rtol=0, atol=5e-6)
    assert any("SecAgg+" in note for note in there["notes"])
    assert all("change" not in c for c in there["rounds"][1]["clients"].values())


@pytest.mark.timeout(900)
def test_clients_side_by_side_in_rays_processes_make_the_bits_of_one(tmp_path, parties):
    """And what one client raises is a line of the record."""
    pytest.importorskip("ray")
    from undula.federated.flower import simulated

    f = parties(FedSVD())
    bad = Party("west", tiny.jsonl(tmp_path / "bad.jsonl", [{"text": "good", "label": "neither"}] * 4))
    f = dataclasses.replace(f, clients=(dataclasses.replace(f.clients[0], r=1), f.clients[1], bad))

    class Raises:
        def train(self, number, arrays):
            raise LookupError

        def evaluate(self, arrays):
            raise LookupError

    def without_west(server, rows):
        return {name: Client(server.federation, name, rows, server.desk) for name in NAMES[:2]} | {"west": Raises()}

    here = federate(f, tmp_path / "here", parties=without_west)
    there = simulated.run(f, tmp_path / "there", told=(told := []).append)
    tensors = [load_file(tmp_path / side / "state.safetensors") for side in ("there", "here")]
    assert_close(*tensors, rtol=0, atol=0)
    assert [r["round"] for r in told] == [1, 2]
    for mine, theirs in zip(here["rounds"], there["rounds"], strict=True):
        for part in ("clients", "spread"):
            if part in mine:
                assert mine[part].pop("west")["failed"] == theirs[part].pop("west")["failed"] == "error"
        assert mine == theirs
    said = (tmp_path / "there" / "flower" / "logs" / "simulation.txt").read_text()
    assert "client west" in said
    assert "ip=127.0.0.1" in said
    with pytest.raises(FileExistsError, match="--resume goes on with it"):
        simulated.run(f, tmp_path / "there")


@pytest.mark.timeout(600)
def test_a_process_of_rays_that_dies_ends_the_rounds_and_they_go_on(tmp_path, parties):
    pytest.importorskip("ray")
    from undula.federated.flower import simulated

    f, killed = parties(FedIT(), rounds=3), []

    def kill_one(record):
        those = subprocess.run(
            ["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        killed.append(next(int(line.split()[0]) for line in those if "ray::ClientAppActor" in line))
        os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"a process of Ray's died while .* --resume goes on after"):
        simulated.run(f, tmp_path / "there", told=lambda record: killed or kill_one(record))
    there = simulated.run(f, tmp_path / "there", resume=True)
    assert not any("failed" in client for r in there["rounds"][1:] for client in r["clients"].values())
    federate(f, tmp_path / "here")
    assert bytes_of(tmp_path / "there") == bytes_of(tmp_path / "here")


@pytest.mark.timeout(300)
def test_a_simulation_that_cannot_begin_ends_at_once(tmp_path, parties, monkeypatch):
    """Though the server's thread waits for answers."""
    pytest.importorskip("ray")
    from undula.federated.flower import simulated

    monkeypatch.setitem(simulated.RAY, "RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(RuntimeError, match=r"the simulation has ended(?s:.*)Error: .*existing cluster"):
        simulated.run(parties(FFA(), names=NAMES[:2]), tmp_path / "out")


@pytest.fixture
def begun():
    """A function that starts a command, which ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(command):
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
            return process

        yield start


def at_work(word, root):
    """The processes whose command says so, of those that a test has started in its folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            said = (place / "cmdline").read_bytes().decode(errors="replace")
            if word in said and str(root) in said + (place / "environ").read_bytes().decode(errors="replace"):
                found.append(int(place.name))
    return found


def until(what, seconds=300.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kill_of_the_link_of_a_node_or_of_all_is_survived(tmp_path, parties, begun):
    f, out = parties(FFA(), names=NAMES[:2], rounds=2, timeout=40.0), tmp_path / "out"
    (tmp_path / "fed.toml").write_text(written(f))
    verb = [sys.executable, "-m", "undula", "federate", tmp_path / "fed.toml", "--out", out, "--runtime", "flower"]

    def received(name, times):
        log = out / "flower" / "logs" / "node" / f"{name}.txt"
        return log.is_file() and log.read_text().count("Receiving: train message") >= times

    def rounds():
        place = out / "state.json"
        return json.loads(place.read_text())["round"] if place.is_file() else -1

    first = begun(verb)
    until(lambda: received("north", 1))
    os.kill(at_work("flower-superlink", tmp_path)[0], signal.SIGKILL)
    until(lambda: rounds() == 1)
    first.kill()
    first.wait()
    until(
        lambda: not [p for what in ("flower-super", "flwr-serverapp", "flower.warm") for p in at_work(what, tmp_path)]
    )

    before = (out / "flower" / "logs" / "node" / "south.txt").read_text().count("Receiving: train message")
    second = begun([*verb, "--resume"])
    until(lambda: received("south", before + 1))
    os.killpg(
        next(iter(at_work("flower-supernode\0--superlink", out / "flower" / "node" / "south.key"))), signal.SIGKILL
    )
    assert second.wait(400) == 0

    server = Server(f, out, resume=True)
    lost = {(r["round"], name) for r in server.records[1:] for name, c in r["clients"].items() if "failed" in c}
    assert (2, "south") in lost
    assert server.records[2]["clients"]["south"]["failed"] == "late"

    class Lost:
        def __init__(self, client):
            self.client, self.evaluate = client, client.evaluate

        def train(self, number, arrays):
            if (number, self.client.name) in lost:
                raise RuntimeError
            return self.client.train(number, arrays)

    federate(f, tmp_path / "here", parties=lambda s, rows: {n: Lost(c) for n, c in clients_of(s, rows).items()})
    assert_close(
        load_file(out / "state.safetensors"), load_file(tmp_path / "here" / "state.safetensors"), rtol=0, atol=0
    )
