"""What rounds of a federation promise, on tiny models: what travels, what is made of it, what a bad client can do."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import undula
from tests.laws.test_federated import BY_ITSELF, model
from tests.support import tiny
from undula.federated import FAIR, FFA, FLASC, Exact, FedIT, FedSVD
from undula.federated import messages as M
from undula.federated.client import Client
from undula.federated.desk import Desk
from undula.federated.messages import Failure
from undula.federated.rounds import clients_of, each, federate, go
from undula.federated.rows import Rows
from undula.federated.server import Server
from undula.federated.spec import Federation, Party, Unfit, read, written
from undula.federated.split import Dirichlet, Even
from undula.io.toml import Faults
from undula.optim.schedules import Constant
from undula.ranks import AdaLoRA
from undula.train import CausalLM, Classification, Recipe, evaluate

CLASSES = ("red", "green", "blue")
HOWS = [FedIT(), FFA(), FedSVD(), FAIR(), Exact(), FLASC(), FLASC(from_start=True)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    words = {"red": "good", "green": "bad", "blue": "film"}
    rows = [{"text": f"the {words[c]} was {w}", "label": c} for w in tiny.WORDS for c in CLASSES]
    (home / "data").mkdir()
    for split, part in (("train", rows[:48]), ("validation", rows[48:54]), ("test", rows[54:])):
        tiny.jsonl(home / "data" / f"{split}.jsonl", part)
    tiny.bert(home / "base")
    return home


def asked(home, how=FedIT(), method=undula.LoRA(r=2), federated=(), **changes):
    settings = {"task": Classification(), "method": method, "where": ("query", "value"), "lr": 1e-2, "max_steps": 2,
                "batch": 4, "schedule": Constant(), "warmup": 0.0}  # fmt: skip
    recipe = Recipe(**{"model": str(home / "base"), "data": str(home / "data"), **settings, **changes})
    return Federation(
        recipe, **{"rounds": 2, "how": how, "split": Dirichlet(1.0, clients=3, least=4), **dict(federated)}
    )


@pytest.fixture(scope="module")
def rows(home):
    return Rows(asked(home))


def gone(f, out, wrap=lambda client: client, resume=False):
    """The server after all rounds."""
    rows = Rows(f)
    server = Server(f, out, rows, resume=resume)
    go(server, {name: wrap(client) for name, client in clients_of(server, rows).items()})
    return server


class Heard:
    """A client whose messages are kept."""

    def __init__(self, client):
        self.client, self.kept = client, []

    def train(self, round, arrays):
        answer = self.client.train(round, arrays)
        self.kept.append((arrays, *answer))
        return answer

    def evaluate(self, arrays):
        return self.client.evaluate(arrays)


@pytest.mark.parametrize("how", HOWS, ids=lambda how: type(how).__name__)
def test_a_round_is_the_pure_function_of_what_travels_and_that_is_numbers_that_train_and_counts(how, home, tmp_path):
    """No row, no text, nothing frozen: of LoRA's A nothing goes up where it does not train, and FFA's never goes."""
    rows = Rows(asked(home, how))
    server = Server(rows.asked, tmp_path / "out", rows)
    found = {name: Heard(client) for name, client in clients_of(server, rows).items()}
    go(server, found)
    n = sum(t.numel() for t in M.named(server.adapter).values() if t.requires_grad)
    for heard in found.values():
        for down, up, counts in heard.kept:
            assert set(counts) == {"num-examples", "loss", "steps"}
            assert all(type(v) in (int, float) for v in counts.values())
            assert down.pop("frozen").nbytes == 32
            if how.sparse:
                assert set(up) == set(down) == {"packed"}
                assert up["packed"].nbytes <= 1 + -(-n // 8) + 4 * math.ceil(n / 4)
                continue
            assert sum(a.size for a in up.values()) == n
            assert {a.dtype for a in (*up.values(), *down.values())} == {np.dtype("float32")}
            assert any(name.endswith(".A") for name in up) == (how.trains is None)
            assert any(name.endswith(".A") for name in down) == (how != FFA())
    assert [r["round"] for r in server.records] == [0, 1, 2]
    before, state = server.desk.first, {}
    for at in range(2):
        told = [h.kept[at] for h in found.values()]
        sent = M.briefed(M.brief(before, how, first=server.desk.first), server.desk.first, how)
        before = M.taken_over(
            before,
            how(
                [M.replied(up, sent, how, "") for _, up, _ in told],
                [c["num-examples"] for *_, c in told],
                before,
                state,
            ),
        )
    for name, t in M.named(before).items():
        assert torch.equal(t, M.named(server.adapter)[name]), name


METHODS = [
    (FedIT(), undula.AuroRA(r=2)), (FedIT(), undula.LoRAN(r=2)), (FFA(), undula.AuroRA(r=2)),
    (FLASC(), undula.LoRAN(r=2)), (FedIT(), None), (FedIT(), undula.VeRA(r=4)),
]  # fmt: skip


@pytest.mark.parametrize(("how", "method"), METHODS, ids=lambda x: type(x).__name__)
def test_methods_of_every_rung_take_part(how, method, home, tmp_path):
    records = gone(asked(home, how, method, {"rounds": 1}), tmp_path / "out").records
    assert records[1]["server"]["loss"] != records[0]["server"]["loss"]
    assert "failed" not in str(records)


def test_the_same_tasks_as_of_a_training(home, tmp_path):
    """Text that goes on, divided by chance, since it has no classes."""
    tiny.llama(tmp_path / "base")
    tiny.jsonl(tmp_path / "rows.jsonl", [{"text": f"the film was {w} and {w}"} for w in tiny.WORDS])
    f = asked(home, federated={"split": Even(2), "rounds": 1}, model=str(tmp_path / "base"), where="all-linear",
              data=str(tmp_path / "rows.jsonl"), task=CausalLM(generate=0))  # fmt: skip
    records = gone(f, tmp_path / "out").records
    assert records[1]["server"]["loss"] < records[0]["server"]["loss"]
    with pytest.raises(ValueError, match="have none: take"):
        Rows(dataclasses.replace(f, split=Dirichlet(clients=2))).client("client-1")


@pytest.mark.parametrize("method", BY_ITSELF, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("how", [FedIT(), FLASC(down=1, up=1)], ids=lambda how: type(how).__name__)
def test_what_is_sent_arrives(how, method):
    """Of every method; what layers share travels once and stays shared.  FLASC's bytes are of float32."""
    first = undula.attach(model(), method, "all-linear").copy()
    sent = M.briefed(M.brief(first, how), first, how)
    other = M.filled(sent, {n: t + torch.randn_like(t) for n, t in M.named(sent).items() if t.requires_grad})
    came = M.replied(M.reply(sent, other, how), sent, how, "client")
    assert list(M.named(came)) == list(M.named(first))
    for name, t in M.named(came).items():
        torch.testing.assert_close(t, M.named(other)[name], rtol=0, atol=1e-6 if how == FLASC(1, 1) else 0)


