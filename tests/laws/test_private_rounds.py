"""Privacy in rounds: of rows on the clients, of clients at the server; what costs nothing after it; the attack."""

import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import undula
from tests.laws.test_federated import clients
from tests.support import tiny
from undula.federated import FAIR, FFA, FLASC, Exact, FedIT, FedSVD
from undula.federated.flasc import top
from undula.federated.flat import flat
from undula.federated.private import DPSGD, ClientLevel, attack, epsilon, membership, most
from undula.federated.private.losses import row_losses
from undula.federated.private.refused import begins_from_data
from undula.federated.rounds import clients_of, federate
from undula.federated.rows import Rows
from undula.federated.server import Server
from undula.federated.spec import Federation, Unfit
from undula.federated.split import Dirichlet, Even
from undula.methods.centred import Centred
from undula.optim.optimisers import SGD, LoRAPro, LoRSum, SAMReference
from undula.optim.schedules import Constant
from undula.penalties.kl_to_base import KLToBase
from undula.starts.loraga import LoRAGA
from undula.train import CausalLM, Classification, Recipe

CLASSES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    words = {"red": "good", "green": "bad", "blue": "film"}
    rows = [{"text": f"the {words[c]} was {w}", "label": c} for w in tiny.WORDS for c in CLASSES]
    (home / "data").mkdir()
    for split, part in (("train", rows[:48]), ("validation", rows[48:])):
        tiny.jsonl(home / "data" / f"{split}.jsonl", part)
    tiny.bert(home / "base")
    return home


def asked(home, privacy, how=FFA(), recipe=(), **changes):
    settings = {"task": Classification(), "method": undula.LoRA(r=2), "where": ("query", "value"), "lr": 1e-2}
    settings |= {"max_steps": 2, "batch": 4, "schedule": Constant(), "warmup": 0.0, "optimiser": SGD()}
    made = Recipe(**{"model": str(home / "base"), "data": str(home / "data"), **settings, **dict(recipe)})
    given = {"rounds": 2, "how": how, "split": Dirichlet(1.0, clients=3, least=4), "privacy": privacy, **changes}
    return Federation(made, **given)


class Shown:
    """Rows as the model takes them."""

    def __init__(self, task, processor, rows):
        self.task, self.processor, self.rows = task, processor, rows

    def __getitem__(self, n):
        return self.rows[n]


def rounds(server, parties, number):
    for _ in range(number):
        brief = server.brief()
        server.take({n: parties[n].train(server.round + 1, dict(brief)) for n in server.ask()})


def begun(f, out, resume=False):
    rows = Rows(f)
    server = Server(f, out, rows, resume=resume)
    return server, clients_of(server, rows)


def test_rows_of_clients_are_private_in_rounds_and_the_record_says_what_was_spent(home, tmp_path):
    """At the end the target; no loss leaves a client; the same seed gives the same bits; what is asked twice, costs
    twice.  (A batch of all rows: what is asked of the accountant then costs no time.)"""
    how, whole = DPSGD(epsilon=3.0, delta=1e-3, accountant="rdp", seed=1), {"batch": 64}
    f = asked(home, how, recipe=whole)
    server, parties = begun(f, tmp_path / "one")
    rounds(server, parties, 2)
    spent = [r["privacy"]["epsilon"] for r in server.records[1:]]
    assert 0 < spent[0] < spent[1] <= 3.0
    assert spent[1] > 2.9
    for record in server.records[1:]:
        assert record["privacy"]["noise from"] == "a seed, for experiments"
        assert all("loss" not in told and "failed" not in told for told in record["clients"].values())
    again, parties = begun(f, tmp_path / "two")
    rounds(again, parties, 1)
    again.ask()  # and killed before anything is taken
    again, parties = begun(f, tmp_path / "two", resume=True)
    rounds(again, parties, 1)
    assert torch.equal(flat(again.adapter), flat(server.adapter))
    assert again.records[1]["privacy"]["epsilon"] == spent[0]
    assert again.records[2]["privacy"]["epsilon"] > 3.0
    secret = DPSGD(epsilon=3.0, delta=1e-3, accountant="rdp")
    other, parties = begun(asked(home, secret, recipe=whole), tmp_path / "three")
    rounds(other, parties, 1)
    assert other.records[1]["privacy"] == {"epsilon": spent[0], "delta": 1e-3, "noise from": "the system"}


