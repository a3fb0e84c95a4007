"""Adapters found by their weights and words: what no gauge changes, and an index that is always that of the folder."""

import json
import os
import shutil
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import undula
from tests.support import tiny
from tests.support.layers import net
from tests.support.numbers import shake
from undula import retrieve
from undula.methods.sum import as_pair
from undula.retrieve import index as indexing
from undula.retrieve.describing import described
from undula.retrieve.sketching import DIRECT, WIDTH

close = torch.testing.assert_close


def adapter(method, seed=0, where="*", make=net):
    model = make().double()
    torch.manual_seed(seed)
    return shake(undula.attach(model, method, where), 0.4).copy()


def in_gauge(a, G):
    """The same update by other factors: (B G^-1)(G A)."""
    return a.map(lambda f: {"A": G @ f["A"], "B": f["B"] @ torch.linalg.inv(G)})


def gauges():
    torch.manual_seed(5)
    return {
        "permutation": torch.eye(4).double()[torch.randperm(4)],
        "scale": torch.diag(torch.tensor([1e-3, -2.0, 7.0, 30.0]).double()),
        "rotation": torch.linalg.qr(torch.randn(4, 4).double()).Q,
        "any": torch.randn(4, 4).double(),
    }


@pytest.mark.parametrize("name", ["permutation", "scale", "rotation", "any"])
def test_no_gauge_changes_a_sketch(name):
    a = adapter(undula.LoRA(r=4))
    close(retrieve.sketch(in_gauge(a, gauges()[name])).z, retrieve.sketch(a).z)


def test_another_update_is_another_sketch_and_its_size_is_the_last_number():
    a = adapter(undula.LoRA(r=4))
    z = retrieve.sketch(a).z
    assert z.shape == (WIDTH,)
    other = retrieve.sketch(a.map(lambda f: {**f, "B": f["B"] + 0.01 * torch.randn_like(f["B"])})).z
    assert (other - z).abs().max() > 1e-4
    twice = retrieve.sketch(a.map(lambda f: {**f, "B": 2 * f["B"]})).z
    close(twice[:-1], z[:-1])
    close(twice[-1] - z[-1], torch.tensor(4.0).double().log())
    turned = retrieve.sketch(a.map(lambda f: {**f, "B": -f["B"]})).z
    close(turned[:DIRECT], -z[:DIRECT])


def test_ranks_and_methods_do_not_count_but_their_updates():
    """Of more ranks, of factors that are not plain, of an update without factors, and of a sum."""
    a = adapter(undula.LoRA(r=4))
    z = retrieve.sketch(a).z
    wide = a.map(lambda f: {"A": torch.cat([f["A"], f["A"]]), "B": torch.cat([f["B"], 0 * f["B"]], 1)})
    close(retrieve.sketch(replace(wide, methods=dict.fromkeys(a.methods, undula.LoRA(r=8, alpha=8.0)))).z,
          retrieve.sketch(replace(a, methods=dict.fromkeys(a.methods, undula.LoRA(r=4, alpha=4.0)))).z)  # fmt: skip
    close(retrieve.sketch(0.25 * a + 0.75 * a).z, z)
    bent = adapter(undula.LoRAN(r=2))
    dense = {s: as_pair(bent.delta(s)) for s in bent.methods}
    plain = replace(bent, methods={s: m for s, (m, _) in dense.items()}, factors={s: f for s, (_, f) in dense.items()})
    close(retrieve.sketch(plain).z, retrieve.sketch(bent).z)


def test_layers_that_others_have_not_do_not_mix_in():
    """The likeness of two adapters is about the mean cosine of their updates; unrelated ones have about none."""

    def wide():
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))

    a, b = (adapter(undula.LoRA(r=4), seed, make=wide) for seed in (0, 1))
    half = replace(
        a, **{n: {s: v for s, v in getattr(a, n).items() if int(s) < 4} for n in ("methods", "factors", "shapes")}
    )
    z = torch.stack([retrieve.sketch(x).z for x in (a, b, half)])
    own, other, part = retrieve.likeness(z, z[0]).tolist()
    assert own == pytest.approx(1)
    assert abs(other) < 0.15
    assert part == pytest.approx(0.5**0.5, abs=0.15)


def test_what_has_no_update_says_so():
    with pytest.raises(TypeError, match="no update dW \\(AuroRA at 2 layers\\)"):
        retrieve.sketch(adapter(undula.AuroRA(r=2)))
    with pytest.raises(ValueError, match="zero at every layer"):
        retrieve.sketch(undula.attach(net(), undula.LoRA(r=2), "*"))
    mixed = undula.attach(net(), undula.LoRA(r=2), "*", overrides={"2": undula.AuroRA(r=2)})
    found = retrieve.sketch(shake(mixed, 0.4).copy())
    assert (found.layers, found.without) == (1, {"AuroRA": 1})


