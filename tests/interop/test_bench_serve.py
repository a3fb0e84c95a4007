"""The benchmark of serving, in short, with a model in which nothing takes time."""

from pathlib import Path

import pytest
import torch

from tests.support.served import llama


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import serve

    return serve


def test_the_benchmark_measures_every_way_and_finds_that_all_write_the_same(serve, tmp_path):
    """Mixed ranks and rungs too: each token is what its adapter alone would write, within a near tie."""
    llama().save_pretrained(tmp_path / "base")
    words = (
        f"--model {tmp_path / 'base'} --requests 10 --mixed 5 --prompt 6 --new 4 --long-prompt 20 --long-new 2 "
        "--registered 30 40 --rounds 1 --arrivals 5 --check 5 --clock wall"
    )
    eight = "fbgemm" in torch.backends.quantized.supported_engines
    args = serve.parsed([*words.split(), "--int8" if eight else "--no-int8"])
    (tmp_path / "adapters").mkdir()
    found = serve.measured(args, tmp_path / "adapters")
    targets, met = serve.judged(found, args.requests)
    assert targets.keys() == met.keys()
    assert len(targets) == 8
    assert targets["tokens that differ from the adapter's alone, beyond near ties <= 0"] == 0
    assert all(way["tokens a second"] > 0 for way in found["ways"].values())
    assert sum(way["checked"]["tokens"] for way in found["ways"].values()) > 100
    assert len(found.get("8 bits", ())) == 4 * eight
    assert found["bytes of an adapter"]["loaded"] >= 20
