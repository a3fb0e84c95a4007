"""Clients that have a part of the adapter, rows in columns of other names, a budget of their own."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.laws.test_rounds import Heard, asked, gone, home, parties  # noqa: F401
from tests.support import tiny
from undula.cli.main import app
from undula.federated import FFA, FLASC, FedIT, FedSVD
from undula.federated import messages as M
from undula.federated.desk import Desk
from undula.federated.part import WHOLE, Part
from undula.federated.private import DPSGD, ClientLevel
from undula.federated.private.loop import Private
from undula.federated.rounds import clients_of, each, federate, go
from undula.federated.rows import Rows
from undula.federated.server import Server
from undula.federated.spec import Party, Unfit, read, written
from undula.optim.optimisers import SGD

HOWS = [FedIT(), FedSVD(), FLASC(down=1.0, up=1.0), FLASC(from_start=True)]
LESS = (Party("client-1", r=1), Party("client-2", where="query"))


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()


@pytest.mark.parametrize("method", [undula.LoRA(r=3), undula.Dropout(undula.LoRA(r=3, alpha=5.0), p=0.1)], ids=str)
def test_a_part_is_the_first_ranks_at_the_scale_of_all_and_goes_back_into_its_places(method):
    whole = undula.attach(model(), method, "all-linear").copy()
    whole = whole.map(lambda f: {k: torch.randn_like(t).requires_grad_(k == "B") for k, t in f.items()})
    part = Part(2, frozenset({"0"}))
    cut = part.of(whole)
    B, A = (whole.factors["0"][k].detach() for k in "BA")
    torch.testing.assert_close(
        cut.delta("0"), whole.methods["0"].inside().scaling(3, method.inside().alpha) * B[:, :2] @ A[:2]
    )
    assert list(cut.methods) == ["0"]
    assert [t.requires_grad for t in cut.factors["0"].values()] == [k == "B" for k in cut.factors["0"]]
    other = cut.map(lambda f: {**f, "B": (f["B"] + 1).detach().requires_grad_()})
    back = part.into(whole, other)
    assert back.methods == whole.methods
    assert torch.equal(back.factors["0"]["B"][:, :2], B[:, :2] + 1)
    assert torch.equal(back.factors["0"]["B"][:, 2:], B[:, 2:])
    for site, name in (("0", "A"), ("2", "A"), ("2", "B")):
        assert torch.equal(back.factors[site][name], whole.factors[site][name])
    assert part.into(whole, cut).factors["0"]["B"].requires_grad
    assert WHOLE.of(whole) is whole


@pytest.mark.parametrize("how", HOWS, ids=lambda how: type(how).__name__)
def test_clients_of_other_ranks_and_layers_take_part(how, home, tmp_path):  # noqa: F811
    """A client gets and sends its part alone; what it has not, it leaves as it is; the others are as without it."""
    f = asked(home, how, federated={"clients": LESS, "rounds": 1})
    rows = Rows(f)
    server = Server(f, tmp_path / "out", rows)
    found = {name: Heard(client) for name, client in clients_of(server, rows).items()}
    go(server, found)
    assert "failed" not in str(server.records)
    (down, up, _), (_, layers, _), (_, whole, _) = (heard.kept[0] for heard in found.values())
    if not how.sparse:
        assert {t.shape[1] for name, t in up.items() if name.endswith(".B")} == {1}
        assert {t.shape[0] for name, t in down.items() if name.endswith(".A")} <= {1}
        assert not [name for name in layers if "value" in name]
        assert {t.shape[1] for name, t in layers.items() if name.endswith(".B")} == {2}
    assert M.size(up) < M.size(whole)
    made = {name: server.part(name) for name in f.names}
    sent = M.briefed(M.brief(server.desk.first, how), server.desk.first, how)
    adapters = [
        made[name].into(sent, M.replied(heard.kept[0][1], made[name].of(sent), how, name))
        for name, heard in found.items()
    ]
    counts = [heard.kept[0][2]["num-examples"] for heard in found.values()]
    wanted = M.taken_over(server.desk.first, how(adapters, counts, server.desk.first, {}))
    for name, t in M.named(wanted).items():
        assert torch.equal(t, M.named(server.adapter)[name]), name
    one = next(site for site in sent.methods if "value" in site)
    assert torch.equal(adapters[1].factors[one]["B"], sent.factors[one]["B"])  # of a layer that it has not
    alone = gone(asked(home, how, federated={"rounds": 1}), tmp_path / "alone")
    assert alone.records[1]["clients"]["client-3"] == server.records[1]["clients"]["client-3"]
    assert all(p.requires_grad == q.requires_grad for (*_, p), (*_, q) in
               zip(server.desk.adapter.tensors(), alone.desk.adapter.tensors(), strict=True))  # fmt: skip


def test_layers_of_any_method(home, tmp_path):  # noqa: F811
    f = asked(home, FedIT(), undula.AuroRA(r=2), federated={"clients": LESS[1:], "rounds": 1})
    records = gone(f, tmp_path / "out").records
    assert "failed" not in str(records)
    assert records[1]["clients"]["client-2"]["bytes"] < records[1]["clients"]["client-1"]["bytes"]


def test_a_part_that_makes_no_sense_is_told_with_the_clients_name(home, tmp_path):  # noqa: F811
    def told(party, how=FedIT(), method=undula.LoRA(r=2), **more):
        with pytest.raises(Unfit) as error:
            asked(home, how, method, {"clients": (party,), **more})
        return str(error.value)

    assert "rung Method" in told(Party("client-1", r=1), method=undula.AuroRA(r=2))
    assert "r=3, and the federation's adapter has 2" in told(Party("client-1", r=3))
    assert "there are no ranks" in told(Party("client-1", r=1), method=None)
    assert "is not cut at a rank" in told(Party("client-1", r=1), method=undula.DoRA(undula.LoRA(r=2)))
    assert "where names no layer" in told(Party("client-1", where=()))
    assert "the split has no client 'north'" in told(Party("north", r=1))
    assert "leave out data" in told(Party("client-1", "rows.csv"))
    assert "needs data" in told(Party("client-1"), split=None)
    assert "found txt" in told(Party("client-1", "x.csv", columns={"txt": "a"}), split=None)
    assert "no privacy" in told(Party("client-1", epsilon=1.0))
    loose = {"privacy": ClientLevel(epsilon=1.0, delta=1e-3), "weights": "alike"}
    assert "looser than all have" in told(Party("client-1", epsilon=2.0), **loose)
    f = asked(home, federated={"clients": (Party("client-1", where=("query", "dense")),)})
    with pytest.raises(ValueError, match="client client-1: 'dense' names none of the layers that the federation"):
        Server(f, tmp_path / "out")
    f = asked(home, federated={"clients": (Party("client-1", where="quary"),)})
    with pytest.raises(LookupError, match="client client-1: where='quary' matches none"):
        Server(f, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    same = asked(home, federated={"clients": (Party("client-1", r=2, where=("query", "value")),)})
    desk = Desk((rows := Rows(same)).settled(same), rows.server)
    assert desk.part(same.clients[0]) == WHOLE


def test_ranks_are_those_of_the_layers_that_a_client_has(home, tmp_path):  # noqa: F811
    """Of a layer that has fewer than it asks for it has all; none may have as many as it asks for."""
    f = asked(home, FedIT(), undula.LoRA(r=4), {"rounds": 1, "clients": (Party("client-1", r=3),)},
              overrides={"value": undula.LoRA(r=2)})  # fmt: skip
    rows = Rows(f)
    desk = Desk(rows.settled(f), rows.server)
    cut = desk.part(f.clients[0]).of(desk.first)
    assert {site.rpartition(".")[2]: f["A"].shape[0] for site, f in cut.factors.items()} == {"query": 3, "value": 2}
    desk.adapter.save(tmp_path / "begun")
    for party in (Party("client-1", r=5), Party("client-1", r=3, where="value")):
        begun = asked(
            home, FedIT(), None, {"clients": (party,)}, where="all-linear", begin_from=str(tmp_path / "begun")
        )
        with pytest.raises(ValueError, match=f"client client-1: r={party.r}, and the federation's adapter has"):
            Server(begun, tmp_path / "out")


def test_what_no_client_has_is_told(home, tmp_path):  # noqa: F811
    names = ("client-1", "client-2", "client-3")
    f = asked(home, federated={"clients": tuple(Party(name, r=1, where="query") for name in names)})
    server = Server(f, tmp_path / "out")
    assert "value" in server.notes[-2]
    assert "no client has all ranks of bert.encoder.layer.0.attention.self.query, " in server.notes[-1]
    assert not [
        note for note in Server(asked(home, federated={"clients": LESS}), tmp_path / "all").notes if "no client" in note
    ]


def test_it_is_read_as_it_was_written(home, tmp_path):  # noqa: F811
    f = asked(home, federated={"clients": (Party("client-1", r=1, where="query"), Party("client-2", r=1))})
    own = (Party("north", "a.csv", columns={"text": "report"}), Party("south", "b.csv", epsilon=0.5))
    private = {"privacy": DPSGD(epsilon=1.0), "split": None, "clients": own}
    for each_ in (f, asked(home, federated=private)):
        (tmp_path / "f.toml").write_text(written(each_))
        assert read(tmp_path / "f.toml") == each_
        assert type(f).decode(each_.encode()) == each_


def test_a_dry_run_shows_what_each_client_trains_and_its_noise(home, tmp_path):  # noqa: F811
    private = {"privacy": DPSGD(noise=1.5, delta=1e-3), "clients": LESS}
    (tmp_path / "fed.toml").write_text(written(asked(home, federated=private, optimiser=SGD())))
    done = CliRunner().invoke(
        app, ["federate", str(tmp_path / "fed.toml"), "--out", str(tmp_path / "out"), "--dry-run", "--json", "-"]
    )
    assert done.exit_code == 0, done.output
    *rows, server = json.loads(done.stdout)
    less, layers, all_ = (row["trains"] for row in rows)
    assert less < all_
    assert layers < all_
    assert [row["noise"] for row in rows] == [1.5] * 3
    assert server["noise"] is server["trains"] is None


def test_columns_of_a_client_may_have_other_names(home, tmp_path):  # noqa: F811
    f, paths, rows = parties(home, tmp_path)
    tiny.jsonl(paths["south"], [{"report": row["text"], "finding": row["label"]} for row in rows])
    with pytest.raises(LookupError, match=r"client south(?s:.*)columns = \{ text"):
        Rows(f).client("south")
    own = dataclasses.replace(f.clients[1], columns={"text": "report", "label": "finding"})
    mended = dataclasses.replace(f, clients=(f.clients[0], own))
    north, south = (Rows(mended).client(name) for name in ("north", "south"))
    assert sorted([*north.train["text"], *north.held["text"]]) == sorted([*south.train["text"], *south.held["text"]])


def test_a_budget_of_its_own_is_more_noise_on_the_client(home, tmp_path):  # noqa: F811
    """And the record says it; the others' noise is as it was."""
    how = DPSGD(epsilon=3.0, delta=1e-3, accountant="rdp", seed=1)
    private = {"privacy": how, "clients": (Party("client-2", epsilon=1.0),)}
    f = asked(home, FFA(), federated=private, batch=64, optimiser=SGD())
    noises = {name: how.noise_of(f, name, 10) for name in f.names}
    assert noises["client-2"] > 2 * noises["client-1"]
    assert noises["client-1"] == noises["client-3"] == how.multiplier(10, 64, 4)
    assert how.spent(f, {"client-2": 2}, {"client-2": 10})["epsilon"] == pytest.approx(1.0, abs=0.02)
    records = gone(f, tmp_path / "out").records
    assert "failed" not in str(records)
    assert records[2]["privacy"]["budgets of their own"] == {"client-2": 1.0}
    assert 2.9 < records[2]["privacy"]["epsilon"] <= 3.0
    plain = gone(dataclasses.replace(f, clients=()), tmp_path / "plain").records
    assert plain[1]["clients"]["client-1"] == records[1]["clients"]["client-1"]
    assert plain[1]["clients"]["client-2"] != records[1]["clients"]["client-2"]


