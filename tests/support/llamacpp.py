"""llama.cpp's own runtime, in a process of its own: what it makes of a file."""

import json
import subprocess
import sys

SERVER = """
import json, sys, urllib.request
import xllamacpp as llama

model, lora, asked = sys.argv[1], sys.argv[2], json.load(sys.stdin)
params = llama.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = model, 512, 1, False, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
if lora:
    one = llama.CommonAdapterLoraInfo()
    one.path, one.scale = lora, 1.0
    params.lora_adapters = [one]
server = llama.Server(params)
for path, data in asked:
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    print("ANSWER " + urllib.request.urlopen(request).read().decode(), flush=True)
"""


def ask(model, *asked, lora=""):
    """The answers to requests, each (path, what is sent), of llama.cpp's server over a file."""
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(model), str(lora)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]


def greedy(ids, n):
    """The request for n tokens after these, the likeliest each."""
    return "/completion", {
        "prompt": ids,
        "n_predict": n,
        "temperature": 0,
        "return_tokens": True,
        "ignore_eos": True,
        "cache_prompt": False,
    }


def split(text):
    """The request for a text's tokens."""
    return "/tokenize", {"content": text, "add_special": True, "parse_special": True}
