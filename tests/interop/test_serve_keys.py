"""Keys of the server: what a file may say, who may ask what, how often; and where adapters may lie."""

import asyncio
import hashlib
import threading

import pytest

from undula.serve.request import Busy, Refused
from undula.serve.server.errors import Wrong, body_of, without_paths
from undula.serve.server.keys import ANYONE, Keys, keys_of
from undula.serve.server.places import Places, check_name
from undula.serve.server.running import is_loopback
from undula.serve.server.streams import Events, merged
from undula.serve.server.words import Words

KEY = "0123456789abcdef"


def written(tmp_path, text, name="keys.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_without_keys_everyone_may_do_everything():
    assert Keys().who(None) is ANYONE
    assert ANYONE.may("any")
    assert ANYONE.admin
    Keys().spend(ANYONE, 10**9)


def test_a_line_of_a_file_is_a_key_and_the_environment_has_more(tmp_path):
    """Of the lines none may change what is served."""
    path = written(tmp_path, f"# ours\n{KEY}\n\nanna {KEY}x\n", "keys.txt")
    found = keys_of(path, {"UNDULA_KEYS": f"{KEY}y,{KEY}z", "UNDULA_ADMIN_KEYS": f"{KEY}w"})
    assert {k.name: k.admin for k in found.keys} == {
        "key-2": False, "anna": False, "undula_keys-1": False, "undula_keys-2": False, "undula_admin_keys-1": True,
    }  # fmt: skip
    assert found.who(f"Bearer {KEY}x").name == "anna"
    assert found.who(f"bearer {KEY}w").admin
    for said in (None, "", "Bearer", f"Basic {KEY}", KEY, "Bearer \udcff", f"Bearer {KEY}{KEY}"):
        with pytest.raises(Wrong) as raised:
            found.who(said)
        assert raised.value.status == 401


def test_a_file_of_toml_says_what_each_key_may(tmp_path):
    """A key that is held to adapters does not ask the base unless it is said; a sum stands for the key itself."""
    sum_ = hashlib.sha256(b"long enough a key").hexdigest()
    path = written(
        tmp_path,
        f'[keys.a]\nkey = "{KEY}"\nadapters = ["law-*", "x"]\nrate = 2\n'
        f'[keys.b]\nsha256 = "{sum_}"\nadmin = true\n[keys.c]\nkey = "{KEY}c"\nadapters = []\nbase = true\n',
    )
    found = keys_of(path, {})
    a, b, c = found.keys
    assert [a.may(n) for n in ("law-uk", "x", "xy", "LAW-uk", "law")] == [True, True, False, False, False]
    assert (a.base, b.base, c.base) == (False, True, True)
    assert (a.admin, b.admin, b.metrics, c.metrics) == (False, True, True, False)
    assert not c.may("x")
    assert found.who("Bearer long enough a key") is b
    assert KEY not in repr(found.keys)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "holds no keys|nothing else"),
        ("[keys]", "holds no keys"),
        ("a = 1", "nothing else"),
        ("[keys.a", "no TOML"),
        ("keys = 3", "nothing else"),
        ("[keys]\na = 3", "table"),
        ("[keys.a]", "one of key"),
        (f'[keys.a]\nkey = "{KEY}"\nsha256 = "00"', "one of key"),
        ('[keys.a]\nkey = "short"', "16"),
        ('[keys.a]\nkey = "with a space in it"', "spaces"),
        ("[keys.a]\nkey = 1234567890123456", "16"),
        ('[keys.a]\nsha256 = "00"', "64"),
        (f'[keys.a]\nkey = "{KEY}"\nadapter = ["x"]', "has adapter; a key has"),
        (f'[keys.a]\nkey = "{KEY}"\nadapters = "x"', "list"),
        (f'[keys.a]\nkey = "{KEY}"\nrate = 0', "above 0"),
        (f'[keys.a]\nkey = "{KEY}"\nrate = true', "above 0"),
        (f'[keys.a]\nkey = "{KEY}"\nrate = nan', "above 0"),
        (f'[keys.a]\nkey = "{KEY}"\nburst = 3', "no.*rate|none is given"),
        (f'[keys.a]\nkey = "{KEY}"\nadmin = 1', "true or false"),
        (f'[keys.a]\nkey = "{KEY}"\n[keys.b]\nkey = "{KEY}"', "the same"),
    ],
)
def test_a_faulty_file_of_keys_is_refused_without_showing_a_key(tmp_path, text, word):
    with pytest.raises(ValueError, match=word) as raised:
        keys_of(written(tmp_path, text), {})
    assert KEY not in str(raised.value)


def test_other_files_of_keys_are_refused_too(tmp_path):
    with pytest.raises(FileNotFoundError):
        keys_of(tmp_path / "no", {})
    with pytest.raises(ValueError, match="line 2 has 3 words"):
        keys_of(written(tmp_path, f"\na b {KEY}", "k"), {})
    (tmp_path / "u").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="UTF-8"):
        keys_of(tmp_path / "u", {})


def test_a_rate_is_kept_over_any_time_however_answers_are_bundled(tmp_path):
    """In virtual time: of a burst of 5 and 2 a second, 100 seconds allow 205 answers, and not 8 more (the last
    bundle)."""
    now = [0.0]
    keys = keys_of(written(tmp_path, f'[keys.a]\nkey = "{KEY}"\nrate = 2\nburst = 5'), {})
    keys = Keys(keys.keys, clock=lambda: now[0])
    (key,), answers, waits = keys.keys, 0, []
    sizes = [1, 8, 3]
    while now[0] < 100:
        try:
            keys.spend(key, sizes[answers % 3])
            answers += sizes[answers % 3]
        except Busy as busy:
            waits.append(busy.retry_after)
            now[0] += waits[-1]
    assert 197 <= answers <= 213
    assert 0 < min(waits) <= max(waits) <= 8 / 2 + 0.5


