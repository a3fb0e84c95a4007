"""What aggregations promise, over random clients in float64."""

import math
from dataclasses import MISSING, fields

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import undula
from undula.core.method import Method
from undula.federated import (
    FAIR,
    FFA,
    FLASC,
    Aggregation,
    Cosine,
    Exact,
    FedIT,
    FedSVD,
    Frobenius,
    bias,
    packed,
    unpacked,
)
from undula.federated.flasc import top
from undula.federated.flat import flat, unflat
from undula.methods.lora import RankStabilised

WEIGHTS = [10, 30, 20]
BY_ITSELF = [m() for m in Method.members() if all(f.default is not MISSING for f in fields(m))]


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def clients(method=None, number=3, same=(), seed=1):
    """Adapters as clients might have trained them: everything random but the factors in `same`."""
    first = undula.attach(model(), method or undula.LoRA(r=3), "all-linear").copy()
    torch.manual_seed(seed)
    return [
        first.map(
            lambda f: {
                k: (t.detach() + torch.randn_like(t)).requires_grad_() if t.requires_grad and k not in same else t
                for k, t in f.items()
            }
        )
        for _ in range(number)
    ]


def mean_update(adapters, site, weights=WEIGHTS):
    return sum(w * a.delta(site) for w, a in zip(weights, adapters, strict=True)) / sum(weights)


EXACT = [FFA(), FedSVD(), Exact(rank=5)]


@pytest.mark.parametrize("how", EXACT, ids=lambda how: type(how).__name__)
def test_the_mean_of_the_updates_is_kept(how):
    adapters = clients(same=() if isinstance(how, Exact) else ("A",))
    if isinstance(how, Exact):  # of rank 5 at most, all together
        adapters = clients(undula.LoRA(r=2), 2)
    weights = WEIGHTS[: len(adapters)]
    made = how(adapters, weights)
    for site in made.methods:
        assert_close(made.delta(site), mean_update(adapters, site, weights))
    assert max(bias(adapters, weights, made).values()) < 1e-7


@pytest.mark.parametrize(
    "how", [FedIT(), FFA(), FedSVD(), FAIR(), FAIR(discrepancy=Cosine()), Exact(), FLASC()], ids=str
)
class TestEvery:
    def alike(self, how):
        return ("A",) if how.trains == "linear" else ()

    def test_clients_may_come_in_any_order(self, how):
        adapters = clients(same=self.alike(how))
        before = clients(seed=5, number=1, same=self.alike(how))[0]
        made = how(adapters, WEIGHTS, before)
        other = how(adapters[::-1], WEIGHTS[::-1], before)
        for site in made.methods:
            assert_close(other.delta(site), made.delta(site))

    def test_equal_clients_are_the_result(self, how):
        if isinstance(how, FLASC):
            pytest.skip("a step of Adam has its own length")
        (one,) = clients(number=1, same=self.alike(how))
        made = how([one, one, one], WEIGHTS, one)
        for site in made.methods:
            assert_close(made.delta(site), one.delta(site))

    def test_a_round_before_any_training_changes_nothing_and_can_learn(self, how):
        start = undula.attach(model(), undula.LoRA(r=3), "all-linear").copy()
        made = how([start, start], before=start)
        if not isinstance(how, FLASC):
            for site, f in made.factors.items():
                assert_close(made.delta(site), torch.zeros_like(made.delta(site)))
                assert f["A"].norm(dim=1).min() > 0.01  # else B would have no gradient

    def test_numbers_that_are_none_are_refused_by_client_and_layer(self, how):
        adapters = clients(same=self.alike(how))
        adapters[1].factors["2"]["B"].data[0, 0] = math.nan
        with pytest.raises(ValueError, match=r"client 2: 1 of 15 numbers in 2\.B are not finite"):
            how(adapters, WEIGHTS, adapters[0])

    @pytest.mark.parametrize("weights", [[1, 2], [1, -1, 1], [0, 0, 0], [1, math.nan, 1]], ids=str)
    def test_weights_are_counts(self, how, weights):
        with pytest.raises(ValueError, match="weights"):
            how(clients(same=self.alike(how)), weights)

    def test_it_goes_to_a_file_and_back(self, how):
        assert Aggregation.decode(how.encode()) == how


def test_no_clients():
    with pytest.raises(ValueError, match="at least one"):
        FedIT()([])