def test_epsilon_counts_the_rounds_that_a_client_was_in(home):
    """Of a part of the clients in each round; a client with fewer rows than a batch takes all of them in each step."""
    how = DPSGD(noise=1.5, delta=1e-4, accountant="rdp")
    f = asked(home, how, fraction=0.5, rounds=5)
    n = {"client-1": 3, "client-2": 30, "client-3": 9}
    histories = [((1.5, min(1.0, 4 / n[name]), 2 * times),) for name, times in (("client-1", 2), ("client-2", 4))]
    worst = max(epsilon(h, 1e-4, "rdp") for h in histories)
    assert how.spent(f, {"client-1": 2, "client-2": 4}, n)["epsilon"] == worst
    one_epoch = asked(home, how, recipe={"max_steps": None, "epochs": 1.0})
    assert how.spent(one_epoch, {"client-2": 1}, n)["epsilon"] == epsilon(((1.5, 4 / 30, 8),), 1e-4, "rdp")


def test_who_is_never_heard_is_told(home):
    """What a client has spent follows from its rows; of one that was asked and never answered they are not known."""
    how = DPSGD(noise=1.5, delta=1e-4, accountant="rdp")
    f = asked(home, how)
    told = how.spent(f, {"client-1": 1, "client-2": 1}, {"client-1": 9})
    assert told["not counted"] == ["client-2"]
    assert told["epsilon"] == epsilon(((1.5, 4 / 9, 2),), 1e-4, "rdp")


def test_a_client_trains_in_the_rounds_of_its_file_alone(home):
    """In others its noise, which is set by the number of those, covers nothing."""
    f = asked(home, DPSGD(epsilon=3.0, delta=1e-3, accountant="rdp"), fraction=0.3, rounds=1)
    out = next(name for name in f.names if name not in f.chosen(1))
    for name, round in ((out, 1), (f.chosen(1)[0], 2), (f.chosen(1)[0], 0)):
        with pytest.raises(ValueError, match=f"{name} is not asked in round {round}"):
            f.privacy.fit(None, f, 10, name, round)


def test_rows_that_no_delta_allows_are_refused_and_the_round_goes_on(home, tmp_path):
    f = asked(home, DPSGD(noise=1.0, delta=1e-3, accountant="rdp"))
    server, parties = begun(f, tmp_path / "out")
    brief = server.brief()
    told = {name: party.train(1, dict(brief)) for name, party in parties.items() if name in server.ask()}
    told["client-2"][1]["num-examples"] = 1 << 30
    record = server.take(told)
    assert "allows to tell one of them outright" in record["clients"]["client-2"]["why"]
    assert record["privacy"]["not counted"] == ["client-2"]
    assert server.round == 1


def test_a_row_of_which_nothing_is_learned_has_the_loss_and_the_gradient_zero(home, tmp_path):
    """As of a conversation that is cut before its answer; beside it others learn."""
    tiny.llama(tmp_path / "base")
    tiny.jsonl(tmp_path / "rows.jsonl", [{"text": f"the film was {w}"} for w in tiny.WORDS])
    given = {"model": str(tmp_path / "base"), "data": str(tmp_path / "rows.jsonl"), "task": CausalLM(generate=0)}
    server = Server(asked(home, None, split=Even(2), recipe={**given, "where": "all-linear"}), tmp_path / "out")
    model, held, adapter = server.desk.model, server.held, server.desk.adapter
    cut = {**held[0], "labels": [-100] * len(held[0]["labels"])}

    def gradients(*rows):
        losses = row_losses(model, Shown(held.task, held.processor, rows), list(range(len(rows))))
        return losses.tolist(), torch.autograd.grad(losses.sum(), adapter.parameters(), allow_unused=True)

    losses, found = gradients(cut)
    assert losses == [0.0]
    assert not any(g is not None and g.any() for g in found)
    (_, wanted), (_, both) = gradients(held[1]), gradients(cut, held[1])
    for a, b in zip(both, wanted, strict=True):
        assert (a is b is None) or torch.equal(a, b)