class Killed(BaseException):
    pass


class Falls:
    """Clients that are killed in the middle of their second round."""

    def __init__(self, client):
        self.client = client

    def train(self, round, arrays):
        if round == 2 and self.client.name == "client-2":
            raise Killed
        return self.client.train(round, arrays)


def test_after_a_kill_the_rounds_go_on_to_the_bit(home, tmp_path):
    """With dropout, and with moments that the server keeps."""
    f = asked(home, FLASC(), undula.Dropout(undula.LoRA(r=2), p=0.1))
    whole, out = gone(f, tmp_path / "whole"), tmp_path / "out"
    with pytest.raises(Killed):
        gone(f, out, Falls)
    with pytest.raises(FileExistsError, match="--resume"):
        Server(f, out)
    with pytest.raises(ValueError, match="rounds: not what"):
        Server(dataclasses.replace(f, rounds=3), out, resume=True)
    assert gone(f, out, resume=True).records == whole.records
    assert (out / "state.safetensors").read_bytes() == (tmp_path / "whole/state.safetensors").read_bytes()
    assert Server(f, out, resume=True).round == 2


def first(arrays, change):
    name = next(iter(arrays))
    return {**arrays, name: change(arrays[name])}


def _raises(arrays, counts):
    raise MemoryError("too little")


