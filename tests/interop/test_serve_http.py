"""The server as clients meet it: the real `openai` client, streaming included, and plain HTTP for what is refused."""

import asyncio
import json
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch

import undula
from undula.serve.engine import Limits
from undula.serve.request import Broken, Busy, Cancelled, Chosen, Failed, Late, Part, Piece, Refused, Request, Sampling
from undula.serve.server import texts
from undula.serve.server.errors import ADDRESSES
from undula.serve.server.keys import keys_of
from undula.serve.server.opening import Plan, opened
from undula.serve.server.places import Places
from undula.serve.server.running import LOOPBACK, address, bound, in_background
from undula.train import CausalLM, Chat, Plain, Run

from ..support import tiny
from ..support.numbers import shake

ASKED = "the film was very good and the food was"
TALK = [{"role": "user", "content": ASKED}]
NEW = 12


def adapter(base, path, seed, method=None):
    """A random adapter of a base, in `path`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    made = undula.attach(model, undula.LoRA(r=2) if method is None else method, ["q_proj", "v_proj"])
    shake(made.parameters(), 0.5)
    undula.detach(model).save(path)


FORMS = {"polite": Chat("very ", "nice", "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"),
         "terse": Plain("very ", " is")}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with adapters in directories, among them broken ones."""
    root = tmp_path_factory.mktemp("serve")
    base, place = tiny.llama(root / "tiny-llama", chat=True), root / "adapters"
    for i, name in enumerate(("red", "green", "blue")):
        adapter(base, place / name, i)
    adapter(base, place / "bent", 3, undula.AuroRA(r=2))
    for name, form in FORMS.items():
        shutil.copytree(place / "red", place / name)
        Run(base, "", CausalLM(format=form), undula.LoRA(r=2), place / name).save(None)
    (place / "broken").mkdir()
    (place / "broken" / "adapter_config.json").write_text("{")
    adapter(base, root / "elsewhere", 4)
    (place / "link").symlink_to(root / "elsewhere")
    return root


def made(folder, **more):
    """What is served of it, and what was left out."""
    left = []
    plan = Plan(
        str(folder / "tiny-llama"), Places.of((folder / "adapters",)), memory=10**7, hosts=LOOPBACK,
        limits=Limits(running=8, cache=2**22), **more,
    )  # fmt: skip
    served, _ = opened(plan, left.append)
    return served, left


@pytest.fixture(scope="module")
def house(folder):
    """(what is served, its address)."""
    served, left = made(folder)
    assert sorted(Path(text.split(": ")[1]).name for text in left) == ["broken", "link"]
    listening = bound("127.0.0.1", 0)
    with in_background(served, listening):
        yield served, address(listening)


@pytest.fixture(scope="module")
def client(house):
    return openai.OpenAI(base_url=f"{house[1]}/v1", api_key="-", max_retries=0)


@pytest.fixture(scope="module")
def plain(house):
    with httpx.Client(base_url=house[1], timeout=20, verify=False) as opened:
        yield opened


def alone(served, prompt, parts=(), **how):
    """What the engine itself writes."""
    ids = served.engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    sampling = Sampling(max_tokens=NEW, ignore_eos=True, **how)
    return served.engine.submit(Request(tuple(ids), tuple(parts), sampling)).text()


MEANT = {
    "tiny-llama": (),
    "red": (Part("red"),),
    "tiny-llama:green": (Part("green"),),
    "bent": (Part("bent"),),
}


