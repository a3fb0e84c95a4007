"""`undula serve` from the command line: what it refuses before it loads anything, and a whole life in a process of its
own."""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace

import httpx
import pytest
import torch
from typer.testing import CliRunner

import undula
from undula.cli.main import app
from undula.serve.server.opening import meant, names_of

from ..support import tiny
from ..support.numbers import shake

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and an adapter of it that says so."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("verb")
    base = tiny.llama(root / "tiny-llama", chat=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    shake(undula.attach(model, undula.LoRA(r=2), ["q_proj"]).parameters())
    replace(undula.detach(model), about={"base_model_name_or_path": base}).save(root / "adapters" / "own")
    return root


def said(*words, env=None):
    """What `undula serve ...` says beside, when it refuses."""
    done = CliRunner().invoke(app, ["serve", *map(str, words)], env=env, catch_exceptions=False)
    assert done.exit_code == 2, (done.stdout, done.stderr)
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("--host", "0.0.0.0"), "there are no keys: name a file of them with --keys, or say --no-keys"),
        (("--host", "::"), "no keys"),
        (("--memory", "much"), "--memory is a number of bytes"),
        (("--cache", "0"), "--cache is a number of bytes"),
        (("--keys", "none.toml"), "there is no file of keys"),
        (("--host", "no.such.host.invalid", "--no-keys"), "is no address of this machine"),
        (("--adapters", "nowhere"), "there is no directory nowhere (--adapters)"),
        (("--deadline", "0"), "--deadline is a number of seconds above 0"),
        (("--model", "other"), "is no directory of an adapter"),
        (("--dtype", "float3"), "float3"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(words, word):
    assert word in said("bundled:none-of-these", "--port", 0, *words)


def test_a_directory_of_adapters_is_named_and_is_one(folder):
    """An adapter itself in its place would be served as nothing; one without the option was a usage error."""
    base, place = folder / "tiny-llama", folder / "adapters"
    held = f"--adapters {place}"
    assert f"{place / 'own'} is an adapter itself" in (told := said(base, "--port", 0, "--adapters", place / "own"))
    assert held in told
    assert f"undula serve {base} {held}" in said(base, place, "--port", 0)
    assert f"undula serve {base} {held}" in said(base, place / "own", "--port", 0)
    assert f"undula serve BASE {held}" in said(place / "own", place / "own", "--port", 0)
    config = place / "own" / "adapter_config.json"
    assert "is a file" in said(base, "--port", 0, "--adapters", config)


def test_a_cache_that_holds_nothing_is_the_caches_fault(folder):
    assert "the cache (--cache) has no room for 8 tokens" in said(folder / "tiny-llama", "--port", 0, "--cache", "1KB")


def test_a_server_without_adapters_says_so(folder, tmp_path, monkeypatch):
    """And why each was left out, with its place once; a name is shown as it is (`a:b:` was a picture)."""
    monkeypatch.setattr("undula.serve.server.running.serve", lambda served, *_: served.worker.stop() or True)
    base, other = folder / "tiny-llama", tmp_path / "a:b:"
    assert "--adapters DIR names a directory that holds some" in beside(base)
    shutil.copytree(folder / "adapters" / "own", other)
    shutil.copytree(folder / "adapters" / "own", tmp_path / "own")
    config = tmp_path / "own" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "another/base"))
    told = beside(base, "--adapters", tmp_path)
    assert f"left out: {other}: 'a:b:' is no name" in told
    assert f"left out: {tmp_path / 'own'}: says that it is for 'another/base'" in told
    assert "--base-also" in told
    assert f"there is none that can be in {tmp_path}" in told


def beside(*words):
    """What `undula serve ...` says on the error stream, where it serves."""
    done = CliRunner().invoke(app, ["serve", *map(str, words), "--port", "0"], catch_exceptions=False)
    assert done.exit_code == 0, (done.stdout, done.stderr)
    return " ".join(done.stderr.split())