@pytest.fixture(scope="module")
def encoder_of_texts(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


WORDS = ["good film", "bad food", "very happy day", "sad place", "great food", "awful film", "nice place", "poor day"]


@pytest.fixture
def folder(tmp_path):
    """Eight adapters, one of another method without an update, one in a folder below."""
    root = tmp_path / "adapters"
    for i, words in enumerate(WORDS):
        a = adapter(undula.AuroRA(r=2) if i == 7 else undula.LoRA(r=2 + i % 3), i)
        a.save(root / f"a{i}" if i < 6 else root / "below" / f"a{i}", base="base")
        (root / ("." if i < 6 else "below") / f"a{i}" / "README.md").write_text(f"# {words}\n\n| a | table |\n")
    aged(root)
    return root


def aged(root):
    """As of an hour ago: what is younger than a file system's clock is read again."""
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 3600 * 10**9))


def same(one, other):
    assert one.entries == other.entries
    close(one.texts, other.texts)
    close(one.weights, other.weights, rtol=0, atol=0)


def test_an_index_reads_what_changed_and_is_what_a_new_one_would_be(folder, encoder_of_texts, tmp_path):
    def update(file=None):
        return retrieve.update(folder, file, encoder_of_texts)

    first = update()
    assert (first.read, len(first.entries)) == (8, 8)
    assert [e.text for e in first.entries] == WORDS
    assert [e.name for e in first.entries if e.silent] == ["below/a7"]
    before = (folder / indexing.FILE).stat().st_mtime_ns
    same(update(), first)
    assert update().read == 0
    assert (folder / indexing.FILE).stat().st_mtime_ns == before  # nor written
    adapter(undula.LoRA(r=3), 99).save(folder / "a2", base="base")
    (folder / "a3" / "README.md").write_text("a poor film\n")
    shutil.rmtree(folder / "a4")
    shutil.copytree(folder / "a0", folder / "another")
    aged(folder / "a2")
    aged(folder / "a3")
    found = update()
    assert found.read == 3
    same(found, update(tmp_path / "new.safetensors"))
    assert [e.name for e in found.entries] == ["a0", "a1", "a2", "a3", "a5", "another", "below/a6", "below/a7"]
    same(retrieve.load(folder / indexing.FILE), found)


def test_a_file_that_was_just_written_is_read_again(folder, encoder_of_texts):
    (folder / "a0" / "README.md").write_text("nice\n")
    assert retrieve.update(folder, model=encoder_of_texts).read == 8
    before = (folder / "a0" / "README.md").stat()
    (folder / "a0" / "README.md").write_text("poor\n")
    os.utime(folder / "a0" / "README.md", ns=(before.st_atime_ns, before.st_mtime_ns))  # within the clock's grain
    found = retrieve.update(folder, model=encoder_of_texts)
    assert found.read == 1
    assert found.entries[0].text == "poor"


def test_what_cannot_be_read_is_named_and_left_out(folder, encoder_of_texts):
    whole = retrieve.update(folder, model=encoder_of_texts)
    cut = (folder / "a1" / "adapter_model.safetensors").read_bytes()
    (folder / "a1" / "adapter_model.safetensors").write_bytes(cut[:-8])
    (folder / "a2" / "adapter_config.json").unlink()
    (folder / "stray.safetensors").write_bytes(b"no tensors")
    config = json.loads((folder / "a3" / "adapter_config.json").read_text())
    (folder / "a3" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "VERA"}))
    found = retrieve.update(folder, model=encoder_of_texts)
    assert sorted(found.skipped) == ["a1", "a2", "a3", "stray.safetensors"]
    assert [found.entries[i].name for i in found.usable] == ["a0", "a4", "a5", "below/a6", "below/a7"]
    assert "cut or damaged" in found.skipped["a1"]
    assert "adapter_config.json is missing" in found.skipped["a2"]
    asked = whole.texts[0]
    names = [f.name for f in retrieve.ranked(found, asked)]
    assert names[0] == "a0"
    assert set(names) == {e.name for e in whole.entries} - {"a1", "a2", "a3"}


def test_a_damaged_index_is_made_anew(folder, encoder_of_texts):
    first = retrieve.update(folder, model=encoder_of_texts)
    path = folder / indexing.FILE
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="cannot be used and is made anew"):
        again = retrieve.update(folder, model=encoder_of_texts)
    same(again, first)
    with pytest.raises(ValueError, match="no index of this version"):
        retrieve.load(folder / "a0" / "adapter_model.safetensors")