SPOILT = {
    "raises": (_raises, "error", "MemoryError: too little"),
    "NaN": (lambda a, c: (first(a, lambda t: t * np.float32("nan")), c), "refused", "are not finite"),
    "infinite": (lambda a, c: (first(a, lambda t: t + np.float32("inf")), c), "refused", "are not finite"),
    "shapes": (lambda a, c: (first(a, lambda t: t[:1]), c), "refused", "found float32"),
    "transposed": (lambda a, c: (first(a, lambda t: t.T), c), "refused", "found float32"),
    "doubles": (lambda a, c: (first(a, lambda t: t.astype(float)), c), "refused", "found float64"),
    "objects": (lambda a, c: (first(a, lambda t: t.astype(object)), c), "refused", "found object"),
    "lists": (lambda a, c: (first(a, lambda t: t.tolist()), c), "refused", "no arrays by name"),
    "fewer": (lambda a, c: (dict(list(a.items())[1:]), c), "refused", "lacks"),
    "more": (lambda a, c: ({**a, "rows": np.zeros(3)}, c), "refused", "has rows"),
    "nothing": (lambda a, c: None, "refused", "NoneType"),
    "text": (lambda a, c: (b"\x80\x04pickle", c), "refused", "no arrays by name"),
    "no rows": (lambda a, c: (a, {**c, "num-examples": 0}), "refused", "whole number of rows"),
    "negative": (lambda a, c: (a, {**c, "num-examples": -5}), "refused", "whole number of rows"),
    "endless": (lambda a, c: (a, {**c, "num-examples": float("inf")}), "refused", "finite number"),
    "vast": (lambda a, c: (a, {**c, "num-examples": 10**5000}), "refused", "finite number"),
    "more than a float": (lambda a, c: (a, {**c, "loss": 10**400}), "refused", "finite number"),
    "a failure's names": (lambda a, c: (a, {**c, "failed": 1}), "refused", "none of them 'failed'"),
    "a flood": (lambda a, c: (a, {**c, **{str(i): i for i in range(10**4)}}), "refused", "100 at most"),
    "secrets": (lambda a, c: (a, {**c, "text": "a row of mine"}), "refused", "text is a finite number"),
}


@pytest.fixture(scope="module")
def desk(home, rows):
    return Desk(rows.settled(rows.asked), rows.server)


@pytest.fixture(scope="module")
def answered(home, rows, desk, tmp_path_factory):
    """(the federation, {client: its answer of round 1}, the adapter of a round without the second)."""
    f = asked(home, federated={"rounds": 1})
    server = Server(f, tmp_path_factory.mktemp("served") / "out", rows, desk)
    brief = server.brief()
    told = {name: client.train(1, dict(brief)) for name, client in clients_of(server, rows).items()}
    assert server.take({n: t for n, t in told.items() if n != "client-2"})["clients"]["client-2"] == {
        "failed": "absent",
        "why": "no answer",
    }
    return f, told, M.named(server.adapter)


class Told:
    """A client that answers what it is told to."""

    def __init__(self, answer, spoils=lambda *answer: answer):
        self.answer, self.spoils = answer, spoils

    def train(self, round, arrays):
        return self.spoils(*self.answer)


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_bad_answer_is_a_line_in_the_record_and_counts_for_nothing(spoilt, answered, rows, desk, tmp_path):
    """The round ends as it does without that client."""
    spoils, kind, why = SPOILT[spoilt]
    f, answers, wanted = answered
    parties = {name: Told(answer) for name, answer in answers.items()}
    parties["client-2"] = Told(answers["client-2"], spoils)
    server = Server(f, tmp_path / "out", rows, desk)
    record = server.take(each(f.names, parties, lambda name, p: p.train(1, {}), None))
    told = record["clients"]["client-2"]
    assert told["failed"] == kind
    assert why in told["why"]
    for name, t in M.named(server.adapter).items():
        assert torch.equal(t, wanted[name])