class TestFedIT:
    def test_it_misses_the_covariance_of_the_factors(self):
        adapters = clients()
        made = FedIT()(adapters, WEIGHTS)
        p = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
        for site in made.methods:
            B, A = (torch.stack([a.factors[site][k].detach() for a in adapters]) for k in "BA")
            covariance = torch.einsum(
                "k,kor,kri->oi", p, B - (p[:, None, None] * B).sum(0), A - (p[:, None, None] * A).sum(0)
            )
            s = adapters[0].methods[site].scaling(3, 16.0)
            assert_close(mean_update(adapters, site) - made.delta(site), s * covariance)
            whole = mean_update(adapters, site).norm()
            assert_close(bias(adapters, WEIGHTS, made)[site], float((s * covariance).norm() / whole))

    def test_ranks_and_scales_of_their_own(self):
        small = undula.attach(model(), undula.LoRA(r=1, alpha=3.0, scaling=RankStabilised()), "all-linear").copy()
        small = small.map(lambda f: {k: torch.randn_like(t).requires_grad_() for k, t in f.items()})
        made = FedIT()([small, *clients(number=1)], [1, 0])
        for site in made.methods:
            assert made.methods[site] == undula.LoRA(r=3)
            assert_close(made.delta(site), small.delta(site))  # all weight on the one of rank 1

    def test_a_layer_that_a_client_has_not_is_an_update_of_zero(self):
        one, other = clients(number=2, same=("A",))
        made = FedIT()([one.site("0"), other], [1, 3])
        assert_close(made.delta("0"), 0.25 * one.delta("0") + 0.75 * other.delta("0"))
        assert_close(made.delta("2"), 0.75 * other.delta("2"))

    def test_any_rung_by_its_factors(self):
        adapters = clients(undula.AuroRA(r=2))
        made = FedIT()(adapters, WEIGHTS)
        for name in "ABHS":
            expected = sum(w * a.factors["0"][name] for w, a in zip(WEIGHTS, adapters, strict=True)) / sum(WEIGHTS)
            assert_close(made.factors["0"][name], expected)

    def test_frozen_factors_are_the_same_in_all(self):
        adapters = clients(undula.VeRA(r=4))
        odd = adapters[1].map(lambda f: {**f, "A": f["A"] + 1})
        with pytest.raises(ValueError, match=r"0\.A is frozen and not the same in client 1 and client 2"):
            FedIT()([adapters[0], odd])


class TestFFA:
    @pytest.mark.parametrize("method", [m for m in BY_ITSELF if m.linear_in is not None], ids=str)
    def test_the_mean_computes_the_mean_of_what_clients_compute(self, method):
        kept = method.linear_in
        adapters = clients(method, same=set(undula.attach(model(), method, "all-linear").factors["0"]) - {kept})
        x, layer = torch.randn(4, 7, dtype=torch.float64), model()[0]
        outputs = []
        for a in [*adapters, FFA()(adapters, WEIGHTS)]:
            fresh = nn.Sequential(layer)
            undula.attach(fresh, a.site("0"))
            outputs.append(fresh(x))
            undula.detach(fresh)
        *told, made = outputs
        assert_close(made, sum(w * y for w, y in zip(WEIGHTS, told, strict=True)) / sum(WEIGHTS))

    def test_what_is_linear_in_no_factor_is_refused_by_its_rung(self):
        with pytest.raises(TypeError, match=r"LoRAN.* \(rung Additive\) is linear in none of its factors"):
            FFA()(clients(undula.LoRAN(r=2)))

    def test_an_A_that_has_moved_is_told(self):
        with pytest.raises(ValueError, match=r"0\.A is frozen and not the same in client 1 and client 2"):
            FFA()(clients())

    def test_the_servers_A_counts(self):
        adapters = clients(same=("A",))
        before = adapters[0].map(lambda f: {**f, "A": f["A"] + 1})
        with pytest.raises(ValueError, match="not the same in client 0"):
            FFA()(adapters, before=before)


