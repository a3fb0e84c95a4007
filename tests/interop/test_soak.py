"""A server under everything at once, in short (the long form: bench/soak.py)."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def soak():
    sys.path.insert(0, str(BENCH))
    try:
        import soak

        yield soak
    finally:
        sys.path.remove(str(BENCH))


def test_under_everything_at_once_each_reply_is_that_of_the_adapter_that_was_asked_for(soak):
    """Adapters come, go and are torn on disk, clients vanish, the server is ended and started again."""
    least = {"answered": 60, "restarts": 1, "put": 4, "vanished": 1, "404 model_not_found": 1}
    found = soak.soaked(
        90, clients=32, every=1, adapters=16, inside=True, enough=lambda c: all(c[k] >= n for k, n in least.items())
    )
    assert found["targets_met"], (found["met"], found["faults"], found["counts"])
    assert {kind: min(found["counts"].get(kind, 0), n) for kind, n in least.items()} == least


def test_a_prefix_that_serves_another_adapter_would_be_seen(soak, monkeypatch):
    """What the soak looks for it finds: with one salt for all adapters, blocks of the cache are shared among them."""
    from undula.serve import work

    class One(dict):
        def __setitem__(self, request, salt):
            super().__setitem__(request, "")

    def cache_of(*given):
        cache = whole(*given)
        cache.salts = One(cache.salts)
        return cache

    whole = work.cache_of
    monkeypatch.setattr(work, "cache_of", cache_of)
    wrong = "fault: wrong adapter"
    found = soak.soaked(60, clients=8, every=100, adapters=8, inside=True, enough=lambda counts: counts[wrong] > 0)
    assert found["counts"].get(wrong), found["counts"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_server_whose_log_lies_on_a_full_disk_serves_and_ends_in_order(soak, python, tmp_path):
    soak.tags.base(tmp_path / "base")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [python, "-m", "undula", "serve", tmp_path / "base", "--port", port, "--cache", "8MB"]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(list(map(str, words)), stdout=full, stderr=full, env=os.environ)
    try:
        until, status = time.monotonic() + 60, None
        while status != 200:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
            try:
                body = {"model": "base", "prompt": "w1", "max_tokens": 2, "temperature": 0}
                status = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body).status_code
            except httpx.ConnectError:
                continue
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
