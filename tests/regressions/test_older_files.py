"""Adapters that an earlier version saved load, and compute what they computed then.

`numbers.safetensors` has the base (`net.*`), an input `x` and every adapter's output `y.NAME`, of 2026-11-28.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import undula

ADAPTERS = Path(__file__).parents[1] / "fixtures" / "adapters"
NAMES = sorted(p.parent.name for p in ADAPTERS.glob("*/adapter_config.json"))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_an_earlier_version_computes_what_it_did(name, tmp_path):
    numbers = load_file(ADAPTERS / "numbers.safetensors")
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    model.load_state_dict({k.removeprefix("net."): t for k, t in numbers.items() if k.startswith("net.")})
    adapter = undula.Adapter.load(ADAPTERS / name)
    undula.attach(model, adapter)
    torch.testing.assert_close(model(numbers["x"]), numbers[f"y.{name}"])
    undula.selected(model).save(tmp_path)
    again = undula.Adapter.load(tmp_path)
    assert again.methods == adapter.methods
    assert all(torch.equal(t, again.factors[site][factor]) for site, factor, t in adapter.tensors())


def test_there_is_one_of_every_kind():
    assert {"lora", "loran", "aurora", "dora", "vera", "restarted", "sum", "with-head"} <= set(NAMES)