class TestFedSVD:
    def test_rows_of_A_are_orthonormal_and_columns_of_B_fall(self):
        made = FedSVD()(clients(same=("A",)), WEIGHTS)
        for f in made.factors.values():
            assert_close(f["A"] @ f["A"].T, torch.eye(3, dtype=torch.float64))
            gram = f["B"].T @ f["B"]
            assert_close(gram, torch.diag(gram.diagonal()))
            assert (gram.diagonal().diff() <= 0).all()

    def test_a_lost_rank_is_completed_from_the_old_A(self):
        adapters = [
            a.map(lambda f: {**f, "B": f["B"].detach() * torch.tensor([1.0, 0, 0])}) for a in clients(same=("A",))
        ]
        made = FedSVD()(adapters, WEIGHTS)
        for site, f in made.factors.items():
            assert_close(f["A"] @ f["A"].T, torch.eye(3, dtype=torch.float64))
            assert_close(made.delta(site), mean_update(adapters, site))
            old = adapters[0].factors[site]["A"]
            assert torch.linalg.matrix_rank(torch.cat([f["A"], old])) == 3  # it spans what the old one did

    def test_it_takes_pairs_alone(self):
        with pytest.raises(TypeError, match="rung Method"):
            FedSVD()(clients(undula.AuroRA(r=2)))


class TestFAIR:
    def residual(self, adapters, made, site):
        return float((mean_update(adapters, site) - made.delta(site)).norm())

    def test_the_residual_never_rises_and_falls_with_lam(self):
        adapters = clients()
        steps = [FedIT(), *(FAIR(lam=lam) for lam in (1e6, 100.0, 1.0, 0.01, 0.0))]
        for site in adapters[0].methods:
            found = [self.residual(adapters, how(adapters, WEIGHTS), site) for how in steps]
            assert found == sorted(found, reverse=True)
            assert_close(found[1], found[0], rtol=1e-4, atol=0)  # a large lam is FedIT

    def test_without_lam_it_is_the_least_squares(self):
        adapters = clients()
        made = FAIR(lam=0.0)(adapters, WEIGHTS)
        for site, f in made.factors.items():
            D = mean_update(adapters, site) / adapters[0].methods[site].scaling(3, 16.0)
            assert_close(f["B"], torch.linalg.lstsq(f["A"].T.detach(), D.T).solution.T)

    def test_the_cosine_is_at_a_minimum_of_its_objective(self):
        adapters = clients()
        averages = FedIT()(adapters, WEIGHTS)
        made = FAIR(lam=0.01, discrepancy=Cosine(steps=3000))(adapters, WEIGHTS)
        for site, f in made.factors.items():
            D = mean_update(adapters, site) / adapters[0].methods[site].scaling(3, 16.0)
            dB = (f["B"] - averages.factors[site]["B"]).detach().requires_grad_()
            W = (averages.factors[site]["B"].detach() + dB) @ f["A"].detach()
            objective = 1 - (D * W).sum() / (D.norm() * W.norm()) + 0.01 * dB.square().sum()
            objective.backward()
            assert dB.grad.norm() < 1e-6

    @pytest.mark.parametrize("discrepancy", [Frobenius(), Cosine()], ids=str)
    def test_equal_A_needs_no_correction(self, discrepancy):
        adapters = clients(same=("A",))
        made, plain = FAIR(discrepancy=discrepancy)(adapters, WEIGHTS), FedIT()(adapters, WEIGHTS)
        for site in made.methods:
            assert_close(made.delta(site), plain.delta(site))


class TestExact:
    def test_it_is_the_nearest_of_its_rank(self):
        adapters = clients()
        made = Exact()(adapters, WEIGHTS)
        for site in made.methods:
            assert made.methods[site] == undula.LoRA(r=3)
            s = torch.linalg.svdvals(mean_update(adapters, site))
            assert_close(float((mean_update(adapters, site) - made.delta(site)).norm()), float(s[3:].norm()))

    @pytest.mark.parametrize(
        "methods", [(undula.LoRA(r=2), undula.SHiRA(r=1)), (undula.LoRAN(r=2), undula.LoRAN(r=3))], ids=str
    )
    def test_updates_of_any_kind(self, methods):
        adapters = [clients(m, 1)[0] for m in methods]
        made = Exact(rank=7)(adapters, [1, 1])  # the layers' own
        for site in made.methods:
            assert_close(made.delta(site), mean_update(adapters, site, [1, 1]))

    def test_no_update_no_sum(self):
        with pytest.raises(TypeError, match="rung Method"):
            Exact()(clients(undula.AuroRA(r=2)))