def test_names_in_other_encodings_and_links_to_nowhere_stop_nothing(folder, encoder_of_texts):
    there = os.fsencode(folder) + b"/caf\xe9"
    shutil.copytree(os.fsencode(folder / "a0"), there)
    os.unlink(there + b"/README.md")
    os.symlink("itself", folder / "itself")
    aged(folder)
    found = retrieve.update(folder, model=encoder_of_texts)
    (odd,) = (e for e in found.entries if e.name not in {f"a{i}" for i in range(6)} | {"below/a6", "below/a7"})
    assert (os.fsencode(odd.name), odd.text, odd.wrong) == (b"caf\xe9", "caf?", "")
    again = retrieve.update(folder, model=encoder_of_texts)
    assert again.read == 0
    same(again, found)


def test_adapters_that_change_places_are_read_again(folder, encoder_of_texts):
    """Their files have one size and one time, as those of an archive may."""
    for name in ("a0", "a3"):
        (folder / name / "README.md").unlink()
        for path in (folder / name).iterdir():
            os.utime(path, ns=(10**18, 10**18))
    before = retrieve.update(folder, model=encoder_of_texts)
    for one, other in (("a0", "a"), ("a3", "a0"), ("a", "a3")):
        (folder / one).rename(folder / other)
    found = retrieve.update(folder, model=encoder_of_texts)
    close(found.weights[[0, 3]], before.weights[[3, 0]], rtol=0, atol=0)
    assert not torch.equal(found.weights[0], before.weights[0])


