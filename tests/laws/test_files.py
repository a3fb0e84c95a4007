"""An adapter's directory holds one adapter, whoever writes, reads or dies meanwhile; what `save` writes `load` reads;
what a file says beside its numbers is kept; and what undula cannot honour is refused by name."""

import dataclasses
import itertools
import json
import os
import re
import signal
import stat
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import undula
from tests.support.layers import net
from tests.support.numbers import shake
from undula.io import draft, files, native, tensorfile
from undula.io.lora_config import STARTS, patterns

CONFIG, TENSORS = files.CONFIG, files.TENSORS


def small(alpha, value, full=()):
    torch.manual_seed(0)
    model, method = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), undula.LoRA(r=2, alpha=alpha)
    adapter = undula.attach(model, method, ["0"] if full else ["0", "1"], full=full)
    for p in adapter.parameters():
        p.data.fill_(value)
    return adapter


def written(adapter, path, export):
    undula.io.export_lora(adapter, path) if export else adapter.save(path)


def what(adapter):
    """(scale, number) of an adapter by `small`, whichever way it was written."""
    site = next(iter(adapter.factors))
    return float(adapter.delta(site)[0, 0])


class Killed(BaseException):
    pass


def stops(monkeypatch, nth):
    """From now on the nth operation that changes the disk kills the process that does it (here: an exception that no
    code of the library sees, and no clean-up)."""
    count = itertools.count()

    def wrapped(real):
        def act(*arguments, **options):
            if next(count) == nth:
                raise Killed
            return real(*arguments, **options)

        return act

    for name in ("replace", "fsync", "open"):
        monkeypatch.setattr(draft.os, name, wrapped(getattr(os, name)))
    monkeypatch.setattr(draft.Draft, "__exit__", lambda self, *_: self.file.close())
    return count


@pytest.mark.parametrize("export", [False, True], ids=["own", "export"])
@pytest.mark.parametrize("legacy", [False, True], ids=["over new", "over legacy"])
def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new_adapter(export, legacy, tmp_path, monkeypatch):
    """At every system call of a save over another adapter.  A legacy directory has no configuration beside its
    tensors."""
    old, new = small(16.0, 1.0, ["1"]), small(64.0, 2.0, ["1"])
    seen, nth = set(), 0
    for nth in range(100):
        path = tmp_path / str(nth)
        written(old, path, export)
        if legacy:
            save_file(load_file(path / TENSORS), path / TENSORS)
        with monkeypatch.context() as patched:
            count = stops(patched, nth)
            try:
                written(new, path, export)
                done = True
            except Killed:
                done = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = undula.Adapter.load(path)
        got = (what(found), float(found.full["1.weight"][0, 0]))
        assert got in ((what(old), 1.0), (what(new), 2.0)), nth
        seen.add(got)
        new.save(path) if not export else undula.io.export_lora(new, path)
        assert what(undula.Adapter.load(path)) == what(new)
        assert not [p.name for p in path.iterdir() if p.name.startswith(".")], "the next save cleans up"
        if done:
            break
    assert done
    assert nth >= 8
    assert next(count) <= nth + 1
    assert len(seen) == 2


def test_readers_and_writers_at_once_and_kills_see_whole_adapters(tmp_path):
    """Two processes save over each other and are killed; this one reads."""
    pair = small(16.0, 1.0), small(64.0, 2.0)
    whole = {what(a) for a in pair}
    pair[0].save(tmp_path)
    seen = []
    for k in range(8):
        children = []
        for offset in range(2):
            pid = os.fork()
            if not pid:
                try:
                    for i in itertools.count(offset):
                        pair[i % 2].save(tmp_path)
                finally:
                    os._exit(0)
            children.append(pid)
        until = time.monotonic() + 0.03 + 0.011 * k
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                while time.monotonic() < until:
                    seen.append(what(undula.Adapter.load(tmp_path)))
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            seen.append(what(undula.Adapter.load(tmp_path)))
    assert set(seen) <= whole
    pair[1].save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, TENSORS]


