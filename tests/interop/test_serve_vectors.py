"""The server over an encoder: embeddings and labels, each through its adapter and by its adapter's head."""

import base64
import struct
import threading

import httpx
import openai
import pytest
import torch

import undula
from undula.serve.request import Part
from undula.serve.server.opening import Plan, opened
from undula.serve.server.places import Places
from undula.serve.server.running import LOOPBACK, address, bound, in_background
from undula.train import Classification

from ..support import tiny
from ..support.encoders import drawn

TEXTS = ["the film was good", "awful food and a sad place"]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """(what is served, its address, {name: what `undula predict` says of TEXTS})."""
    root = tmp_path_factory.mktemp("vectors")
    base, alone = tiny.bert(root / "tiny-bert"), {}
    for i, (name, labels) in enumerate({"moods": ("bad", "good"), "three": ("a", "b", "c")}.items()):
        drawn(root / "adapters" / name, base, Classification(names=labels), seed=i)
        alone[name] = undula.load(root / "adapters" / name).predict(TEXTS)
    plan = Plan(base, Places.of((root / "adapters",)), memory=10**7, hosts=LOOPBACK, dtype=torch.float64)
    left = []
    served, count = opened(plan, left.append)
    assert (count, left) == (2, [])
    listening = bound("127.0.0.1", 0)
    with in_background(served, listening):
        yield served, address(listening), alone


@pytest.fixture(scope="module")
def client(house):
    return openai.OpenAI(base_url=f"{house[1]}/v1", api_key="-", max_retries=0)


@pytest.fixture(scope="module")
def plain(house):
    with httpx.Client(base_url=house[1], timeout=20, verify=False) as opened:
        yield opened


def same(found, expected):
    return found["label"] == expected["label"] and found["probability"] == pytest.approx(expected["probability"])


@pytest.mark.parametrize("name", ["moods", "three"])
def test_labels_are_those_of_undula_predict(house, plain, name):
    """With the probability of every class, by name and in vLLM's list."""
    reply = plain.post("/classify", json={"model": name, "input": TEXTS}).json()
    assert all(same(found, expected) for found, expected in zip(reply["data"], house[2][name], strict=True))
    for one in reply["data"]:
        assert one["num_classes"] == len(one["probs"]) == len(one["probabilities"])
        assert sum(one["probs"]) == pytest.approx(1)
        assert max(one["probs"]) == one["probability"]
    assert reply["usage"]["prompt_tokens"] == sum(len(text.split()) + 2 for text in TEXTS)


def test_labels_of_several_adapters_at_once_keep_to_their_own_heads(house, plain):
    wrong = []

    def ask(name):
        for _ in range(4):
            found = plain.post("/classify", json={"model": name, "input": TEXTS}).json()["data"]
            if not all(same(one, expected) for one, expected in zip(found, house[2][name], strict=True)):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("moods", "three") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_embeddings_come_as_numbers_and_as_base64(house, client, plain):
    """The client asks for base64 by itself; through another adapter the vectors are others; tokens are what texts come
    to."""
    found = [e.embedding for e in client.embeddings.create(model="tiny-bert", input=TEXTS).data]
    expected = house[0].encoder.embed(TEXTS)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    numbers = plain.post("/v1/embeddings", json={"model": "tiny-bert", "input": TEXTS[0]}).json()
    assert numbers["data"][0]["embedding"] == pytest.approx(expected[0])
    coded = plain.post("/v1/embeddings", json={"model": "moods", "input": TEXTS[0], "encoding_format": "base64"})
    raw = base64.b64decode(coded.json()["data"][0]["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(
        house[0].encoder.embed(TEXTS[:1], (Part("moods"),))[0]
    )
    assert coded.json()["data"][0]["embedding"] != numbers["data"][0]["embedding"]
    ids = house[0].encoder.tokens(TEXTS)
    same_ = plain.post("/v1/embeddings", json={"model": "tiny-bert", "input": ids}).json()
    assert same_["data"][1]["embedding"] == pytest.approx(expected[1])
    assert same_["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "word"),
    [
        ("/v1/completions", {"model": "moods", "prompt": "the"}, 400, "model", "encoder"),
        ("/v1/chat/completions", {"model": "moods", "messages": [{"role": "user", "content": "a"}]}, 400, "model",
         "encoder"),
        ("/classify", {"model": "tiny-bert", "input": "the"}, 400, None, "what is asked has no head"),
        ("/classify", {"model": "none", "input": "the"}, 404, "model", "none"),
        ("/classify", {"model": "moods", "input": [[1, 2]]}, 400, "input", "pairs"),
        ("/classify", {"model": "moods", "input": []}, 400, "input", "empty"),
        ("/classify", {"model": "moods", "input": ["a"] * 257}, 400, "input", "256"),
        ("/classify", {"model": "moods", "input": "the", "softmax": False}, 400, "softmax", "leave it out"),
        ("/v1/embeddings", {"model": "tiny-bert", "input": ""}, 400, "input", "empty"),
        ("/v1/embeddings", {"model": "tiny-bert", "input": "good " * 60}, 400, None, "tokens"),
        ("/v1/embeddings", {"model": "tiny-bert", "input": "the", "dimensions": 3}, 400, "dimensions", "32"),
        ("/v1/embeddings", {"model": "tiny-bert", "input": "the", "encoding_format": "int8"}, 400, "encoding_format",
         "float"),
    ],
)  # fmt: skip
def test_what_an_encoder_cannot_do_is_refused_by_name(plain, path, body, status, param, word):
    reply = plain.post(path, json=body)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param
    assert word in reply.json()["error"]["message"]


def test_the_page_and_the_metrics_have_an_encoders_figures(plain):
    plain.post("/classify", json={"model": "moods", "input": "the"})
    assert plain.get("/status.json").json()["engine"]["rows"] >= 1
    assert 'undula_adapter_requests_total{adapter="moods"}' in plain.get("/metrics").text
    assert plain.get("/ready").status_code == 200
