"""The program that asks what few trained numbers hold, without its trainings."""

import json
import math
from pathlib import Path

import pytest
import torch

import undula


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import capacity

    return capacity


def row(seed, score, name="LoRA", **more):
    return {"method": name, "r": 1, "size": 10, "seed": seed, "lr": 0.01, "score": score, "trained": 4, **more}


def test_as_many_numbers_train_as_of_lora(bench):
    numbers, frozen = {}, []
    for name in bench.METHODS:
        for seed in (0, 1):
            model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
            adapter = undula.attach(model, bench.method_of(name, 2, 64, 64, seed), "*")
            numbers[name] = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
            frozen += [adapter.factors["0"]["A"].clone()] if name == "VeRA" else []
    extra = {name: n - numbers["LoRA"] for name, n in numbers.items() if n != numbers["LoRA"]}
    assert extra == {"LoRAN, learnable": 2, "AuroRA": 2 * 2 + 2 * 8}
    assert not torch.equal(*frozen)  # a seed is another draw of what stays frozen too


def test_a_sweep_goes_on_beyond_an_edge_on_either_side_and_takes_nothing_that_diverged(bench):
    def peak(at):
        return lambda lr: {"score": math.nan if lr > 0.5 else -abs(math.log10(lr / at))}

    assert bench.swept(peak(0.001), (0.01, 0.03))[0] == 0.0009
    assert bench.swept(peak(0.3), (0.01, 0.03))[0] == 0.3
    assert len(bench.swept(peak(1e-9), (0.01, 0.03))[1]) == 2 + bench.EXTEND


def test_later_seeds_take_the_rate_of_the_sweep_that_is_there(bench, monkeypatch):
    asked = []
    monkeypatch.setitem(bench.KINDS, "labels", lambda *what, **how: asked.append((what, how)) or {"score": 0.5})
    import argparse

    args = argparse.Namespace(kind="labels", sizes=[10], ranks=[1], methods=["LoRA"], seeds=[1, 0], steps=3)
    (made,) = bench.made(args, [row(0, 0.9)])
    assert (made["seed"], made["lr"]) == (1, 0.01)
    assert asked == [(("LoRA", 1, 10, 1), {"steps": 3, "lr": 0.01})]


def test_the_table_takes_rows_as_they_came_and_every_kind(bench):
    rows = [row(0, 0.5, before=0.0), row(0, 0.1, "VeRA", before=0.0), row(1, 1.0, before=0.2)]
    lines = list(bench.table("facts", rows))[2:]
    dense = 10 * 0.75 * math.log2(144) / 4
    assert lines[0] == f"| 10 | 1 | LoRA | 4 | 0.01 | 0.100 | 0.750 | 0.500, 1.000 | {dense:.3f} |"
    assert len(lines) == 2
    planted = [row(0, 0.5, linear_bound=0.4), row(1, 0.4, linear_bound=0.4)]
    assert list(bench.table("planted", planted))[2].endswith("| 0.400 | 0.450 | 0.400, 0.500 | 1 of 2 |")


def test_a_record_names_every_command_that_made_its_rows(bench, tmp_path):
    from record import record

    path = tmp_path / "found.json"
    record(path, {"rows": [1]}, "first")
    record(path, {"rows": [1, 2]}, "second")
    record(path, {"rows": [1, 2, 3]}, "second")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["commands"] == ["first", "second"]
    assert found["command"] == "second"
    record(path, {"rows": [4]}, "third")  # made anew
    assert "commands" not in json.loads(path.read_text(encoding="utf-8"))