@pytest.mark.parametrize("task", ["classes", "tokens"])
def test_losses_of_rows_are_the_tasks_own(task, home, tmp_path):
    if task == "classes":
        rows = Rows(asked(home, None))
    else:
        tiny.llama(tmp_path / "base")
        tiny.jsonl(tmp_path / "rows.jsonl", [{"text": f"the film was {w} and {w}"} for w in tiny.WORDS])
        given = {"model": str(tmp_path / "base"), "data": str(tmp_path / "rows.jsonl"), "task": CausalLM(generate=0)}
        rows = Rows(asked(home, None, split=Even(2), recipe={**given, "where": "all-linear"}))
    server = Server(rows.asked, tmp_path / "out", rows)
    model, held = server.desk.model.eval(), server.held
    collate = held.task.collator(held.processor)
    with torch.no_grad():
        found = row_losses(model, held, [0, 1])
        wanted = [held.task.loss()(model, collate([held[n]])) for n in (0, 1)]
    assert_close(found, torch.stack(wanted))
    with torch.no_grad():
        every = row_losses(model, held, list(range(len(held))))
    assert attack(model, held, held, batch=4) == membership(every, every)


def test_clients_are_private_at_the_server(home, tmp_path):
    how = ClientLevel(epsilon=4.0, delta=1e-2, clip=0.1, accountant="rdp", seed=2)
    f = asked(home, how, FedSVD(), weights="alike")
    server, parties = begun(f, tmp_path / "out")
    rounds(server, parties, 2)
    spent = [r["privacy"]["epsilon"] for r in server.records[1:]]
    assert 0 < spent[0] < spent[1] <= 4.0
    assert spent[1] > 3.8
    for f_ in server.adapter.factors.values():
        assert_close(f_["A"] @ f_["A"].T, torch.eye(2))


def test_a_client_changes_the_mean_by_its_clip_at_most():
    adapters = clients(number=3)
    sent, how = clients(number=1, seed=9)[0], ClientLevel(noise=0.0, clip=0.2)
    with_all, without = (flat(how.mean(sent, some, 3, 0.0)) for some in (adapters, adapters[1:]))
    assert_close(float((with_all - without).norm()), 0.2 / 3)
    near = sent.map(lambda f: {k: (t + 1e-4).detach().requires_grad_() for k, t in f.items()})
    assert_close(flat(how.mean(sent, [near], 1, 0.0)), flat(near))


def spread(adapter, sigma, draws=400):
    """(mean, its standard error) of |dW' - dW|^2 of one layer, of noise sigma on all that trains."""
    how, site = ClientLevel(noise=1.0, clip=1.0, seed=3), next(iter(adapter.methods))
    before = adapter.delta(site)
    found = torch.stack([
        (how.mean(adapter, [], 1, sigma, (i,)).delta(site) - before).square().sum() for i in range(draws)
    ])  # fmt: skip
    return float(found.mean()), float(found.std() / draws**0.5)