def test_a_configuration_of_another_save_is_told(tmp_path):
    small(16.0, 1.0).save(tmp_path / "a")
    small(64.0, 2.0).save(tmp_path / "b")
    (tmp_path / "b" / CONFIG).replace(tmp_path / "a" / CONFIG)
    with pytest.warns(UserWarning, match="is of another save than adapter_model.safetensors"):
        assert undula.Adapter.load(tmp_path / "a").method.alpha == 16.0


@pytest.mark.parametrize("export", [False, True], ids=["own", "export"])
def test_a_configuration_that_was_edited_counts(export, tmp_path):
    """It keeps the mark of its save: who edits a scale or a name means it."""
    written(small(16.0, 1.0), tmp_path, export)
    config = json.loads((tmp_path / CONFIG).read_text())
    if export:
        config |= {"lora_alpha": 6.0, "base_model_name_or_path": "x/y"}
    else:
        config["undula"]["methods"][0]["alpha"] = 6.0
        config["base_model_name_or_path"] = "x/y"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = undula.Adapter.load(tmp_path)
    assert (found.method.alpha, found.about["base_model_name_or_path"]) == (6.0, "x/y")


def test_a_draft_of_a_writer_that_lives_stays(tmp_path):
    small(16.0, 1.0).save(tmp_path)
    with draft.Draft(tmp_path / TENSORS) as other:
        left = tmp_path / f".{TENSORS}.abandoned"
        left.write_bytes(b"x")
        small(64.0, 2.0).save(tmp_path)
        assert other.name.exists()
        assert not left.exists()
    assert not other.name.exists()


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_a_directory_in_the_place_of_a_file_is_refused_before_anything_is_written(name, tmp_path):
    small(16.0, 1.0).save(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    with pytest.raises(IsADirectoryError, match=f"{name} is a directory"):
        small(64.0, 2.0).save(tmp_path)
    assert before == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}


