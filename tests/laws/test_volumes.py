"""Convolutions over volumes: what every method does on them, and kernels that a module keeps by itself."""

import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from tests.support.zoo import ZOO
from undula import LoRA, Reweight

pytestmark = pytest.mark.usefixtures("float64")
close = torch.testing.assert_close


VOLUMES = {
    "strided": lambda: nn.Conv3d(4, 8, 2, stride=2, padding=1),
    "dilated": lambda: nn.Conv3d(4, 8, (1, 3, 2), dilation=2, padding=(0, 2, 2), padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose3d(8, 4, (1, 2, 2), stride=2),
    "grouped": lambda: nn.Conv3d(4, 8, 2, groups=2),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("method", ZOO, ids=repr)
@pytest.mark.parametrize("kind", VOLUMES)
def test_every_method_acts_on_volumes_or_says_why_not(kind, method):
    """Attached it begins where it should, what trains moves the outputs, and merged is live."""
    torch.manual_seed(0)
    model = nn.Sequential(VOLUMES[kind]()).eval()
    x = torch.randn(2, model[0].in_channels, 4, 3, 5)
    base = model(x).detach()
    if kind == "grouped" and method.bottleneck:
        with pytest.raises(ValueError, match="0 is a convolution in 2 groups without a common bottleneck"):
            undula.attach(model, method, "*")
        return
    if kind == "transposed" and (not isinstance(method, Reweight) or method.drops):
        with pytest.raises(TypeError, match=r"0: ConvTranspose3d.forward is not W x \+ b"):
            undula.attach(model, method, "*")
        return
    adapter = undula.attach(model, method, "*")
    if method.starts_at_base:
        close(model(x), base)
    shake(adapter)
    live = model(x)
    assert live.shape == base.shape
    assert not torch.allclose(live, base)
    if isinstance(method, Reweight):
        assert max(undula.merge(model).values()) < 1e-9
        close(model(x), live)
        undula.unmerge(model)
    undula.select(model, None)
    assert torch.equal(model(x), base)


class KernelInFive(nn.Module):
    """A kernel (C_out, 3, 3, 3, C_in), as libraries of sparse convolutions keep it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3, 2))


def test_a_kernel_that_no_adapter_takes_is_refused_with_what_to_do():
    model = nn.ModuleDict({"conv": KernelInFive(), "flat": nn.Linear(2, 2)})
    with pytest.raises(TypeError, match=r"the weight of a KernelInFive, which has 5 dimensions.*full=\['conv'\]"):
        undula.attach(model, LoRA(r=2), "conv")
    with pytest.warns(UserWarning, match=r"left out of .* 5 dimensions"):
        adapter = undula.attach(model, LoRA(r=2), "*", full=["conv"])
    assert set(adapter.factors) == {"flat"}
    assert adapter.num_parameters() == 2 * 2 * 2 + model["conv"].weight.numel()


class Stacked(nn.Module):
    """A kernel (places, C_in, C_out) over the neighbours of each row, which it reads: a sparse convolution."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, 4))

    def forward(self, x, near):
        return torch.einsum("nki,kio->no", x[near], self.weight)


def test_a_kernel_in_a_stack_is_adapted_place_by_place():
    torch.manual_seed(0)
    model, x, near = nn.ModuleDict({"conv": Stacked()}), torch.randn(9, 3), torch.randint(9, (9, 5))
    base = model["conv"](x, near)
    adapter = shake(undula.attach(model, LoRA(r=2), "conv"))
    assert set(adapter.factors) == {f"conv.weight.{i}" for i in range(5)}
    live = model["conv"](x, near)
    assert not torch.allclose(live, base)
    undula.merge(model)
    close(model["conv"](x, near), live)