def test_adapters_lie_in_their_directories_and_nowhere_else(tmp_path):
    """Neither a path, nor a link of a directory, nor one of a file leads out; what is not there and what lies elsewhere
    are told in the same words."""
    root, other = tmp_path / "in", tmp_path / "out"
    for path in (root / "a", root / "b", other / "c"):
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text("{}")
    (root / "link").symlink_to(other / "c")
    (root / "inner").symlink_to(root / "a")
    (root / "b" / "adapter_model.safetensors").symlink_to(other / "c" / "adapter_config.json")
    (root / "plain.txt").write_text("")
    places = Places.of((root,))
    assert places.inside("a") == places.inside(str(root / "a")) == places.inside("inner") == (root / "a").resolve()
    said = set()
    for out in (
        "../out/c",
        str(other / "c"),
        "link",
        "nothing",
        ".",
        "..",
        "",
        "/",
        "plain.txt",
        "a/../../out/c",
        "nothing/there",
    ):
        with pytest.raises(Wrong) as raised:
            places.inside(out)
        said.add((raised.value.status, str(raised.value).replace(repr(out), "?", 1)))
    assert len(said) == 1
    with pytest.raises(Wrong, match="safetensors is a link"):
        places.inside("b")
    with pytest.raises(NotADirectoryError):
        Places.of((tmp_path / "none",))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a:b", "a\0", "a\n", ".a", " a", "a ", "x" * 300, "base"]
)
def test_what_an_address_could_take_for_something_else_is_no_name(name):
    with pytest.raises((Wrong, ValueError)):
        check_name(name, ("base",))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "no file /home/me/secret/adapters/a/adapter_model.safetensors: gone",
            "no file adapter_model.safetensors: gone",
        ),
        ("in '/srv/x/y' and ~/a/b.json", "in 'y' and b.json"),
        ("C:\\Users\\me\\x.bin is cut", "x.bin is cut"),
        ("/srv/ad apters/a/x.json, row 3", "a/x.json, row 3"),
        ("ask /v1/chat/completions or /v1/models", "ask /v1/chat/completions or /v1/models"),
        ("r=4/8 and text/plain, a/b", "r=4/8 and text/plain, a/b"),
    ],
)
def test_messages_keep_of_a_path_its_last_name(said, shown):
    assert without_paths(said, "/srv/ad apters") == shown


def test_errors_have_openais_shape():
    assert body_of("x", 429, "c", "p") == {
        "error": {"message": "x", "type": "rate_limit_error", "param": "p", "code": "c"}
    }
    assert body_of("x", 503)["error"]["type"] == "server_error"


def test_loopback_is_told_from_the_network():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "host"))


async def counting(n, error=None):
    for i in range(n):
        await asyncio.sleep(0)
        yield i
    if error is not None:
        raise error


def test_streams_are_merged_in_their_own_orders_and_an_error_ends_all():
    async def run():
        every = [item async for item in merged([counting(3), counting(0), counting(5)])]
        assert [x for i, x in every if i == 0] == [0, 1, 2]
        assert [x for i, x in every if i == 2] == [0, 1, 2, 3, 4]
        with pytest.raises(Refused, match="no"):
            async for _ in merged([counting(2, Refused("no")), counting(10**6)]):
                pass

    asyncio.run(run())


def test_a_pause_is_told_and_nothing_is_lost_over_it():
    async def slow():
        yield 1
        await asyncio.sleep(0.06)
        yield 2

    async def run():
        found = [x async for x in merged([slow()], 0.02)]
        assert [x for x in found if x is not None] == [(0, 1), (0, 2)]
        assert found.count(None) >= 1

    asyncio.run(run())


@pytest.mark.parametrize("reader", ["stuck", "gone"])
def test_whoever_stops_reading_ends_the_stream_and_is_let_go(reader):
    """A reader that takes nothing for `patience` seconds, and one that goes: the rest is not made, and `gone` is
    called."""
    made, gone = [], threading.Event()

    async def events():
        for i in range(10**6):
            made.append(i)
            await asyncio.sleep(0)
            yield b"x"

    async def send(message):
        if reader == "stuck" and len(made) >= 3:
            await asyncio.sleep(60)

    async def receive():
        while reader == "stuck" or len(made) < 3:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    asyncio.run(Events(events(), gone.set, 0.05)({"type": "http"}, receive, send))
    assert gone.is_set()
    assert len(made) < 10**5


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["a film was good"], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def byte_fallback():
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {"<unk>": 0, **{f"<0x{b:02X}>": 1 + b for b in range(256)}, "\u2581": 257, "a": 258, "\u2581a": 259}
    made = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_bytes_of_tokens_are_together_those_of_the_text(make):
    """Also where a letter goes over several tokens, each of which says nothing alone."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="<end>")
    words, text = Words(tokenizer), " a film à la façon 日本 \U0001f600\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(words.said(token)[1] for token in ids) == text.encode()
    assert any(words.said(token)[0] == "\ufffd" for token in ids)
    assert words.said(tokenizer.eos_token_id) == ("<end>", b"<end>")