def test_a_budget_of_its_own_under_noise_at_the_server_ends_its_part(home, tmp_path):  # noqa: F811
    how = ClientLevel(noise=4.0, delta=1e-3, accountant="rdp", seed=1)
    private = {"privacy": how, "weights": "alike", "rounds": 3}
    whole = asked(home, federated=private, optimiser=SGD())
    once = how.spent(whole, {"client-1": 1}, {})["epsilon"]
    f = dataclasses.replace(whole, clients=(Party("client-1", epsilon=once * 1.01),))
    assert how.most(f, "client-1") == 1
    records = gone(f, tmp_path / "out").records
    assert "failed" not in records[1]["clients"]["client-1"]
    for record in records[2:]:
        assert "allows 1 rounds, which are over" in record["clients"]["client-1"]["why"]
        assert "failed" not in record["clients"]["client-2"]
    assert how.spent(f, {"client-1": 3}, {})["epsilon"] == once
    server = Server(f, tmp_path / "deaf", rows := Rows(f))  # and a client whose own file says no budget
    go(server, clients_of(SimpleNamespace(federation=rows.settled(whole), desk=server.desk), Rows(whole)))
    assert [r["clients"]["client-1"].get("failed") for r in server.records[1:]] == [None, "refused", "refused"]
    none = dataclasses.replace(whole, clients=(Party("client-1", epsilon=once / 2),))
    with pytest.raises(ValueError, match=r"privacy of client client-1: its own epsilon of .* allows no round"):
        Rows(none).client("client-1")


