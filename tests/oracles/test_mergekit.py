"""mergekit's operations on the same updates: its numbers are in fixtures/mergekit.json, made by mergekit itself with
the draws of ours (`Merge(seed=0)`, layer "0") in the place of its own."""

import json
from pathlib import Path

import pytest
import torch

import undula
from undula.combine import DARE, DELLA, Breadcrumbs, Elect, Magnitude, Merge, Slerp, Sum

TOLD = json.loads((Path(__file__).parents[1] / "fixtures" / "mergekit.json").read_text())
DELTAS = [torch.tensor(d, dtype=torch.float64) for d in TOLD["deltas"]]
WEIGHTS = [0.5, 1.0, 2.0]
close = torch.testing.assert_close


def adapters():
    """Three LoRAs of full rank with these updates."""
    made = []
    for dW in DELTAS:
        O, I = dW.shape
        method = undula.LoRA(r=O, alpha=float(O))
        factors = {"A": dW.clone().requires_grad_(), "B": torch.eye(O, dtype=torch.float64).requires_grad_()}
        made.append(undula.Adapter({"0": method}, {"0": factors}, {"0": (O, I)}))
    return made


def theirs(name):
    return torch.tensor(TOLD[name], dtype=torch.float64)


EQUAL = {
    "task_arithmetic": Merge(consensus=Sum()),
    "ties, density 0.25": Merge(Magnitude(0.25), Elect()),
    "breadcrumbs, density 0.5, gamma 0.1": Merge(Breadcrumbs(0.5, 0.1), Sum()),
    "breadcrumbs_ties, density 0.5, gamma 0.1": Merge(Breadcrumbs(0.5, 0.1), Elect(Sum())),
    "dare_linear, density 0.5, rescale false": Merge(DARE(0.5), Sum(), scale=0.5),
    "dare_ties, density 0.5, rescale false": Merge(DARE(0.5), Elect(Sum()), scale=0.5),
}


@pytest.mark.parametrize("name", EQUAL)
def test_the_two_axes_are_mergekits(name):
    """Without its rescaling DARE's is the density times ours, which divides by it as the paper does."""
    close(EQUAL[name](adapters(), WEIGHTS).delta("0"), theirs(name))


def test_della_draws_with_mergekits_probabilities():
    """Its epsilon is half of our window; without its rescaling entries stay as they are, ours are divided by their
    chance."""
    for i, found in enumerate(theirs("della_linear, density 0.5, epsilon 0.2, rescale false, each")):
        weights = [float(i == j) for j in range(3)]
        ours = Merge(DELLA(0.5, 0.4), Sum())(adapters(), weights).delta("0")
        share = DELTAS[i].abs().argsort(1).argsort(1) / (DELTAS[i].shape[1] - 1)
        close(ours * (0.5 + 0.4 * (share - 0.5)), found)


def test_slerp_is_mergekits():
    close(Slerp()(adapters()[:2], [0.75, 0.25]).delta("0"), theirs("slerp, t 0.25"))


def test_where_mergekit_does_something_else():
    """DARE's default there makes up for what was dropped by the sum of magnitudes of that draw, not by the density, so
    the mean over draws is not the update; and TIES divides by the signed sum of weights, so that a negative weight
    counts against the others (ours is that of the negated term)."""
    weighted = [w * dW for w, dW in zip(WEIGHTS, DELTAS, strict=True)]
    rescaled = theirs("dare_linear, density 0.5")
    plain = theirs("dare_linear, density 0.5, rescale false")
    assert not torch.allclose(rescaled, plain / 0.5)
    generators = [Merge()._generator("0", i, 0) for i in range(3)]
    draws = [torch.rand(6, 8, generator=g, dtype=torch.float64) < 0.5 for g in generators]
    l1 = [d * kept * (d.abs().sum() / (d * kept).abs().sum()) for d, kept in zip(weighted, draws, strict=True)]
    close(rescaled, sum(l1), rtol=1e-6, atol=1e-6)  # it draws and rescales in float32
    taken = theirs("ties, density 0.25, weights 0.5 -1 2")
    ours = Merge(Magnitude(0.25), Elect())(adapters(), [0.5, -1.0, 2.0]).delta("0")
    differ = ~torch.isclose(taken, ours)
    assert differ.any()
    assert float((taken - ours)[differ].abs().max()) > 0.1