def test_modes_follow_the_umask_and_the_user(tmp_path):
    before = os.umask(0o077)
    try:
        small(16.0, 1.0).save(tmp_path / "a")
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a").iterdir()}
    finally:
        os.umask(before)
    assert modes == {"README.md": 0o600, CONFIG: 0o600, TENSORS: 0o600}
    (tmp_path / "a" / TENSORS).chmod(0o640)
    small(16.0, 1.0).save(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a" / TENSORS).stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "a" / CONFIG).stat().st_mode) == 0o600


@pytest.mark.parametrize("text", [b"# Mine\n", b"\xff\xfe", b""])
def test_a_readme_of_the_user_stays(text, tmp_path):
    small(16.0, 1.0).save(tmp_path)
    assert (tmp_path / "README.md").read_text() == native.README
    (tmp_path / "README.md").write_bytes(text)
    small(16.0, 1.0).save(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == text
    (tmp_path / "README.md").write_text(native.README + "older\n")
    small(16.0, 1.0).save(tmp_path)
    assert (tmp_path / "README.md").read_text() == native.README


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a b", "ü".encode(), b"[x]*?", b"%s"], ids=repr)
def test_directories_of_any_name(name, tmp_path):
    path = tmp_path / os.fsdecode(name)
    for value in (1.0, 2.0):
        small(16.0, value).save(path)
        assert what(undula.Adapter.load(path)) == what(small(16.0, value))
    assert len(list(path.iterdir())) == 3


def test_a_full_disk_is_an_oserror_and_the_old_adapter_stays(tmp_path, monkeypatch):
    small(16.0, 1.0).save(tmp_path)

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(draft.Draft, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        small(64.0, 2.0).save(tmp_path)
    assert what(undula.Adapter.load(tmp_path)) == what(small(16.0, 1.0))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


NAMES = ["task a", "a/b", "c:\\d", "naïve", "日本", "it's", 'say "hi"', "a\nb", "a\tb", "*", "^a$", "(a+)+", "%d",
         "{x}",
                  "\x00", "weight", "lora_A", "undula_factors", "base_layer", "0", "-", "\U0001d54a"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_what_is_saved_under_any_name_is_loaded(name, tmp_path):
    """Every name that torch gives a module: sites and parameters in full, undula's files and PEFT's."""

    def model():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"head": nn.Linear(4, 2), "deep": nn.ModuleDict({"x": nn.Linear(4, 4)})})
        made = nn.Module()
        made.add_module(name, nn.Linear(4, 4))
        made.add_module("in", nn.Module())
        made.get_submodule("in").add_module(f"{name} ", inner)
        return made

    adapter = undula.attach(
        model(), undula.LoRA(r=2), where=re.compile(f"{re.escape(name)}|in.*x", re.DOTALL), full=[f"in.{name} .head"]
    )
    shake(adapter)
    for export in (False, True):
        written(adapter, tmp_path / str(export), export)
        found = undula.attach(model(), undula.Adapter.load(tmp_path / str(export)))
        assert set(found.factors) == set(adapter.factors)
        assert all(torch.equal(found.delta(s), adapter.delta(s)) for s in adapter.factors)
        assert {k: t.tolist() for k, t in found.full.items()} == {k: t.tolist() for k, t in adapter.full.items()}


def test_names_that_no_file_could_hold_are_refused_at_saving(tmp_path):
    """And nothing is written."""
    adapter = small(16.0, 1.0, ["1"])
    for odd in ("\ud800", "a" * 1001, "a..b"):
        moved = {k: {odd: getattr(adapter, k)["0"]} for k in ("methods", "factors", "shapes")}
        for export in (False, True):
            with pytest.raises(ValueError, match=r"UTF-8|not a name of modules"):
                written(dataclasses.replace(adapter, **moved), tmp_path / "x", export)
    for odd, export in (("x.undula_factors.y", False), ("x.lora_A.weight", True), ("x.base_layer.w", True)):
        with pytest.raises(ValueError, match="rename"):
            written(dataclasses.replace(adapter, full={odd: adapter.full["1.bias"]}), tmp_path / "x", export)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("export", [False, True], ids=["own", "export"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_no_reader_takes_are_not_written_over_a_good_adapter(bad, export, tmp_path):
    """A diverged adapter is refused at saving, and what is there stays."""
    written(small(16.0, 1.0), tmp_path / "x", export)
    with pytest.raises(ValueError, match=r"nothing is written to .*holds NaN or infinity"):
        written(small(16.0, bad), tmp_path / "x", export)
    assert float(next(undula.Adapter.load(tmp_path / "x").tensors())[2].flatten()[0]) == 1.0


MADE = {"created_by": f"undula {undula.__version__}"}
SAID = {"revision": "main", "auto_mapping": {"base_model_class": "Net", "parent_library": "here"}}


@pytest.mark.parametrize("export", [False, True], ids=["own", "export"])
def test_what_a_directory_says_beside_is_kept(export, tmp_path):
    """Base, task and the rest, through loading, attaching, copying, arithmetic and saving; arguments count first."""
    own = {} if export else {"created_by": "another version", "training": {"steps": 3, "after": {"loss": 0.5}}}
    said = {**SAID, **own}
    adapter = dataclasses.replace(
        small(16.0, 1.0), about={"base_model_name_or_path": "my/base", "task_type": "CAUSAL_LM", **said}
    )
    written(adapter, tmp_path / "a", export)
    first = undula.Adapter.load(tmp_path / "a")
    assert first.about == adapter.about
    attached = undula.attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), first)
    for i, made in enumerate((first, attached, attached.copy(), first.map(dict), 2 * first - first)):
        written(made, tmp_path / f"b{i}", export)
        assert undula.Adapter.load(tmp_path / f"b{i}").about == adapter.about
    first.save(tmp_path / "c", base="other", task="SEQ_CLS")
    again = undula.Adapter.load(tmp_path / "c").about
    assert again == {**MADE, **adapter.about, "base_model_name_or_path": "other", "task_type": "SEQ_CLS"}
    other = dataclasses.replace(first, about={**said, "task_type": "SEQ_CLS"})
    assert (first + other).about == said, "what the terms disagree on is said by none"


def test_a_directory_says_what_made_it(tmp_path):
    small(16.0, 1.0).save(tmp_path)
    assert undula.Adapter.load(tmp_path).about == MADE


@pytest.mark.parametrize("field", ["classes", "created_by", "training"])
def test_what_is_told_of_an_adapter_has_its_kind(field, tmp_path):
    small(16.0, 1.0).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["undula"][field] = 5
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"`{field}` .* found 5"):
        undula.Adapter.load(tmp_path)


def lora(path, change=None):
    """A PEFT LoRA directory of two layers."""
    undula.io.export_lora(small(16.0, 1.0), path)
    config = json.loads((path / CONFIG).read_text())
    config.pop(files.MARKED)
    (change or dict)(config)
    (path / CONFIG).write_text(json.dumps(config))
    save_file(load_file(path / TENSORS), path / TENSORS)
    return path


MOVED = ["pissa", "pissa_niter_4", "PISSA", "olora", "corda", "loftq", "lora_ga", "what_comes_next", ["pissa"], 3]


@pytest.mark.parametrize("start", MOVED, ids=repr)
def test_starts_that_move_the_base_are_refused_by_name(start, tmp_path):
    with pytest.raises(ValueError, match=r"init_lora_weights=.*Convert it in PEFT"):
        undula.Adapter.load(lora(tmp_path, lambda c: c.update(init_lora_weights=start)))


@pytest.mark.parametrize("start", sorted(STARTS, key=repr), ids=repr)
def test_starts_that_leave_the_base_alone_are_read(start, tmp_path):
    assert what(undula.Adapter.load(lora(tmp_path, lambda c: c.update(init_lora_weights=start))))


FLAGS = {
    "bias": "some", "lora_bias": True, "use_qalora": True, "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1], "trainable_token_indices": [3], "target_parameters": ["x"],
    "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1}, "monteclora_config": {"num_samples": 8}, "velora_config": {"scale": 1.0},
    "megatron_config": {"a": 1}, "loftq_config": {"loftq_bits": 4}, "ensure_weight_tying": True,
    "enable_lora": [True],
    "use_some_future_variant": True, "another": 1, "third": 0.5, "fourth": "on", "use_dora": "yes", "use_rslora": 1.5,
}  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_that_undula_does_not_read_are_refused_by_name(flag, tmp_path):
    with pytest.raises(ValueError, match=flag):
        undula.Adapter.load(lora(tmp_path, lambda c: c.update({flag: FLAGS[flag]})))


@pytest.mark.parametrize("value", [None, False, [], {}, ""], ids=repr)
def test_flags_that_say_nothing_pass(value, tmp_path):
    quiet = {k: value for k in FLAGS if not k.startswith("use_") and k != "bias"}
    assert what(undula.Adapter.load(lora(tmp_path, lambda c: c.update(quiet))))


BAD = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    '"nan"',
    '"1e308"',
    '"16"',
    "true",
    "[1]",
    "{}",
    "null",
    '1.0, "ALPHA": 1e300',
]


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("export", [False, True], ids=["own", "export"])
def test_numbers_that_are_none_are_refused(export, text, tmp_path):
    """Also a key that is there twice: which of the two would count?"""
    written(small(16.0, 1.0), tmp_path, export)
    key = "lora_alpha" if export else "alpha"
    file = tmp_path / CONFIG
    before = '"lora_alpha": 2' if export else '"alpha": 16.0'
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, f'"{key}": {text.replace("ALPHA", key)}'))
    with pytest.raises(ValueError, match=f"{key}|is no number of JSON|is there twice"):
        undula.Adapter.load(tmp_path)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_refused_wherever_it_stands(text, tmp_path):
    """Also in a key that nobody looks at: it would be written back, and no other reader of JSON takes it."""
    written(small(16.0, 1.0), tmp_path, False)
    file = tmp_path / CONFIG
    file.write_text(file.read_text().replace("{", f'{{"note": {text},', 1))
    with pytest.raises(ValueError, match=f"{text} is no number of JSON"):
        undula.Adapter.load(tmp_path)


TYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("export", [False, True], ids=["own", "export"])
@pytest.mark.parametrize("which", ["0", "1.weight"], ids=["factor", "full"])
def test_tensors_of_other_types_are_refused(which, export, dtype, tmp_path):
    written(small(16.0, 1.0, ["1"]), tmp_path, export)
    tensors = load_file(tmp_path / TENSORS)
    key = next(k for k in tensors if k.startswith(f"{files.PREFIX}{which}"))
    save_file({**tensors, key: tensors[key].to(dtype)}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=r"torch\.|of the type 'C64'"):
        undula.Adapter.load(tmp_path)


def test_a_bool_is_one_of_two_whatever_its_byte_says(tmp_path):
    """Other bytes than 0 and 1 would make a True that is unlike itself."""
    save_file({"mask": torch.tensor([True, False, True])}, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(raw[:-3] + bytes([2, 0, 255]))
    with open(tmp_path / "a.safetensors", "rb") as file:
        found, _ = tensorfile.entries(file, "a")
        mask = tensorfile.read(file, found, "a")["mask"]
    assert mask.view(torch.uint8).tolist() == [1, 0, 1]


@pytest.mark.parametrize("export", [False, True], ids=["own", "export"])
def test_numbers_beyond_float32_are_refused(export, tmp_path):
    written(small(16.0, 1.0), tmp_path, export)
    tensors = load_file(tmp_path / TENSORS)
    save_file({k: t.double() * 1e300 for k, t in tensors.items()}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="beyond float32's range"):
        undula.Adapter.load(tmp_path)


def test_numbers_beyond_the_models_type_are_refused_when_attached():
    adapter = small(16.0, 1.0, ["1"]).copy()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    beyond = {
        "1.weight": dataclasses.replace(adapter, full={n: t.double() * 1e300 for n, t in adapter.full.items()}),
        "0.A": adapter.map(lambda f: {**f, "A": f["A"].double() * 1e300}),
    }
    for shown, large in beyond.items():
        with pytest.raises(ValueError, match=f"{shown} holds numbers beyond the range of torch.float32"):
            undula.attach(model, large)


INDICES = {
    "SHiRA": (undula.SHiRA(r=1, mask=undula.starts.masks.Magnitude()), "index"),
    "S2FT": (undula.S2FT(share=0.3, selection=undula.starts.channels.Weight()), "order"),
    "UniLoRA": (undula.UniLoRA(r=2, d=30), "index_A"),
    "DyLoRA": (undula.DyLoRA(r=3), "b"),
}
WRAPPED = {
    "bare": lambda m: m,
    "Dropout": lambda m: undula.Dropout(m, 0.1),
    "DoRA": undula.DoRA,
    "Sum": lambda m: undula.Sum((undula.LoRA(r=1), m), (1.0, 1.0)),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("method", INDICES)
@pytest.mark.parametrize("value", [10**9, -1])
def test_indices_outside_the_layer_are_refused(value, method, wrapper, tmp_path):
    """When loaded, and when a hand-made adapter is attached: in the forward they would be an IndexError, or end a
    process on a GPU."""
    m, name = INDICES[method]
    model = net().float()
    adapter = undula.attach(model, WRAPPED[wrapper](m), where="*")
    site = next(iter(adapter.factors))
    name = next(k for k in adapter.factors[site] if k.split("_", 1)[-1] == name or k == name)
    adapter.factors[site][name].data.flatten()[:1].fill_(value)
    if not adapter.factors[site][name].ndim:
        adapter.factors[site][name].data.fill_(value)
    adapter.save(tmp_path)
    with pytest.raises(ValueError, match=rf"{name.split('_', 1)[-1] if wrapper == 'Sum' else name} (has|is|does)"):
        undula.Adapter.load(tmp_path)
    with pytest.raises(ValueError, match=r"numbers from|does not rise|is no order"):
        undula.attach(net().float(), adapter)


CLAIMS = {
    "VeRA": (undula.VeRA(r=4), lambda u: u["methods"][0].update(r=10_000), [0, 8000, 8000]),
    "VeRA alone": (undula.VeRA(r=4), lambda u: None, [0, 8, 1 << 30]),
    "TeRA": (undula.TeRA(r=2), lambda u: u["methods"][0].update(r=16_000_000), None),
    "TeRA overflow": (undula.TeRA(r=2), lambda u: u["methods"][0].update(r=10**18, modes=9), None),
    "UniLoRA": (undula.UniLoRA(r=2, d=9), lambda u: None, [0, 2_000_000, 8]),
    "NOLA": (undula.NOLA(r=2, k=2, l=2), lambda u: None, [0, 8, 1 << 30]),
    "SHiRA": (undula.SHiRA(r=1), lambda u: None, [0, 16_000_000, 8]),
    "S2FT": (undula.S2FT(share=0.3), lambda u: None, [0, 1 << 30, 8]),
    "LoRTA": (undula.LoRTA(r=2), lambda u: u["methods"][0].update(heads=10**15), [0, (1 << 31) - 1, (1 << 31) - 1]),
    "LoRA": (undula.LoRA(r=2), lambda u: u["methods"][0].update(r=10**30), None),
    "many parts": (
        undula.LoRA(r=2),
        lambda u: u.update(methods=[{"is": "Sum", "parts": u["methods"] * 30_000, "weights": [1.0] * 30_000}]),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_costs_no_more_than_the_file_that_makes_it(claim, tmp_path, monkeypatch):
    """Nothing is drawn for it: what is stored must fit the claim, and what would be rebuilt is in proportion."""
    method, change, shape = CLAIMS[claim]
    undula.attach(nn.Sequential(nn.Linear(8, 8)), method).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    change(config["undula"])
    if shape:
        config["undula"]["sites"] = dict.fromkeys(config["undula"]["sites"], shape)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    monkeypatch.setattr("undula.kernels.frozen.numbers", lambda words, start, n: pytest.fail(f"drew {n} numbers"))
    with pytest.raises(ValueError, match="an integer of|" + re.escape(str(tmp_path))):
        undula.Adapter.load(tmp_path)


def test_what_would_be_out_of_proportion_is_stored(tmp_path):
    """Then the file is as large as what is loaded from it, and loading refuses nothing that saving wrote."""
    adapter = undula.attach(nn.Sequential(nn.Linear(4, 4)), undula.TeRA(r=40, modes=2))
    adapter.save(tmp_path)
    assert native._rebuildable(adapter) == {}
    found = undula.Adapter.load(tmp_path)
    assert all(torch.equal(t, found.factors[s][k]) for s, k, t in adapter.tensors())


def test_a_sum_of_many_and_nested_sums_come_back_or_are_refused(tmp_path):
    total = one = small(16.0, 1.0).copy()
    for _ in range(60):
        total = total + one
    total.save(tmp_path / "a")
    assert undula.Adapter.load(tmp_path / "a").method == total.method == undula.Sum((one.method,), (61.0,))
    for _ in range(120):  # as no arithmetic makes them
        methods = {s: undula.Sum((m,), (1.0,)) for s, m in total.methods.items()}
        factors = {s: {f"0_{k}": t for k, t in f.items()} for s, f in total.factors.items()}
        total = undula.Adapter(methods, factors, total.shapes)
    with pytest.raises(ValueError, match="nested more than"):
        total.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_patterns_cannot_take_for_ever(tmp_path):
    """PEFT takes them for regular expressions; a file's are names, or simple enough."""
    site = "a" * 40
    for odd in ("(a+)+", "(a|a)*", "a*a*", "(", "[", "a{9999999999}", "[x]" + "x" * 2000):
        with pytest.raises(ValueError, match="alpha_pattern has"):
            patterns({"alpha_pattern": {odd: 3}}, "alpha_pattern", "here").of(site, 1)
    found = patterns({"alpha_pattern": {
        "^model.q$": 1, "layers.0.q": 2, r"^layers\.1\.q$": 3, "layers.[0-9].k": 4, ".*up": 5, "q": 6, "task\\ a": 7,
    }}, "alpha_pattern", "here")  # fmt: skip
    asked = {"model.q": 1, "x.layers.0.q": 2, "layers.1.q": 3, "x.layers.1.q": 6, "x.layers.7.k": 4, "a.gate_up": 5,
             "q": 6,             "task a": 7, "x.xq": None}  # fmt: skip
    assert {site: found.of(site, None) for site in asked} == asked


NESTED = '{"z": ' + "[" * 3000 + "]" * 3000 + "}"
REFUSED = {
    "kernels": lambda c: c["undula"].update(kernels=[]),
    "kernel": lambda c: c["undula"].update(kernels={"0": 3}),
    "tied": lambda c: c["undula"].update(tied=[1]),
    "tied to none": lambda c: c["undula"].update(tied={"x": 3}),
    "rebuilt": lambda c: c["undula"].update(rebuilt={"x": {}}),
    "frozen": lambda c: c["undula"].update(frozen=3),
    "frozen what": lambda c: c["undula"].update(frozen=["9.A"]),
    "order": lambda c: c["undula"].update(order=[["0"], "1"]),
    "methods": lambda c: c["undula"].update(methods=[3]),
    "method": lambda c: c["undula"].update(methods=["LoRA"]),
    "field": lambda c: c["undula"]["methods"][0].update(scaling=3),
    "nested field": lambda c: c["undula"]["methods"][0].update(scaling={"is": "Fixed", "s": []}),
    "large": lambda c: c["undula"]["methods"][0].update(r=10**30),
    "rung": lambda c: c["undula"].update(methods=[{"is": "DoRA", "inner": {"is": "AuroRA"}}]),
    "bool": lambda c: c["undula"]["sites"].update({"0": [False, 8, 8]}),
    "unknown": lambda c: c["undula"].update(later=1),
    "base": lambda c: c.update(base_model_name_or_path=[1]),
    "task": lambda c: c.update(task_type=3),
    "type": lambda c: c.update(peft_type=["UNDULA"]),
    "undula": lambda c: c.update(undula=[]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_of_a_configuration_is_documented(name, tmp_path):
    small(16.0, 1.0).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    REFUSED[name](config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises((ValueError, LookupError), match=re.escape(str(tmp_path))):  # whose configuration it is
        undula.Adapter.load(tmp_path)


def header(shape=(2,), dtype="F32", offsets=(0, 8), **more):
    text = json.dumps({"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


HEADERS = {
    "disagrees": header(shape=(3,)),
    "many dimensions": header(shape=[1] * 9),
    "large": header(shape=[9] * 1_300),
    "huge": header(shape=[1 << 62, 1 << 62]),
    "negative": header(shape=(-2,)),
    "no number": header(shape=("2",)),
    "bool": header(shape=(True, 2)),
    "F4": header(dtype="F4"),
    "F8": header(dtype="F8_E4M3", shape=(8,)),
    "overlap": header(offsets=(4, 12)),
    "more": header(more=1),
    "list": (2).to_bytes(8, "little") + b"[]",
    "nested": (6000).to_bytes(8, "little") + b"[" * 6000,
    "twice": (90).to_bytes(8, "little")
    + (b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 1}').ljust(90),
    "empty": b"",
    "text": b'{"z": 1}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_every_refusal_of_tensors_is_documented(name, tmp_path):
    small(16.0, 1.0).save(tmp_path)
    (tmp_path / TENSORS).write_bytes(HEADERS[name])
    with pytest.raises(ValueError, match="safetensors"):
        undula.Adapter.load(tmp_path)


@pytest.mark.parametrize(
    "text", [NESTED, "[]", "3", '"x"', "\ud800", '{"a": 1, "a": 1}', "", "{" * 10**5], ids=range(8)
)
def test_every_refusal_of_json_is_documented(text, tmp_path):
    small(16.0, 1.0).save(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=CONFIG):
        undula.Adapter.load(tmp_path)


def test_an_allocators_state_is_of_one_save(tmp_path):
    """The values beside the tensors count, whatever a killed save left in the JSON file; a state of an earlier version
    has them there alone."""
    files.write_state(tmp_path, "state", {"step": 1}, {"t": torch.ones(2)})
    (tmp_path / "state.json").write_text('{"step": 0}')
    values, tensors = files.read_state(tmp_path, "state")
    assert (values, tensors["t"].tolist()) == ({"step": 1}, [1.0, 1.0])
    save_file({"t": torch.ones(2)}, tmp_path / "state.safetensors")
    assert files.read_state(tmp_path, "state")[0] == {"step": 0}
    (tmp_path / "state.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="no safetensors file"):
        files.read_state(tmp_path, "state")


def test_a_parameter_that_is_tied_may_be_held_in_full(tmp_path):
    """An output head that shares the embedding's matrix, trained as a matrix of its own, as PEFT's modules_to_save
    does: it alone is replaced."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.body(self.embed(x)))

    free = Tied()
    free.head.weight = nn.Parameter(torch.randn(9, 4))
    adapter = undula.attach(free, undula.LoRA(r=2), where=["body"], full=["head"])
    shake(adapter)
    adapter.save(tmp_path)
    tied, x = Tied(), torch.arange(9)
    base = tied(x)
    undula.attach(tied, undula.Adapter.load(tmp_path))
    assert torch.equal(tied(x), free(x))
    undula.select(tied, None)
    assert tied.head.weight is tied.embed.weight
    assert torch.equal(tied(x), base)


RUNS = {
    "overrides": [],
    "method": 3,
    "task": "NoSuchTask",
    "lr": [],
    "data": {"x": []},
    "what": 1,
    "allocator": [1],
}


@pytest.mark.parametrize("name", RUNS)
def test_every_refusal_of_a_runs_description_is_documented(name, tmp_path):
    """A directory of `undula train` has a run.json: it is no more trusted than the adapter."""
    pytest.importorskip("transformers")
    from undula.train import Classification, Run

    Run(model="m", data="d.csv", task=Classification(), method=undula.LoRA(r=2), out=tmp_path).save(None)
    found = json.loads((tmp_path / "run.json").read_text())
    assert Run.load(tmp_path).method == undula.LoRA(r=2)
    found["run"][name] = RUNS[name]
    (tmp_path / "run.json").write_text(json.dumps(found))
    with pytest.raises((ValueError, LookupError)):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        Run.load(tmp_path)


def test_numbers_without_a_dimension_are_still_read(tmp_path):
    """As LoRAN's trained constants were written before they had one (FSDP2 cuts no others)."""
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = undula.attach(model, undula.LoRAN(r=2, learn=("a", "w")))
    shake(adapter)
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    lone = [k for k, t in tensors.items() if t.shape == (1,)]
    assert len(lone) == 2
    save_file({k: t[0] if k in lone else t for k, t in tensors.items()}, tmp_path / TENSORS)
    again = undula.Adapter.load(tmp_path)
    for site, name, t in adapter.tensors():
        torch.testing.assert_close(again.factors[site][name], t)