def test_a_seed_gives_steps_that_go_on_other_noise():
    """With the same the difference of two trainings' gradients would have none."""
    how, drawn = DPSGD(noise=1.0, delta=1e-3, accountant="rdp", seed=3), []
    for history in ((), ((1.0, 0.5, 2),), ()):
        net = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
        undula.attach(net, undula.LoRA(r=2), "all-linear")
        sgd = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
        x = torch.zeros(4, 4, dtype=torch.float64)
        with Private(how, net, sgd, lambda n, net=net, x=x: net(x[n]).sum(1), rows=4, batch=4, steps=4,
                     history=history) as private:  # fmt: skip
            private.take(list(range(4)))
            drawn.append(torch.cat([p.grad.flatten() for p in sgd.param_groups[0]["params"]]))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.isclose(drawn[0], drawn[1]).any()


class Leaves:
    def __init__(self, client, what):
        self.client, self.what = client, what

    def train(self, round, arrays):
        raise self.what


def test_a_client_that_leaves_the_process_is_a_line_and_ctrl_c_ends_the_rounds():
    found = each(["a"], {"a": Leaves(None, SystemExit(3))}, lambda name, party: party.train(1, {}), None)
    assert (found["a"].kind, found["a"].why) == ("error", "SystemExit: 3")
    with pytest.raises(KeyboardInterrupt):
        each(["a"], {"a": Leaves(None, KeyboardInterrupt())}, lambda name, party: party.train(1, {}), None)