def test_keys_of_the_environment_are_keys_too():
    """With them the network may ask; and to say that there are none contradicts them."""
    env = {"UNDULA_KEYS": KEY}
    assert "say one of the two" in said("x", "--no-keys", env=env)
    assert "there is no directory nowhere" in said(
        "x", "--host", "0.0.0.0", "--port", 0, "--adapters", "nowhere", env=env
    )
    assert "UNDULA_KEYS" in (refused := said("x", env={"UNDULA_KEYS": "guess"}))
    assert "guess" not in refused.replace("guesses", "")


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in said("x", "--port", taken.getsockname()[1])


def test_a_base_is_a_model_or_what_one_adapter_says(folder):
    """A directory of adapters is neither, and what is meant is told with the base that they say."""
    base, own = str(folder / "tiny-llama"), folder / "adapters" / "own"
    assert meant(base).base == base
    assert meant("bundled:smollm2").adapter is None
    assert (meant(str(own)).base, meant(str(own)).adapter) == (base, own)
    assert meant(str(own), "other").base == "other"
    with pytest.raises(ValueError, match=re.escape(f"undula serve {base} --adapters {folder / 'adapters'}")):
        meant(str(folder / "adapters"))


def test_a_base_is_called_by_its_name_and_never_by_its_path(folder):
    assert names_of(str(folder / "tiny-llama"), None) == ("tiny-llama",)
    assert names_of("bundled:smollm2", None)[:2] == ("smollm2", "bundled:smollm2")
    assert names_of("someone/a-model", "mine") == ("mine", "someone/a-model")


def test_what_is_no_language_model_and_no_encoder_is_refused(tmp_path):
    assert "an encoder and a decoder in one" in said(tiny.t5(tmp_path / "t5"), "--port", 0)


def test_what_was_to_be_pinned_has_to_be_there(folder, tmp_path):
    base = folder / "tiny-llama"
    assert "--pin names other" in said(base, "--port", 0, "--pin", "other", "--adapters", folder / "adapters")
    shutil.copytree(folder / "adapters" / "own", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "cut" in said(base, "--port", 0, "--pin", "cut", "--adapters", tmp_path)


def test_the_address_that_is_told_takes_requests(folder, monkeypatch):
    """Who reads it in a script asks at once, before the server has begun: the request waits and is not turned away."""
    taken = []

    def told(served, count, plan, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5):
            taken.append(url)

    monkeypatch.setattr("undula.cli.serving.tell", told)
    monkeypatch.setattr("undula.serve.server.running.serve", lambda served, *_: served.worker.stop() or True)
    beside(folder / "adapters" / "own")
    assert taken


def test_a_whole_life_ends_by_sigterm_with_the_running_answer_whole(python, folder):
    """One adapter's directory is enough to serve it; a stream that runs when the signal comes is finished, a request
    that comes later is refused, and the process ends with 0."""
    command = [
        python,
        "-m",
        "undula",
        "serve",
        str(folder / "adapters" / "own"),
        "--port",
        "0",
        "--cache",
        "8MB",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    clock = threading.Timer(60, process.kill)
    clock.start()
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        url = re.search(r"(http://\S+)/v1 ", lines[1])[1]
        asked = re.search(r"--json '(.*)'", lines[2])[1]
        assert "tiny-llama: 1 adapter registered" in lines[0]
        with (
            httpx.Client(base_url=url, timeout=30, verify=False) as client,
            httpx.Client(base_url=url, timeout=30, verify=False) as other,
        ):
            headers = {"Content-Type": "application/json"}
            assert client.post("/v1/chat/completions", content=asked, headers=headers).status_code == 200
            said = {"model": "own", "prompt": "the", "max_tokens": 150, "ignore_eos": True, "stream": True,
                    "stream_options": {"include_usage": True}}  # fmt: skip
            other.get("/health")
            with client.stream("POST", "/v1/completions", json=said) as reply:
                stream = reply.iter_lines()
                next(stream)
                process.send_signal(signal.SIGTERM)
                while other.get("/ready").status_code == 200:
                    time.sleep(0.02)
                assert other.post("/v1/completions", json=said).status_code == 503
                rest = [line for line in stream if line]
        assert rest[-1] == "data: [DONE]"
        assert '"completion_tokens":150' in rest[-2]
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "Stopped: every request has its answer" in out
        assert "Traceback" not in err
    finally:
        clock.cancel()
        process.kill()
        process.wait()