def test_what_noise_does_to_the_update():
    """Sheet 17: sigma^2 (m |A|^2 + n |B|^2) + sigma^4 m n r on both factors, sigma^2 m |A|^2 on B alone (FFA), and
    sigma^2 m r with orthonormal A (FedSVD)."""
    sigma, r = 0.3, 3
    (adapter,) = clients(undula.LoRA(r=r, alpha=r), number=1)
    site = next(iter(adapter.methods))
    adapter = adapter.site(site)
    m, n = adapter.shapes[site]
    B, A = (float(adapter.factors[site][k].detach().square().sum()) for k in "BA")
    frozen = adapter.map(lambda f: {k: t.detach().requires_grad_(k == "B") for k, t in f.items()})
    turned = FedSVD()([frozen])
    for which, wanted in (
        (adapter, sigma**2 * (m * A + n * B) + sigma**4 * m * n * r),
        (frozen, sigma**2 * m * A),
        (turned, sigma**2 * m * r),
    ):
        found, error = spread(which, sigma)
        assert abs(found - wanted) < 5 * error
        assert error < 0.1 * wanted


def test_fedsvd_is_post_processing():
    """Whatever clients there are, it is a function of their mean: with noise in that, what it makes costs nothing
    more, and keeps its product."""
    adapters = clients(same=("A",))
    mean = FFA()(adapters, [1, 1, 1])
    turned = FedSVD()(adapters, [1, 1, 1])
    noised = ClientLevel(noise=1.0, seed=4).mean(adapters[0], adapters, 3, 1.0)
    of_noised = FedSVD()([noised])
    for site in mean.methods:
        assert_close(FedSVD()([mean]).factors[site]["B"], turned.factors[site]["B"])
        assert_close(of_noised.delta(site), FFA()([noised]).delta(site))
        assert not torch.equal(of_noised.delta(site), turned.delta(site))


def test_flasc_chooses_after_the_noise():
    """Noise comes on every number, also on those that nobody has sent; what is the largest is asked of that."""
    how, adapters = FLASC(down=1.0, up=0.2), clients(number=3)
    (sent,) = clients(number=1, seed=9)
    replies = [how.reply(sent, a) for a in adapters]
    plain, noised = (ClientLevel(noise=v, clip=1.0, seed=5).mean(sent, replies, 3, v) for v in (0.0, 5.0))
    change, dense = flat(plain) - flat(sent), flat(noised) - flat(sent)
    assert (change == 0).any()
    assert (dense != change).all()
    moved = flat(how([noised], before=sent, state={})) != flat(sent)
    assert torch.equal(moved, top(dense, 0.2) != 0)
    assert not torch.equal(moved, top(change, 0.2) != 0)


def refused(home, privacy, **changes):
    with pytest.raises(Unfit) as error:
        asked(home, privacy, **changes)
    return str(error.value)


def test_what_breaks_the_bound_is_refused_with_the_reason(home):
    rows = DPSGD(noise=1.0)
    for recipe, why in (
        ({"optimiser": SAMReference()}, "goes through the rows twice"),
        ({"optimiser": LoRSum()}, "reads the inputs and gradients of all rows"),
        ({"penalty": KLToBase(0.1)}, "looks at the answers to a whole batch"),
        ({"method": Centred(undula.LoRA(r=2), LoRAGA())}, "begins with a look at data"),
        ({"task": Classification(class_weights="balanced")}, "tells of its labels"),
        ({"gradient_checkpointing": True}, "heard twice"),
    ):
        assert why in refused(home, rows, how=FedIT(), recipe=recipe)
    asked(home, rows, FedIT(), recipe={"optimiser": LoRAPro()})
    assert not begins_from_data(Centred(undula.LoRA(r=2)))
    clients_ = ClientLevel(noise=1.0)
    assert "a mean with noise is all that there is" in refused(home, clients_, how=Exact(), weights="alike")
    assert "a mean with noise is all that there is" in refused(home, clients_, how=FAIR(), weights="alike")
    assert "a client counts for as many as it says" in refused(home, clients_)