def test_where_nothing_was_trained_no_adapter_is_written(home, tmp_path):  # noqa: F811
    f, out = asked(home), tmp_path / "out"

    def all_leave(server, rows):
        return {name: Leaves(client, MemoryError("no room")) for name, client in clients_of(server, rows).items()}

    with pytest.raises(RuntimeError, match="OUT holds no adapter; the first of them: MemoryError: no room"):
        federate(f, out, parties=all_leave)
    report = federate(f, out, resume=True, parties=all_leave)
    assert report["trained"] is False
    assert "nothing was trained, and no adapter is written" in report["notes"][0]
    assert not list(out.glob("adapter_*"))
    with pytest.raises(ValueError, match="no adapter"):
        undula.load(out)
    assert (out / "report.html").is_file()


def test_what_a_sparse_way_is_measured_by_and_leaves_is_what_clients_are_sent(home, tmp_path):  # noqa: F811
    """Their changes are from there: the server's own numbers that it never sends have been tried by nobody."""
    f = asked(home, FLASC(down=0.25, up=0.25, lr=1e-2))
    report = federate(f, tmp_path / "out")
    kept = undula.Adapter.load(tmp_path / "out")
    rows = Rows(f)
    server = Server(f, tmp_path / "out", rows, resume=True)
    nonzero = sum(int(t.count_nonzero()) for t in M.named(kept).values())
    assert nonzero == round(0.25 * kept.num_parameters())
    assert report["after"] == server.desk.score(server.result, server.held)
    assert report["after"] != server.desk.score(server.adapter, server.held)
    with pytest.raises(ValueError, match="other frozen factors"):  # numbers from one start mean nothing from another
        M.briefed(
            M.brief(server.adapter, FLASC(from_start=True), first=server.desk.first),
            server.adapter,
            FLASC(from_start=True),
        )