def test_answers_count_in_the_clients_order_and_rows_stay_as_many(home, rows, desk, tmp_path):
    """In whatever order they come; one that is late does not count, and who says other rows than before is refused."""
    f = asked(home)
    servers = [Server(f, tmp_path / name, rows, desk) for name in "ab"]
    parties = clients_of(servers[0], rows)
    brief = servers[0].brief()
    told = {n: p.train(1, brief) for n, p in parties.items()}
    for server, order in zip(servers, (list(told), list(told)[::-1]), strict=True):
        server.take({n: told[n] for n in order})
    a, b = (M.named(s.adapter) for s in servers)
    assert all(torch.equal(t, b[name]) for name, t in a.items())
    brief = servers[0].brief()
    told = {n: p.train(2, brief) for n, p in parties.items()}
    told["client-1"][1]["num-examples"] += 1000
    told["client-3"] = Failure("late", "9 s, and the server waits 1 s")
    record = servers[0].take(told)
    assert record["clients"]["client-1"]["failed"] == "refused"
    assert "stay as many" in record["clients"]["client-1"]["why"]
    assert record["clients"]["client-3"]["failed"] == "late"
    assert record["up"] == record["clients"]["client-2"]["bytes"]


def test_a_round_that_makes_nothing_sound_leaves_the_adapter(home, rows, desk, tmp_path):
    """Too few answers; numbers so large that the model's answers are none."""
    f = asked(home, federated={"min_clients": 2})
    server = Server(f, tmp_path / "out", rows, desk)
    before = server.adapter
    told = {n: p.train(1, server.brief()) for n, p in clients_of(server, rows).items()}
    record = server.take({"client-1": told["client-1"]})
    assert "1 replies count" in record["stayed"]
    assert server.adapter is before
    huge = {n: ({k: np.full_like(a, 3e38) for k, a in arrays.items()}, c) for n, (arrays, c) in told.items()}
    assert "not finite" in server.take(huge)["stayed"]
    assert server.adapter is before
    assert server.round == 2


def test_clients_with_other_frozen_factors_or_another_base_take_no_brief(home, rows, tmp_path):
    f = asked(home, FFA())
    server = Server(f, tmp_path / "out", rows)
    g = rows.settled(asked(home, FFA(), seed=5))
    other = Client(g, "client-1", rows, Desk(g, rows.server))
    with pytest.raises(ValueError, match="other frozen factors, or another base"):
        other.train(1, server.brief())
    same = Client(f, "client-1", rows, server.desk)
    with pytest.raises(ValueError, match="lacks"):
        same.train(1, {"frozen": server.brief()["frozen"]})
    assert same.train(1, server.brief())[1]["steps"] == 2


def test_what_fails_everywhere_is_no_federation(home, tmp_path):
    """A mistake of the file's, which each client would meet: said, and not recorded round after round."""
    with pytest.raises(RuntimeError, match=r"no client got through the first round.*too little"):
        gone(asked(home), tmp_path / "out", lambda client: Told(({}, {}), _raises))


@pytest.mark.parametrize(
    ("how", "method", "kind"),
    [
        (Exact(), undula.LoRAN(r=2), TypeError),
        (FedSVD(), undula.AuroRA(r=2), TypeError),
        (FAIR(), undula.LoRAN(), TypeError),
    ],
    ids=str,
)
def test_what_rounds_cannot_go_on_with_is_refused_before_the_first(how, method, kind, home, tmp_path):
    with pytest.raises(kind, match="FedIT"):
        Server(asked(home, how, method), tmp_path / "out")


@pytest.mark.parametrize("alpha", [0.05, 100.0])
def test_each_row_goes_to_one_client(alpha):
    labels = [i % 5 for i in range(500)]
    parts = Dirichlet(alpha, clients=20, least=10).parts(labels, 500, 3)
    assert sorted(i for part in parts for i in part) == list(range(500))
    assert min(map(len, parts)) >= 10
    assert parts == Dirichlet(alpha, clients=20, least=10).parts(labels, 500, 3)
    most = [max(np.bincount([labels[i] for i in part])) / len(part) for part in parts]
    assert (sum(most) / 20 > 0.6) == (alpha < 1)  # of its rows the share of a client's first class
    even = Even(7).parts(None, 500, 0)
    assert {len(part) for part in even} == {71, 72}
    with pytest.raises(ValueError, match="least is"):
        Dirichlet(alpha, clients=20, least=0)  # of whom some would have nothing
    with pytest.raises(ValueError, match="too few for 20 clients"):
        Dirichlet(alpha, clients=20, least=30).parts(labels, 500, 3)


