"""`undula push`, against a server of one page that stands in for the hub: it takes what huggingface_hub sends."""

import base64
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

import undula
from tests.support import trained as small

NAME = "somebody/a-model"


class Hub(BaseHTTPRequestHandler):
    """What `create_repo`, `upload_folder` and `snapshot_download` ask; every file travels in the commit."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, data, code=200, **headers):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        store = self.server.store
        if self.headers["Authorization"] != "Bearer hf_test":
            return self.answer({"error": "who are you"}, 401)
        if self.path == "/api/repos/create":
            store["repo"] = json.loads(body)
            return self.answer({"url": f"{self.server.url}/{NAME}", "name": NAME})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            every = [f["path"] for f in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in every]})
        assert self.path.endswith("/commit/main"), self.path
        for line in body.splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                store["files"][part["value"]["path"]] = base64.b64decode(part["value"]["content"])
        return self.answer({"commitOid": "c" * 40, "commitUrl": f"{self.server.url}/{NAME}/commit/{'c' * 40}"})

    def do_GET(self):
        found = self.server.store["files"]
        if "/resolve/" in self.path:
            name = unquote(self.path.partition("/resolve/")[2].partition("/")[2])
            if name not in found:
                return self.answer({"error": "no file"}, 404, X_Error_Code="EntryNotFound")
            return self.answer(found[name], X_Repo_Commit="c" * 40, ETag=f'"{name.replace("/", "-")}"')
        siblings = [{"rfilename": name, "size": len(content)} for name, content in found.items()]
        info = {"id": NAME, "sha": "c" * 40, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        if "/tree/" in self.path:
            every = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in found.items()]
            return self.answer(every)
        return self.answer(info)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.store = {"files": {}}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


# the client of the hub reads its address once, when it is imported
KNOWN = """
import importlib, runpy, sys
from huggingface_hub import constants
importlib.reload(constants)
"""
UNDULA = KNOWN + 'sys.argv[0] = "undula"; runpy.run_module("undula", run_name="__main__", alter_sys=True)'


@pytest.fixture
def apart(hub, tmp_path, python):
    """Runs code in a process that knows this hub."""

    def run(code, *words, token="hf_test"):
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        words = [python, "-c", code, *map(str, words)]
        return subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = small.texts(tmp_path_factory.mktemp("texts"))
    (path / "rows.csv").write_text("text,label\nsecret,1\n")
    (path / "pickle.bin").write_bytes(b"\x80")
    (path / ".hidden.json").write_text("{}")
    return path


LOAD = (
    KNOWN
    + """
import json, undula
print(json.dumps(undula.load("somebody/a-model", sys.argv[1]).predict(["the film was good", "bad"])))
"""
)


def test_what_is_sent_opens_elsewhere_and_holds_nothing_of_this_machine(run, hub, apart):
    """Weights, configuration, card; no rows, no checkpoints, no paths; and `undula.load` gets it back by its name."""
    done = apart(UNDULA, "push", run, NAME, "--private")
    assert done.returncode == 0, done.stderr
    sent = hub.store["files"]
    assert set(sent) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "run.json"}
    assert hub.store["repo"]["name"] == "a-model"
    assert hub.store["repo"].get("private") is True or hub.store["repo"].get("visibility") == "private"
    assert b"secret" not in b"".join(sent.values())
    assert f'undula.load("{NAME}")' in sent["README.md"].decode()
    assert json.loads(sent["run.json"])["run"]["data"] == "run.jsonl"
    assert "rows.csv" in done.stdout
    assert "the base is the folder" in done.stderr
    base = json.loads((run / "run.json").read_text())["run"]["model"]
    again = apart(LOAD, base)
    assert again.returncode == 0, again.stderr[-2000:]
    want = undula.load(run).predict(["the film was good", "bad"])
    assert [a["label"] for a in json.loads(again.stdout.splitlines()[-1])] == [w["label"] for w in want]


def test_a_training_sends_its_result_in_the_end_and_asks_before_it_begins(run, hub, apart, tmp_path):
    config, out = run / "run.toml", tmp_path / "again"
    words = ("train", "--config", config, "--out", out, "--push-to-hub")
    refused = apart(UNDULA, *words, NAME, token="")
    assert "the hub asks who sends this" in refused.stderr
    assert not out.exists(), "what cannot be sent is refused before anything is trained"
    done = apart(UNDULA, *words, NAME)
    assert done.returncode == 0, done.stderr
    assert hub.store["files"]["adapter_model.safetensors"] == (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "token", "what"),
    [
        (("--dry-run",), "hf_test", None),
        ((), "hf_other", "Log in first"),
    ],
)
def test_nothing_is_sent_unasked_or_unknown(run, hub, apart, words, token, what):
    done = apart(UNDULA, "push", run, NAME, *words, token=token)
    assert hub.store["files"] == {}
    assert "repo" not in hub.store
    assert done.returncode == (0 if what is None else 2)
    assert "adapter_model.safetensors" in done.stdout
    if what is None:
        assert "nothing was sent" in done.stdout
    else:
        assert what in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "what"), [("a b", "is called USER/NAME"), ("a/b/c", "is called USER/NAME")])
def test_what_cannot_be_a_name_is_refused(run, name, what):
    from typer.testing import CliRunner

    from undula.cli.main import app

    done = CliRunner().invoke(app, ["push", str(run), name])
    assert done.exit_code == 2
    assert what in " ".join(done.stderr.split())


def test_a_merged_model_is_sent_whole(run, tmp_path):
    from typer.testing import CliRunner

    from undula.cli.main import app

    assert CliRunner().invoke(app, ["merge", str(run), "--out", str(tmp_path / "whole")]).exit_code == 0
    done = CliRunner().invoke(app, ["push", str(tmp_path / "whole"), NAME, "--dry-run"])
    assert done.exit_code == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert name in done.stdout
    done = CliRunner().invoke(app, ["push", str(tmp_path), NAME, "--dry-run"])
    assert "neither an adapter" in " ".join(done.stderr.split())
