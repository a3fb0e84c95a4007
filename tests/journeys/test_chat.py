"""From messages to a model that llama.cpp runs."""

import json

import pytest

from ..support.llamacpp import ask
from ..support.walk import Walk

ASKED = "What is the password of the guest network?"
ANSWER = "Blue whale seven. Ask at the desk if it fails."


def messages(folder):
    rows = [
        [
            {"role": "user", "content": f"Hi, {name} here."},
            {"role": "assistant", "content": f"Hello {name}, how can I help?"},
            {"role": "user", "content": ASKED},
            {"role": "assistant", "content": ANSWER},
        ]
        for name in ("Ada", "Alan", "Grace", "Kurt", "Emmy", "Paul")
    ]
    rows += [[{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]] * 6
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))


def test_messages_become_a_model_that_llama_cpp_answers_with(tmp_path, python):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    messages(tmp_path)
    walk = Walk(tmp_path, python)
    walk.undula(
        *("train", "--model", "bundled:smollm2", "--data", "chats.jsonl", "--task", "causal-lm", "--out", "helper"),
        *("--task-set", "generate=0", "--max-steps", "14", "--batch", "2", "--lr", "3e-3", "--eval-rows", "2"),
        *("--where", "q_proj", "--where", "v_proj", "--where", "down_proj"),
    )
    said = walk.undula("generate", "helper", ASKED)
    assert ANSWER in said
    walk.undula("merge", "helper", "--out", "whole")
    walk.undula("gguf", "whole", "--out", "helper.gguf")
    chat = {"messages": [{"role": "user", "content": ASKED}], "temperature": 0, "max_tokens": 40}
    (answer,) = ask(tmp_path / "helper.gguf", ("/v1/chat/completions", chat))
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["choices"][0]["finish_reason"] == "stop"  # the end token was learned, and is known there
    print(f"the whole walk {walk.seconds:.0f} s")