class TestFile:
    def test_it_is_read_as_it_was_written(self, home, tmp_path):
        own = {"split": None, "clients": (Party("north", "north.csv"), Party("south", "south.csv")), "timeout": 5.0}
        for f in (
            asked(home, FAIR(lam=0.1), federated={"fraction": 0.5}),
            asked(home, federated=own, epochs=2.0, schedule=None),
        ):
            (tmp_path / "f.toml").write_text(written(f))
            assert read(tmp_path / "f.toml") == f
            assert Federation.decode(f.encode()) == f

    def test_all_that_is_wrong_is_told_with_its_lines(self, tmp_path):
        text = """model = "m"
data = "d"
task = "classification"
method = { is = "loran", r = 0 }
round = 3
how = "fedavg"
fraction = 2
[[clients]]
name = "a"
"""
        (tmp_path / "f.toml").write_text(text)
        with pytest.raises(Faults) as error:
            read(tmp_path / "f.toml")
        assert [line for line, _ in error.value.found] == [None, 4, 5, 6, 7, 8]
        assert "rounds" in str(error.value)

    def test_what_does_not_go_together_is_told_at_once(self, home):
        with pytest.raises(Unfit) as error:
            asked(home, FFA(), undula.LoRAN(r=2), {"split": None, "min_clients": 1}, eval_every=3, lr=None)
        fields = [name for name, _ in error.value.found]
        assert fields == ["eval_every", "lr", "split", "method"]
        with pytest.raises(Unfit, match="no average"):
            asked(home, allocator=AdaLoRA(target=2), method=undula.AdaLoRA(r=4))

    def test_clients_have_rows_of_their_own_and_the_files_classes(self, home, tmp_path):
        """Classes come from the file's names or the server's rows: a client has some of them alone."""
        rows = [{"text": f"the day was {w}", "label": c} for w in tiny.WORDS[:6] for c in CLASSES[:2]]
        tiny.jsonl(tmp_path / "north.jsonl", rows)
        tiny.jsonl(tmp_path / "south.jsonl", [*rows, {"text": "the end", "label": "purple"}])
        parties = tuple(Party(n, str(tmp_path / f"{n}.jsonl")) for n in ("north", "south"))
        f = asked(home, federated={"split": None, "clients": parties})
        found = Rows(f)
        assert found.task.names == ("blue", "green", "red")
        train, held = found.client("north")
        assert len(train) + len(held) == 12
        with pytest.raises(ValueError, match="purple"):
            found.client("south")
        away = dataclasses.replace(
            found.settled(f), recipe=dataclasses.replace(found.settled(f).recipe, data="gone.jsonl")
        )
        assert len(Rows(away).client("north").train) == len(train)  # whose machine has not the server's rows


def test_what_stands_before_the_aggregation_makes_what_it_gets(home, tmp_path):
    """Its folder in OUT may be there first."""
    rows = Rows(asked(home, FFA(), federated={"rounds": 1}))
    (tmp_path / "out" / "flower").mkdir(parents=True)
    server = Server(rows.asked, tmp_path / "out", rows)
    server.pool = lambda sent, adapters, weights: (adapters[1:2], [1.0])
    found = {name: Heard(client) for name, client in clients_of(server, rows).items()}
    go(server, found)
    ((_, up, _),) = found[server.federation.names[1]].kept
    made = M.reply(server.adapter, server.adapter, FFA())
    assert made.keys() == up.keys()
    assert all(np.array_equal(made[name], up[name]) for name in up)