def test_an_attack_on_losses():
    """The area by all pairs, its variance by the same; nothing to tell, everything to tell."""
    torch.manual_seed(0)
    inside, outside = torch.randn(60).round(decimals=1) - 0.5, torch.randn(40).round(decimals=1)
    found = membership(inside, outside)
    wins = (inside[:, None] < outside).double() + 0.5 * (inside[:, None] == outside).double()
    assert_close(found.auc, float(wins.mean()))
    spread = math.sqrt(float(wins.mean(1).var() / 60 + wins.mean(0).var() / 40))
    assert_close(
        (found.low, found.high), (found.auc - 1.959963984540054 * spread, found.auc + 1.959963984540054 * spread)
    )
    assert_close(found.found, float((inside < outside.min()).double().mean()))
    sure = membership(torch.zeros(5), torch.ones(5))
    assert (sure.auc, sure.low, sure.high, sure.found) == (1.0, 1.0, 1.0, 1.0)
    same = membership(torch.arange(9.0), torch.arange(9.0))
    assert same.auc == 0.5
    assert same.low < 0.5 < same.high
    with pytest.raises(ValueError, match="finite losses of 2"):
        membership([math.nan, 1.0], [1.0, 2.0])
    assert_close((most(0.0), most(1.0), most(math.inf)), (0.5, math.e / (1 + math.e), 1.0))
    assert most(1.0) < most(1.0, 0.1) < 1.0


def test_a_privacy_is_written_and_read(home):
    for text in ({"is": "dp-sgd", "epsilon": 3.0}, {"is": "client-level", "noise": 1.0}):
        made = DPSGD.decode(text)
        assert DPSGD.decode(made.encode()) == made


def test_a_client_whose_rows_cannot_be_as_private_is_named_before_any_round(home, tmp_path):
    """A target out of reach; a delta that would let one of its rows be told."""
    for privacy in (DPSGD(epsilon=1e-4, delta=1e-3, accountant="rdp"), DPSGD(noise=1.0, delta=0.2)):
        with pytest.raises(ValueError, match=r"privacy of client client-1: (no noise keeps|delta=0.2 with)"):
            federate(asked(home, privacy), tmp_path / "out")
    far = ClientLevel(epsilon=1e-4, delta=1e-3, accountant="rdp")
    with pytest.raises(ValueError, match="no noise keeps 2 steps"):
        federate(asked(home, far, weights="alike"), tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_a_client_that_says_more_rows_than_delta_allows_is_refused_and_ends_nothing(home, tmp_path):
    server, parties = begun(asked(home, DPSGD(noise=1.0, delta=1e-3, accountant="rdp")), tmp_path / "out")
    told = {n: p.train(1, dict(server.brief())) for n, p in parties.items()}
    told["client-2"][1]["num-examples"] = 10**6
    record = server.take(told)
    assert record["clients"]["client-2"]["failed"] == "refused"
    assert "1000000 rows" in record["clients"]["client-2"]["why"]
    assert record["privacy"]["epsilon"] > 0


def test_of_a_mean_with_noise_no_bias_is_told(home, tmp_path):
    """The aggregation gets one adapter, from which it cannot be far."""
    for privacy, told in ((ClientLevel(noise=1.0, delta=1e-3, accountant="rdp"), False), (None, True)):
        server, parties = begun(asked(home, privacy, FedIT(), weights="alike"), tmp_path / str(told))
        rounds(server, parties, 1)
        assert ("bias" in server.records[1]) == told


def test_the_attack_in_classes_does_not_see_that_classes_are_more_frequent(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import private

    of_members, of_others = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 1])
    told = torch.tensor([0.1, 0.9])  # a model that knows the classes' shares alone
    assert membership(told[of_members], told[of_others]).auc == 0.75
    assert private.in_classes(told[of_members], told[of_others], of_members, of_others) == 0.5
    members, others = torch.tensor([1.0, 2.0, 5.0, 0.0]), torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert private.in_classes(members, others, of_members, of_others) == (1 + 0.5 + 0 + 1 + 0.5 + 0) / 6