@pytest.mark.parametrize("model", MEANT)
def test_the_openai_client_gets_what_the_adapter_that_it_names_writes(house, client, model):
    """Whole and streamed, with the tokens counted."""
    said = {"model": model, "prompt": ASKED, "max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**said)
    expected = alone(house[0], ASKED, MEANT[model])
    assert whole.choices[0].text == expected
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", NEW)
    assert whole.usage.prompt_tokens == 9
    chunks = list(client.completions.create(**said, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected
    assert chunks[-1].usage.total_tokens == NEW + 9


def test_every_adapter_answers_otherwise(house):
    """Else none of these tests could tell one from another."""
    assert len({alone(house[0], ASKED, parts) for parts in MEANT.values()}) == len(MEANT)


def test_weights_of_several_adapters_count(house, client):
    parts = (Part("red", 0.5), Part("green", -2.0))
    found = client.completions.create(
        model="tiny-llama", prompt=ASKED, max_tokens=NEW, temperature=0,
        extra_body={"ignore_eos": True, "adapters": [{"name": p.name, "scale": p.scale} for p in parts]},
    )  # fmt: skip
    assert found.choices[0].text == alone(house[0], ASKED, parts)


def test_a_chat_is_put_in_the_template_and_streams_to_the_same_answer(house, client):
    """With n answers, each drawn by a seed of its own, and the probabilities of tokens."""
    said = {"model": "red", "messages": [{"role": "system", "content": "very"}, *TALK], "max_completion_tokens": NEW,
            "temperature": 1.5, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2}  # fmt: skip
    whole = client.chat.completions.create(**said)
    texts = [c.message.content for c in whole.choices]
    assert len(set(texts)) == 2
    for choice in whole.choices:
        assert len(choice.logprobs.content) > 1
        for one in choice.logprobs.content:
            assert len(one.top_logprobs) == 2
            assert bytes(one.bytes).decode() == one.token
            assert one.top_logprobs[0].logprob >= one.logprob - 1e-6
    chunks = list(client.chat.completions.create(**said, stream=True))
    assert {c.choices[0].index for c in chunks} == {0, 1}
    for i, text in enumerate(texts):
        own = [c.choices[0] for c in chunks if c.choices[0].index == i]
        assert "".join(c.delta.content or "" for c in own) == text
        assert own[0].delta.role == "assistant"
        assert own[-1].finish_reason in ("stop", "length")
    template = "[CLS] very [SEP] [CLS] " + ASKED + " [SEP] "
    ids = house[0].engine.tokenizer(template, add_special_tokens=False)["input_ids"]
    assert whole.usage.prompt_tokens == len(ids)


def test_an_adapter_is_talked_to_as_it_was_trained_to_be(client, plain):
    """In its own template, with what the system said and what went before each prompt in its training; what never saw
    turns says what to ask instead.  It is the same adapter under three names, so that nothing else differs."""
    said = {"max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}
    found = client.chat.completions.create(model="polite", messages=TALK, **said).choices[0].message.content
    prompt = f"system nice user very {ASKED} "
    assert found == client.completions.create(model="red", prompt=prompt, **said).choices[0].text
    assert found != client.chat.completions.create(model="red", messages=TALK, **said).choices[0].message.content
    reply = plain.post("/v1/chat/completions", json={"model": "terse", "messages": TALK})
    assert reply.status_code == 400
    assert "'very ' + TEXT + ' is'" in reply.json()["error"]["message"]


def test_a_chat_with_an_adapter_that_is_exchanged_meanwhile_is_put_as_the_new_one_wants_it(house, client, monkeypatch):
    """Between the template and the engine, where nobody else waits for either."""
    served, place = house[0], house[0].places.roots[0]
    served.shelf.register("swapped", place / "red")
    talk, put = texts.talk, []

    def slow(messages, tokenizer, manner):
        put.append(manner)
        ids = talk(messages, tokenizer, manner)
        if len(put) == 1:
            served.shelf.register("swapped", place / "polite", replace=True)
        return ids

    said = {"messages": TALK, "max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}
    monkeypatch.setattr(texts, "talk", slow)
    found = client.chat.completions.create(model="swapped", **said).choices[0].message.content
    assert [manner.system for manner in put] == ["", "nice"]
    assert found == client.chat.completions.create(model="polite", **said).choices[0].message.content
    served.shelf.unregister("swapped")


def test_lists_of_prompts_are_answered_in_their_order(client, plain):
    """Texts and tokens; `echo` puts the prompt before."""
    ids = plain.post("/tokenize", json={"prompt": ASKED}).json()["tokens"]
    said = {"model": "red", "max_tokens": NEW, "temperature": 0}
    one = client.completions.create(prompt=ASKED, **said).choices[0].text
    other = client.completions.create(prompt="bad food", **said).choices[0].text
    both = client.completions.create(prompt=["bad food", ASKED], **said)
    assert [c.text for c in both.choices] == [other, one]
    assert client.completions.create(prompt=[ids, ids], n=2, **said).choices[3].text == one
    assert client.completions.create(prompt=ASKED, echo=True, **said).choices[0].text == ASKED + one


def test_stop_texts_biases_and_probabilities_reach_the_engine(house, client):
    said = {"model": "red", "prompt": ASKED, "max_tokens": NEW, "temperature": 0}
    text = client.completions.create(**said, extra_body={"ignore_eos": True}).choices[0].text
    word = text.split()[2]
    cut = client.completions.create(**said, stop=word, extra_body={"ignore_eos": True}).choices[0]
    assert cut.text == text[: text.index(word)]
    assert cut.finish_reason == "stop"
    number = house[0].engine.tokenizer.convert_tokens_to_ids("happy")
    always = client.completions.create(**said, logit_bias={str(number): 100}, logprobs=1)
    assert set(always.choices[0].text.split()) == {"happy"}
    told = always.choices[0].logprobs
    assert told.tokens == ["happy"] * NEW
    assert all(len(top) == 1 for top in told.top_logprobs)
    assert all(p < 0 for p in told.token_logprobs)  # of the model, before the bias


def test_models_are_told_with_their_parent(client):
    found = {m.id: m for m in client.models.list()}
    assert set(found) == {"tiny-llama", "red", "green", "blue", "bent", *FORMS}
    assert found["red"].parent == "tiny-llama"
    assert found["tiny-llama"].parent is None
    assert client.models.retrieve("blue").id == "blue"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("yellow")


def test_clients_at_once_get_each_their_own_adapter(house, client):
    """Many threads, every model, all at a time."""
    expected = {model: alone(house[0], ASKED, parts) for model, parts in MEANT.items()}
    wrong = []

    def ask(model):
        for _ in range(3):
            found = client.completions.create(
                model=model, prompt=ASKED, max_tokens=NEW, temperature=0, extra_body={"ignore_eos": True}
            )
            if found.choices[0].text != expected[model]:
                wrong.append((model, found.choices[0].text))

    threads = [threading.Thread(target=ask, args=(model,)) for model in MEANT for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


ASK = {"model": "red", "prompt": "the", "max_tokens": 1}
LONG = {"model": "red", "prompt": "the", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}
CHAT = {"model": "red", "messages": TALK, "max_tokens": 1}
REFUSED = [
    ("completions", ASK | {"model": "yellow"}, 404, "model", "yellow"),
    ("completions", ASK | {"model": "tiny-llama:yellow"}, 404, "model", "yellow"),
    ("completions", ASK | {"model": "../red"}, 404, "model", "no model"),
    ("completions", {"prompt": "the"}, 400, "model", "missing"),
    ("completions", ASK | {"max_tokens": 0}, 400, "max_tokens", "1"),
    ("completions", ASK | {"max_tokens": "7"}, 400, "max_tokens", "integer"),
    ("completions", ASK | {"max_tokens": 5000}, 400, "max_tokens", "4096"),
    ("completions", ASK | {"max_tokens": 3000}, 400, "prompt", "2048"),
    ("completions", ASK | {"temperature": 3}, 400, "temperature", "2"),
    ("completions", ASK | {"top_p": 0}, 400, "top_p", "0"),
    ("completions", ASK | {"best_of": 3}, 400, "best_of", "leave it out"),
    ("completions", ASK | {"suffix": "end"}, 400, "suffix", "leave it out"),
    ("completions", ASK | {"max_token": 3}, 400, "max_token", "max_tokens"),
    ("completions", ASK | {"guided_json": {}}, 400, "guided_json", "leave it out"),
    ("completions", ASK | {"echo": True, "logprobs": 1}, 400, "echo", "logprobs"),
    ("completions", ASK | {"logit_bias": {"999": 1}}, 400, "logit_bias", "tokens are 0"),
    ("completions", ASK | {"logit_bias": {"x": 1}}, 400, "logit_bias", "tokens are 0"),
    ("completions", ASK | {"stop": [""]}, 400, "stop", "empty"),
    ("completions", ASK | {"prompt": ""}, 400, "prompt", "empty"),
    ("completions", ASK | {"prompt": []}, 400, "prompt", "empty"),
    ("completions", ASK | {"prompt": {"a": 1}}, 400, "prompt", "list"),
    ("completions", ASK | {"prompt": [1, "a"]}, 400, "prompt", "list"),
    ("completions", ASK | {"prompt": [10**30]}, 400, "prompt", "tokens 0"),
    ("completions", ASK | {"prompt": ["a"] * 65}, 400, "prompt", "64"),
    ("completions", ASK | {"n": 65}, 400, "n", "64"),
    ("completions", ASK | {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    ("completions", ASK | {"adapters": [{"name": "red"}]}, 400, "adapters", "tiny-llama"),
    ("completions", ASK | {"model": "tiny-llama", "adapters": [{"name": "red"}] * 2}, 400, "adapters", "twice"),
    ("completions", ASK | {"model": "tiny-llama", "adapters": [{"name": "no"}]}, 404, "model", "no"),
    ("completions", ASK | {"model": "tiny-llama", "adapters": [{"name": "bent", "scale": 2}]}, 400, None, "bent"),
    ("completions", ASK | {"model": "tiny-llama", "adapters": ["red"]}, 400, "adapters.0",
     'has to be an object (found \'red\'): it is as [{"name"'),
    ("completions", ASK | {"model": "tiny-llama", "adapters": {"red": 1}}, 400, "adapters", "has to be a list"),
    ("completions", ASK | {"model": "tiny-llama", "adapters": [{"name": "red", "weight": 1}]}, 400,
     "adapters.0.weight", 'no field that is known here: it is as [{"name": "NAME", "scale": 1.0}]'),
    ("completions", ASK | {"stop": list("abcdefghijklmnopqrstuvwxyz")}, 400, "stop", "has to have at most 16 items"),
    ("completions", {"model": "red", "messages": TALK}, 400, "prompt", "messages is asked at /v1/chat/completions"),
    ("chat/completions", ASK, 400, "messages", "prompt is asked at /v1/completions"),
    ("chat/completions", CHAT | {"tools": [{}]}, 400, "tools", "leave it out"),
    ("chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format", "text"),
    ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    ("chat/completions", CHAT | {"max_completion_tokens": 9}, 400, "max_completion_tokens", "two things"),
    ("chat/completions", CHAT | {"messages": []}, 400, "messages", "least 1"),
    ("chat/completions", CHAT | {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "tools"),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages.0.content", "text alone"),
    ("chat/completions", CHAT | {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, 400,
     "messages.0", "tool_calls"),
    ("embeddings", {"model": "red", "input": "the"}, 400, "model", "language model"),
    ("load_lora_adapter", {"lora_name": "a/b"}, 400, "lora_name", "no name"),
    ("load_lora_adapter", {"lora_name": "tiny-llama"}, 400, "lora_name", "base's name"),
    ("load_lora_adapter", {"lora_name": "red"}, 409, "lora_name", "load_inplace"),
    ("load_lora_adapter", {"lora_name": "x", "lora_path": "../elsewhere"}, 404, "lora_path", "--adapters"),
    ("load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 404, "lora_path", "--adapters"),
    ("load_lora_adapter", {"lora_name": "x", "lora_path": "link"}, 404, "lora_path", "--adapters"),
    ("load_lora_adapter", {"lora_name": "x", "lora_path": "a\0b"}, 400, "lora_path", "character"),
    ("load_lora_adapter", {"lora_name": "broken"}, 400, "lora_path", "cannot be served"),
    ("unload_lora_adapter", {"lora_name": "yellow"}, 404, "lora_name", "yellow"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "word"), REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(folder, plain, path, body, status, param, word):
    """In OpenAI's shape, with no path of this machine in it."""
    reply = plain.post(f"/v1/{path}", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"
    assert str(folder) not in reply.text
    assert "Traceback" not in reply.text


@pytest.mark.parametrize(
    ("content", "headers", "status", "word"),
    [
        (b"{" + b" " * (3 << 20) + b"}", {}, 413, "bytes"),
        ((b" " * (1 << 20) for _ in range(3)), {}, 413, "bytes"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "application/json"),
        (b"{}", {"Content-Encoding": "gzip"}, 415, "compressed"),
        (b"[1]", {}, 400, "object"),
        (b"{", {}, 400, "no JSON"),
        (b"\xff", {}, 400, "no JSON"),
        (b'{"model": "red", "prompt": "the", "temperature": NaN}', {}, 400, "NaN"),
        (b'{"model": "red", "prompt": "the", "prompt": "a"}', {}, 400, "twice"),
        (b'{"model": "red", "prompt": "\\ud800"}', {}, 400, "no JSON"),
        (b"[" * 100000, {}, 400, "deep"),
        (b'{"user": ' + b"[" * 100000 + b"]" * 100000 + b"}", {}, 400, "deep"),
    ],
)
def test_bodies_that_are_none_are_refused_before_they_cost_anything(plain, content, headers, status, word):
    reply = plain.post("/v1/completions", content=content, headers={"Content-Type": "application/json"} | headers)
    assert (reply.status_code, word in reply.json()["error"]["message"]) == (status, True), reply.text


def test_a_page_of_another_site_cannot_ask_a_server_without_keys(plain):
    """Its name may lead to this address; and what a browser sends unasked is no JSON."""
    assert plain.get("/v1/models", headers={"Host": "evil.example:8000"}).status_code == 403
    assert plain.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    assert "access-control-allow-origin" not in plain.get("/v1/models", headers={"Origin": "http://a.b"}).headers


ADDRESSED = [  # (what is asked, what is said of it)
    ("/chat/completions", "/v1/chat/completions is (the base_url"),
    ("/v1/v1/completions", "/v1/completions is"),
    ("/models/", "/v1/models is"),
    ("/v1/classify", "/classify is"),
    ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
    ("/v1/responses", "there are /v1/chat/completions, /v1/completions, "),
]


@pytest.mark.parametrize(("asked", "word"), ADDRESSED)
def test_an_address_that_is_none_is_told_with_the_one_that_is(plain, asked, word):
    """A base_url without /v1 is the first mistake of all."""
    reply = plain.post(asked, json={})
    assert reply.status_code == 404
    assert f"nothing is served at {asked}: {word}" in reply.json()["error"]["message"]


def test_the_addresses_that_are_told_are_those_that_are_served(plain):
    """The list in messages is the server's."""
    for place in ADDRESSES:
        assert {plain.get(place).status_code, plain.post(place).status_code} & {200, 415}, place
    reply = plain.get("/v1/chat/completions")
    assert reply.json()["error"]["message"] == "/v1/chat/completions does not take GET: it takes POST"


def test_a_name_that_is_none_is_told_with_those_that_are(plain):
    """All of a few; nothing of a key where there is none."""
    said = plain.post("/v1/completions", json=ASK | {"model": "rad"}).json()["error"]["message"]
    assert said.startswith("no model is called 'rad' here; ")
    assert "red" in said.partition(";")[2]


def test_harmless_fields_are_taken(client):
    """And those of OpenAI's that ask for nothing."""
    client.chat.completions.create(
        **CHAT, user="me", metadata={"a": "b"}, store=False, service_tier="auto", tool_choice="none", seed=None,
        response_format={"type": "text"}, parallel_tool_calls=False,
    )  # fmt: skip


def test_a_model_without_a_chat_template_says_what_to_ask(house, plain, monkeypatch):
    monkeypatch.setattr(house[0].engine.tokenizer, "chat_template", None)
    error = plain.post("/v1/chat/completions", json=CHAT).json()["error"]
    assert error["code"] == "no_chat_template"
    assert "/v1/completions" in error["message"]


def test_adapters_come_are_replaced_and_go_while_it_serves(house, folder, client, plain):
    """`load_inplace` reads what now lies there: from then on the answers are the new one's."""
    served, place = house[0], folder / "adapters"
    said = {"model": "late", "prompt": ASKED, "max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**said)
    shutil.copytree(place / "red", place / "late")
    try:
        assert plain.post("/v1/load_lora_adapter", json={"lora_name": "late", "lora_path": "late"}).status_code == 200
        assert client.completions.create(**said).choices[0].text == alone(served, ASKED, (Part("red"),))
        shutil.rmtree(place / "late")
        shutil.copytree(place / "green", place / "late")
        again = plain.post("/v1/load_lora_adapter", json={"lora_name": "late", "load_inplace": True})
        assert again.status_code == 200, again.text
        assert client.completions.create(**said).choices[0].text == alone(served, ASKED, (Part("green"),))
        assert plain.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**said)
    finally:
        shutil.rmtree(place / "late")


@pytest.mark.parametrize(
    ("error", "status", "kind", "after"),
    [
        (Busy("full", 2.5), 429, "rate_limit_error", "3"),
        (Late("late", 0.2), 503, "server_error", "1"),
        (Refused("no, for /home/me/x.bin"), 400, "invalid_request_error", None),
        (Broken("a damaged file"), 424, "invalid_request_error", None),
        (Cancelled("stopped"), 503, "server_error", None),
        (Failed("a step failed"), 500, "server_error", None),
        (RuntimeError("secret /home/me"), 500, "server_error", None),
    ],
)
def test_what_the_engine_refuses_has_its_status_and_says_no_more_than_it_may(
    house, plain, monkeypatch, error, status, kind, after
):
    def submit(request):
        raise error

    monkeypatch.setattr(house[0].engine, "submit", submit)
    for stream in (True, False):
        reply = plain.post("/v1/completions", json=ASK | {"stream": stream})
        assert reply.status_code == status
        assert reply.json()["error"]["type"] == kind
        assert reply.headers.get("retry-after") == after
        assert "/home" not in reply.text
        assert "secret" not in reply.text


def test_an_answer_that_breaks_off_says_so_inside_its_stream(house, client, monkeypatch):
    """A client that reads to the end cannot take half an answer for a whole one; answers beside it are cancelled."""
    gone = []

    class Half:
        usage, request = None, Request((1,))

        def __init__(self, at):
            self.at = at

        def cancel(self):
            gone.append(self.at)

        async def __aiter__(self):
            yield Piece("half")
            if self.at == 0:
                raise Failed("a step failed")
            await asyncio.sleep(60)

    made = []
    monkeypatch.setattr(house[0].engine, "submit", lambda request: made.append(Half(len(made))) or made[-1])
    with pytest.raises(openai.APIError, match="a step failed"):
        list(client.completions.create(**ASK, n=2, stream=True))
    end = time.monotonic() + 5
    while set(gone) != {0, 1}:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_request_that_is_taken_in_half_is_not_taken_at_all(house, plain, monkeypatch):
    """Of n answers the engine takes one and is then full: that one is cancelled, for nobody waits for it."""
    taken, submit = [], house[0].engine.submit

    def once(request):
        if taken:
            raise Busy("full", 1)
        taken.append(submit(request))
        return taken[-1]

    monkeypatch.setattr(house[0].engine, "submit", once)
    assert plain.post("/v1/completions", json=LONG | {"n": 2}).status_code == 429
    with pytest.raises(Cancelled):
        taken[0].text()


def test_health_tells_of_a_dead_engine(house, plain, monkeypatch):
    monkeypatch.setattr(type(house[0].engine), "alive", False)
    assert plain.get("/health").status_code == plain.get("/ready").status_code == 503


def test_an_adapter_that_is_damaged_while_it_serves_answers_for_itself_alone(folder, client, plain):
    """The others go on; nothing is told of where it lies."""
    place = folder / "adapters" / "late"
    shutil.copytree(folder / "adapters" / "red", place)
    try:
        assert plain.post("/v1/load_lora_adapter", json={"lora_name": "late"}).status_code == 200
        (place / "adapter_model.safetensors").write_bytes(b"\xff" * 300)
        reply = plain.post("/v1/completions", json=ASK | {"model": "late"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (424, "adapter_failed")
        assert str(folder) not in reply.text
        assert client.completions.create(**ASK).choices
        assert plain.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
    finally:
        shutil.rmtree(place)


def idle(served):
    """Waits until the engine has nothing to do."""
    end = time.monotonic() + 10
    while served.engine.stats().running or served.engine.stats().waiting:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_has_its_request_cancelled(house, stream):
    served = house[0]
    before = served.engine.stats().completion_tokens
    with httpx.Client(base_url=house[1], verify=False) as gone:
        if stream:
            with gone.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as reply:
                next(reply.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                gone.post("/v1/completions", json=LONG, timeout=0.3)
    idle(served)
    assert served.engine.stats().completion_tokens - before < 1990


def test_the_time_between_tokens_counts_every_token():
    """Several come in one piece where text is held back: their times add up to the time that they took."""
    from undula.serve.server.metrics import Metrics

    class Told:
        request = Request((1,))

        async def __aiter__(self):
            for count, finish in ((1, None), (3, None), (0, None), (1, "length")):
                await asyncio.sleep(0.01 * count)
                yield Piece("", (Chosen(0),) * count, finish)

    async def heard(metrics):
        return [piece async for piece in metrics.heard(Told())]

    metrics = Metrics(None, None, list, 0.0)
    asyncio.run(heard(metrics))
    value = metrics.registry.get_sample_value
    assert value("undula_time_per_output_token_seconds_count") == 4
    assert value("undula_time_to_first_token_seconds_count") == value("undula_request_seconds_count") == 1
    assert value("undula_time_per_output_token_seconds_sum") > 0.03, "slept for 0.04 s after the first"


def test_the_metrics_tell_what_was_asked_and_refused(plain, client):
    """And of adapters those alone that there are."""
    client.completions.create(**ASK)
    plain.post("/v1/completions", json=ASK | {"model": "yellow"})
    text = plain.get("/metrics").text
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    assert found['undula_adapter_requests_total{adapter="red"}'] >= 1
    assert found['undula_http_requests_total{path="/v1/completions",status="404"}'] >= 1
    assert found['undula_refused_total{reason="model_not_found"}'] >= 1
    assert found["undula_time_to_first_token_seconds_count"] >= 1
    assert found["undula_time_per_output_token_seconds_count"] >= 0
    assert found["undula_generation_tokens_total"] >= 1
    assert found["undula_adapters_registered"] == 6
    assert found["undula_adapter_bytes_budget"] == 10**7
    assert "yellow" not in text
    assert "undula_lora_requests_info" in text


def test_the_page_holds_itself_to_what_is_in_it(plain):
    """Its policy forbids whatever comes from elsewhere, and names of adapters reach it as text."""
    reply = plain.get("/")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert policy.count("sha256-") == 2
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", reply.text)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\son\w+=|style=", reply.text)
    now = plain.get("/status.json").json()
    assert {row["name"] for row in now["adapters"]} == {"red", "green", "blue", "bent", *FORMS}
    assert now["pool"]["budget"] == 10**7
    assert plain.get("/health").status_code == plain.get("/ready").status_code == 200


KEYS = """
[keys.boss]
key = "boss-key-0123456789"
admin = true
[keys.team]
key = "team-key-0123456789"
adapters = ["re*"]
[keys.slow]
key = "slow-key-0123456789"
rate = 0.01
burst = 2
"""


@pytest.fixture(scope="module")
def guarded(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(KEYS)
    served, _ = made(folder, keys=keys_of(path, {}))
    listening = bound("127.0.0.1", 0)
    with in_background(served, listening) as server:
        yield served, address(listening), server


def asking(guarded, name):
    return httpx.Client(
        base_url=guarded[1], headers={"Authorization": f"Bearer {name}-key-0123456789"}, timeout=20, verify=False
    )


def test_without_a_key_nothing_but_health_and_the_bare_page_is_told(guarded):
    with httpx.Client(base_url=guarded[1], verify=False) as plain:
        for path in ("/v1/models", "/v1/models/red", "/metrics", "/status.json"):
            assert plain.get(path).status_code == 401, path
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/classify", "/tokenize",
                     "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):  # fmt: skip
            assert plain.post(path, json={}).status_code == 401, path
            assert plain.post(path, json={}, headers={"Authorization": "Bearer no"}).status_code == 401
        for path in ("/health", "/ready", "/"):
            assert plain.get(path).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded[1]}/v1", api_key="wrong").models.list()


def test_a_key_sees_and_asks_its_adapters_alone(guarded):
    """What is not for it is answered in the words of what is not there, whatever way it is named."""
    with asking(guarded, "team") as team, asking(guarded, "boss") as boss:
        assert [m["id"] for m in team.get("/v1/models").json()["data"]] == ["red"]
        assert [row["name"] for row in team.get("/status.json").json()["adapters"]] == ["red"]
        assert team.post("/v1/completions", json=ASK).status_code == 200
        for other, missing in (
            ("green", "yellow"),
            ("tiny-llama:green", "tiny-llama:yellow"),
            ("tiny-llama", "tiny-camel"),
        ):
            said, same = [team.post("/v1/completions", json=ASK | {"model": m}) for m in (other, missing)]
            assert said.status_code == same.status_code == 404
            assert said.text.replace(other, "?") == same.text.replace(missing, "?")
            assert team.get(f"/v1/models/{other}").status_code == 404
        weighted = ASK | {"model": "tiny-llama", "adapters": [{"name": "red"}, {"name": "green"}]}
        assert team.post("/v1/completions", json=weighted).status_code == 404
        assert team.post("/v1/load_lora_adapter", json={"lora_name": "red"}).status_code == 403
        assert team.post("/v1/unload_lora_adapter", json={"lora_name": "red"}).status_code == 403
        assert team.get("/metrics").status_code == 403
        assert boss.get("/metrics").status_code == 200
        assert len(boss.get("/v1/models").json()["data"]) == 7


def test_a_key_that_asks_too_often_is_told_when_to_come_again(guarded):
    """Answers are counted, not requests."""
    with asking(guarded, "slow") as slow:
        assert slow.post("/v1/completions", json=ASK | {"n": 2}).status_code == 200
        reply = slow.post("/v1/completions", json=ASK)
        assert reply.status_code == 429
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert 50 < int(reply.headers["retry-after"]) <= 100


def test_draining_lets_running_answers_finish_and_refuses_new_ones(guarded):
    """The last test of this server: it ends.  A stream that runs comes to its last token."""
    served, _, server = guarded
    with asking(guarded, "boss") as boss, asking(guarded, "boss") as late:
        said = LONG | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 200}
        with boss.stream("POST", "/v1/completions", json=said) as reply:
            lines = reply.iter_lines()
            next(lines)
            late.get("/health")
            leaving = threading.Thread(target=server.leave)
            leaving.start()
            end = time.monotonic() + 5
            while not served.draining and time.monotonic() < end:
                time.sleep(0.005)
            refused = late.post("/v1/completions", json=ASK)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert late.get("/ready").status_code == 503
            rest = [line for line in lines if line]
        leaving.join()
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 200
    assert server.should_exit


def test_a_second_signal_ends_at_once(folder):
    """What runs is cut off, and told so."""
    served, _ = made(folder)
    listening = bound("127.0.0.1", 0)
    with (
        in_background(served, listening) as server,
        httpx.Client(base_url=address(listening), timeout=20, verify=False) as client,
    ):
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            for _ in range(2):
                server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line]
        assert '"code":"cancelled"' in rest[-2] + rest[-1]
    assert server.should_exit
    assert server.lost