def parties(home, place, **more):
    """A federation of two clients with rows of their own, in files; {client: the path}."""
    rows = [{"text": f"the {w} was {x}", "label": "good" if x in tiny.GOOD else "bad"}
            for w in ("film", "food") for x in tiny.GOOD + tiny.BAD]  # fmt: skip
    paths = {name: place / f"{name}.jsonl" for name in ("server", "north", "south")}
    for path in paths.values():
        tiny.jsonl(path, rows)
    them = tuple(Party(n, str(paths[n])) for n in ("north", "south"))
    f = asked(home, data=str(paths["server"]), federated={"split": None, "clients": them, "rounds": 1}, **more)
    return f, paths, rows


def test_what_is_wrong_with_a_clients_rows_or_with_the_aggregation_leaves_nothing(home, tmp_path):
    """So that the same directory takes the mended file: the message names the client and what to write."""
    f, paths, rows = parties(home, tmp_path)
    out = tmp_path / "out"
    tiny.jsonl(paths["south"], [*rows, {"text": "the day was a day", "label": "unheard"}])
    with pytest.raises(ValueError, match=r"client south: (?s:.*)'unheard'(?s:.*)names = \["):
        federate(f, out)
    paths["south"].unlink()
    with pytest.raises(FileNotFoundError, match="client south"):
        federate(f, out)
    tiny.jsonl(paths["south"], rows)
    with pytest.raises(TypeError, match="Exact adds updates"):
        federate(asked(home, Exact(), undula.AuroRA(r=2)), out)
    assert not any(out.iterdir())
    assert "failed" not in str(federate(f, out)["rounds"])


def test_the_result_is_measured_on_all_of_the_servers_rows_and_no_file_says_to_train_on_them(home, tmp_path):
    """`undula train --config OUT/run.toml` would be another training, on the server's rows alone."""
    f, *_ = parties(home, tmp_path)
    after = federate(f, tmp_path / "out")["after"]
    assert evaluate(tmp_path / "out") == pytest.approx(after, rel=1e-5)
    assert evaluate(tmp_path / "out", split="train") == pytest.approx(after, rel=1e-5)
    assert not (tmp_path / "out/run.toml").exists()


def test_rows_that_are_left_out_are_told_with_whose_they_are(home, tmp_path, caplog):
    f, paths, rows = parties(home, tmp_path, skip_faulty=0.2)
    tiny.jsonl(paths["south"], [*rows, {"text": "the day was a day", "label": "unheard"}])
    assert sum(len(part) for part in Rows(f).client("south")) == len(rows)
    assert "client south: " in caplog.text
    assert ": 1 of 21 rows are left out for their faults" in caplog.text


def test_training_rows_of_the_server_that_nobody_uses_are_told(home, tmp_path, caplog):
    f, _, rows = parties(home, tmp_path)
    (tmp_path / "both").mkdir()
    for part, some in ("train", rows), ("validation", rows[:6]):
        tiny.jsonl(tmp_path / f"both/{part}.jsonl", some)
    recipe = dataclasses.replace(f.recipe, data=str(tmp_path / "both"))
    assert len(Rows(dataclasses.replace(f, recipe=recipe)).server) == 6
    assert f"the server: its {len(rows)} training rows are not used" in caplog.text


def test_a_client_with_a_bad_name_is_told_by_its_line(home, tmp_path):
    (tmp_path / "fed.toml").write_text(
        written(asked(home)).replace("[split]", "[unknown]")
        + "".join(f'\n[[clients]]\nname = "{n}"\ndata = "x.csv"\n' for n in ("north", "North", "a/b"))
    )
    text = (tmp_path / "fed.toml").read_text().split("[unknown]")
    (tmp_path / "fed.toml").write_text(text[0] + text[1][text[1].index("[[clients]]") :])
    lines = (tmp_path / "fed.toml").read_text().splitlines()
    with pytest.raises(Faults) as found:
        read(tmp_path / "fed.toml")
    for name, why in (("North", "two clients are called 'North' as 'north' is, but for case"), ("a/b", "is no name")):
        at = lines.index(f'name = "{name}"')
        assert f"line {at}: " in str(found.value)
        assert why in str(found.value)