def test_what_the_system_did_not_let_be_read_is_tried_again(folder, encoder_of_texts, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    whole = retrieve.update(folder, folder.parent / "other.safetensors", encoder_of_texts)
    with monkeypatch.context() as patched:
        patched.setattr("undula.retrieve.entry.Opened", denied)
        assert len(retrieve.update(folder, model=encoder_of_texts).skipped) == 8
    same(retrieve.update(folder, model=encoder_of_texts), whole)


def test_no_other_file_is_written_over_and_none_read_in_vain(folder, encoder_of_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing.entries, "read", None)  # so that reading one would end in a TypeError
    (tmp_path / "notes").write_text("mine")
    for path, error in (("notes", FileExistsError), ("adapters", IsADirectoryError), ("notes/index", OSError)):
        with pytest.raises(error):
            retrieve.update(folder, tmp_path / path, encoder_of_texts)
    with pytest.raises(ValueError, match="takes an encoder"):
        retrieve.find("films", folder, by="weights")
    with pytest.raises(FileExistsError, match="is no encoder of weights, and is not written over"):
        retrieve.Encoder(4).save(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_what_undula_writes_beside_adapters_is_none(folder, encoder_of_texts):
    (folder / "lib").mkdir()
    (folder / "lib" / "library.json").write_text("{}")
    for name in ("start", "experts/start"):  # what a library's experts began from, and one that is called so
        shutil.copytree(folder / "a0", folder / "lib" / name)
    os.mkfifo(folder / "pipe.safetensors")  # which would be waited for
    (folder / "generators").mkdir()
    (folder / "generators" / "generator.safetensors").write_bytes(b"whatever it is")
    for _ in range(2):  # and over one of its own it writes
        retrieve.Encoder(4).save(folder / "encoder.safetensors")
    found = retrieve.update(folder, folder / "index.safetensors", encoder_of_texts)
    again = retrieve.update(folder, folder / "index.safetensors", encoder_of_texts)
    assert (again.skipped, [e.name for e in again.entries]) == ({}, [e.name for e in found.entries])
    assert [e.name for e in found.entries if e.name.startswith("lib")] == ["lib/experts/start"]
    (folder / "index.safetensors").rename(folder.parent / "index.safetensors")
    assert retrieve.load(folder.parent / "index.safetensors", folder).folder == folder


def test_a_number_that_was_damaged_is_seen(folder, encoder_of_texts):
    retrieve.update(folder, model=encoder_of_texts)
    path = folder / indexing.FILE
    held = bytearray(path.read_bytes())
    held[-2000] ^= 1
    path.write_bytes(held)
    with pytest.raises(ValueError, match="damaged: its numbers are not those that were written"):
        retrieve.load(path)


@pytest.mark.parametrize("part", ["[", "![](", "<!--", "```x\n", "\n", "[](", "# \n", " |"])
def test_no_card_takes_more_time_than_its_length(tmp_path, part):
    """In steps that grow with the square of its length this would take minutes."""
    (tmp_path / "README.md").write_text("a film\n" + part * (1 << 17))
    begun = time.process_time()
    assert described(tmp_path, {}, {})[0].startswith("a film")
    assert time.process_time() - begun < 10


def test_a_kill_loses_no_more_than_a_part(folder, encoder_of_texts, monkeypatch):
    monkeypatch.setattr(indexing, "TOGETHER", 2)
    monkeypatch.setattr(indexing, "SAVED", 4)

    def killed(done, of):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrieve.update(folder, model=encoder_of_texts, seen=killed)
    found = retrieve.update(folder, model=encoder_of_texts)
    assert found.read == 4
    same(found, retrieve.update(folder, folder.parent / "new.safetensors", encoder_of_texts))


def test_two_at_once_disturb_each_other_in_nothing(folder, encoder_of_texts, monkeypatch):
    """While one reads, another begins, ends and sees one adapter less: each leaves a whole file."""
    monkeypatch.setattr(indexing, "TOGETHER", 4)

    def meanwhile(done, of):
        if done == 4 and (folder / "a5").exists():
            shutil.rmtree(folder / "a5")
            other = retrieve.update(folder, model=encoder_of_texts)
            same(retrieve.load(folder / indexing.FILE), other)
            assert len(other.entries) == 7

    found = retrieve.update(folder, model=encoder_of_texts, seen=meanwhile)
    same(retrieve.load(folder / indexing.FILE), found)
    assert found.skipped.keys() == {"a5"}  # gone while it was read: the next update forgets it
    assert len(retrieve.update(folder, model=encoder_of_texts).entries) == 7


def library(n, d=24, seed=0):
    """Sketches of n adapters whose updates say what their descriptions do: both are linear in the same few numbers."""
    torch.manual_seed(seed)
    of_task, of_text = torch.randn(4, WIDTH), torch.randn(4, d)
    tasks = torch.randn(n, 4)
    return tasks @ of_task + 0.3 * torch.randn(n, WIDTH), nn.functional.normalize(tasks @ of_text, dim=-1)


def test_an_encoder_finds_adapters_that_it_has_not_seen(tmp_path):
    z, texts = library(60)
    state = torch.random.get_rng_state()
    made = retrieve.learn(z[:40], texts[:40], steps=150)
    assert torch.equal(torch.random.get_rng_state(), state)
    rank = (made(z[40:]) @ texts[40:].T).detach().argsort(1, descending=True)
    hits = (rank[:, :3] == torch.arange(20)[:, None]).any(1).float().mean()
    assert hits > 0.6  # chance: 0.15
    made.save(tmp_path / "encoder.safetensors")
    close(retrieve.Encoder.load(tmp_path / "encoder.safetensors")(z), made(z), rtol=0, atol=0)
    made.up.bias.data[0] = torch.nan
    made.save(tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"up\.bias holds NaN"):
        retrieve.Encoder.load(tmp_path / "encoder.safetensors")
    close(retrieve.learn(z[:40], texts[:40], steps=3)(z), retrieve.learn(z[:40], texts[:40], steps=3)(z))
    with pytest.raises(ValueError, match="takes 8 adapters of one base"):
        retrieve.learn(z[:20], texts[:4].repeat(5, 1))


def test_a_result_is_ordered_by_words_by_weights_and_by_both(folder, encoder_of_texts):
    index = retrieve.update(folder, model=encoder_of_texts)
    asked = index.texts[3]
    by_text = retrieve.ranked(index, asked, top=2)
    assert (by_text[0].name, len(by_text)) == ("a3", 2)
    assert by_text[0].score == pytest.approx(1)
    assert by_text[0].weights is None
    with pytest.raises(ValueError, match="takes an encoder"):
        retrieve.ranked(index, asked, by="weights")
    known = retrieve.Encoder(index.texts.shape[1], 16, "base", index.model).eval()
    by_weights = retrieve.ranked(index, asked, known, by="weights")
    assert [f.name for f in by_weights] == sorted(
        (f.name for f in by_weights), key=lambda n: -next(f.weights for f in by_weights if f.name == n)
    )
    assert "below/a7" not in {f.name for f in by_weights}
    both = retrieve.ranked(index, asked, known)
    assert {f.name for f in both} == {e.name for e in index.entries}
    alike = replace(index, texts=index.texts[3] + 1e-8 * torch.randn_like(index.texts))  # but for rounding
    assert [f.name for f in retrieve.ranked(alike, asked)] == sorted(e.name for e in index.entries)
    weighed = [f.name for f in retrieve.ranked(alike, asked, known) if f.weights is not None]
    assert weighed == [f.name for f in by_weights]
    assert retrieve.ranked(index, asked, base="another") == []
    other = retrieve.Encoder(index.texts.shape[1], 16, "another", index.model).eval()
    assert retrieve.ranked(index, asked, other, by="weights") == []