class TestFLASC:
    def test_densities_are_counts_over_all_layers(self):
        (one,) = clients(number=1)
        n = flat(one).numel()
        how = FLASC(down=0.25, up=0.1)
        sent = how.sent(one, one)
        assert int(flat(sent).count_nonzero()) == round(0.25 * n)
        least = flat(sent)[flat(sent) != 0].abs().min()
        assert flat(one)[flat(sent) == 0].abs().max() <= least
        trained = unflat(sent, flat(sent) + torch.randn(n, dtype=torch.float64))
        change = flat(how.reply(sent, trained)) - flat(sent)
        assert int((change.abs() > 1e-12).sum()) == round(0.1 * n)

    def test_all_of_it_is_federated_adam(self):
        before, *adapters = clients(number=3)
        how, state, server = FLASC(down=1.0, up=1.0, lr=0.1), {}, before
        P = nn.Parameter(flat(before).clone())
        adam = torch.optim.Adam([P], lr=0.1)
        for _ in range(3):
            P.grad = -sum(w * (flat(a) - flat(server)) for w, a in zip([1, 3], adapters, strict=True)) / 4
            adam.step()
            server = how(adapters, [1, 3], server, state)
            assert_close(flat(server), P.detach())

    def test_from_the_start_what_nobody_has_sent_is_as_it_began(self):
        """Where the published form has zeros; all of it sent, both are federated Adam."""
        start, *adapters = clients(number=3)
        how, state, server = FLASC(down=0.25, up=0.25, lr=0.1, from_start=True), {}, start
        assert torch.equal(flat(how.sent(start, start)), flat(start))
        for _ in range(2):
            was, server = server, how(adapters, None, server, state)
        moved = flat(how.sent(server, start)) - flat(start)
        assert int((moved.abs() > 1e-12).sum()) == round(0.25 * moved.numel())
        assert_close(moved, top(flat(server) - flat(start), 0.25), rtol=1e-6, atol=1e-7)
        assert torch.equal(state["first"], flat(start))
        assert not torch.equal(flat(server), flat(was))
        whole = [FLASC(1.0, 1.0, from_start=way)([*adapters], None, start, {}) for way in (True, False)]
        assert_close(flat(whole[0]), flat(whole[1]))

    def test_another_layout_is_told(self):
        (one,), (other,) = clients(number=1), clients(undula.LoRA(r=2), number=1)
        with pytest.raises(ValueError, match=r"0 is LoRA\(r=2.* in client 1 and LoRA\(r=3"):
            FLASC()([other], before=one)

    def test_frozen_factors_of_its_own_are_told(self):
        (one,) = clients(undula.VeRA(r=4), number=1)
        odd = one.map(lambda f: {**f, "A": f["A"] + 1})
        with pytest.raises(ValueError, match=r"0\.A is frozen and not the same in client 0 and client 1"):
            FLASC()([odd], before=one)

    def test_ties_go_to_the_first(self):
        assert top(torch.tensor([1.0, -1, 1, 1]), 0.5).tolist() == [1, -1, 0, 0]


class TestWire:
    @pytest.mark.parametrize(("share", "form", "size"), [(1.0, 0, 4000), (0.2, 1, 125 + 800), (0.01, 2, 80)])
    def test_the_shortest_form(self, share, form, size):
        P = top(torch.randn(1000), share)
        data = packed(P)
        assert (data[0], len(data) - 1) == (form, size)
        assert torch.equal(unpacked(data, 1000), P)

    def test_nothing(self):
        assert torch.equal(unpacked(packed(torch.zeros(9)), 9), torch.zeros(9))

    @pytest.mark.parametrize(
        "data",
        [b"", b"\x03", b"\x00" + bytes(35), b"\x01\x00", b"\x01\xff\xff" + bytes(64), b"\x02" + bytes(7),
         b"\x02\x09\x00\x00\x00" + bytes(4), b"\x02" + b"\x01\x00\x00\x00" * 2 + bytes(8),
         packed(torch.ones(9))[:-1], b"\x00" + b"\x00\x00\xc0\x7f" * 9],
        ids=range(10),
    )  # fmt: skip
    def test_bytes_that_are_no_message(self, data):
        with pytest.raises(ValueError, match=r"message|bytes|indices|bitmap|finite"):
            unpacked(data, 9)
