"""Two replicas of the server behind a local Ray Serve: requests go where their adapter is."""

import collections
import json
import shutil
import socket

import pytest

from tests.support import tiny
from tests.support.encoders import drawn

serve = pytest.importorskip("ray.serve")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """(address, directory of adapters, handle of the front) of two replicas."""
    import ray
    import torch

    from undula.serve.ray import deployment
    from undula.train import CausalLM, Plain

    root = tmp_path_factory.mktemp("ray")
    base, place = tiny.llama(root / "tiny"), root / "adapters"
    place.mkdir()
    for i, name in enumerate(("red", "green", "blue")):
        drawn(place / name, base, CausalLM(format=Plain(), generate=0), seed=i, dtype=torch.float32, where=["q_proj"])
    (root / "later").mkdir()
    shutil.move(place / "blue", root / "later" / "blue")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False,
             object_store_memory=100 * 2**20)  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    handle = serve.run(deployment(base, [place], replicas=2, cpus=0.5, memory=10**7), route_prefix="/")
    yield f"http://127.0.0.1:{port}", place, handle
    serve.shutdown()
    ray.shutdown()


def ask(url, name, **more):
    import httpx

    asked = {"model": name, "prompt": "the film was", "max_tokens": 5, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/completions", json=asked, timeout=60)


def alone(path):
    import undula

    return undula.load(path).generate("the film was", max_new_tokens=5, raw=True)


def test_each_adapter_has_its_replica_and_its_own_answers(house):
    """Whatever it is asked beside; the base alone may be asked of any."""
    url, place, handle = house
    at = collections.defaultdict(set)
    for _ in range(6):
        for name in ("red", "green"):
            found = ask(url, name)
            assert found.status_code == 200, found.text
            assert found.json()["choices"][0]["text"].strip() == alone(place / name).strip()
            at[name].add(found.headers["x-undula-replica"])
        assert ask(url, "tiny").status_code == 200
    assert len(at["red"]) == len(at["green"]) == 1
    assert at["red"] != at["green"]
    states = {state["replica"]: state for state in handle.states.remote().result()}
    for name, (replica,) in at.items():
        assert states[replica]["adapters"] == [name]
    assert sum(state["requests"] for state in states.values()) == 18


def test_a_stream_comes_in_pieces(house):
    url, place, _ = house
    lines = [line for line in ask(url, "red", stream=True).text.splitlines() if line.startswith("data: {")]
    pieces = [choice["text"] for line in lines for choice in json.loads(line[6:])["choices"]]
    assert len(pieces) > 1
    assert "".join(pieces).strip() == alone(place / "red").strip()


def test_adapters_come_change_and_go_with_their_directories(house):
    url, place, _ = house
    assert ask(url, "blue").status_code == 404
    shutil.move(place.parent / "later" / "blue", place / "blue")
    first = ask(url, "blue").json()["choices"][0]["text"]
    assert first.strip() == alone(place / "blue").strip()
    shutil.rmtree(place / "blue")
    assert ask(url, "blue").status_code == 404
    shutil.copytree(place / "green", place / "blue")
    assert ask(url, "blue").json()["choices"][0]["text"].strip() == alone(place / "green").strip()
    import httpx

    refused = httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "blue"})
    assert refused.status_code == 400
    assert "directories" in refused.json()["error"]["message"]


def test_what_is_wrong_is_said_by_the_server_behind(house):
    import httpx

    url, _, _ = house
    assert ask(url, "../red").status_code == 404
    assert ask(url, "red", max_tokens=0).status_code == 400
    assert (
        httpx.post(f"{url}/v1/completions", content=b"{", headers={"Content-Type": "application/json"}).status_code
        == 400
    )
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/nothing").status_code == 404
    assert {m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]} >= {"tiny", "red", "green"}
