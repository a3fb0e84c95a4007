"""A directory read one layer at a time is what `load` reads; one that is written so is what `save` writes, whole or not
at all; and the memory is that of a layer."""

import json
import warnings
import weakref
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import undula
from tests.laws.test_files import Killed, small, stops, what
from tests.support.layers import net
from tests.support.numbers import shake
from undula.io import files, sites, tensorfile
from undula.io.sites import Opened, Writer, walk

FIXTURES = Path(__file__).parents[1] / "fixtures" / "adapters"


def same(found, wanted):
    """The same methods, shapes, tensors and marks; tensors that are one are one."""
    for part in ("methods", "shapes", "kernels", "apart", "about"):
        assert getattr(found, part) == getattr(wanted, part), part
    every = list(zip(found.tensors(), wanted.tensors(), strict=True))
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in every)
    assert all(a[2].requires_grad == b[2].requires_grad for a, b in every)
    assert len({id(a[2]) for a, _ in every}) == len({id(b[2]) for _, b in every})
    assert found.full.keys() == wanted.full.keys()
    assert all(torch.equal(t, wanted.full[name]) for name, t in found.full.items())


def copied(source, target):
    """A directory, read and written layer by layer."""
    with Opened(source) as opened, Writer(target) as writer:
        for site in opened.methods:
            writer.add(opened.site(site))
        full = {name: opened.parameter(name) for name in opened.outline.full}
        writer.finish(full, opened.outline.about)


def experts(path):
    """A plain LoRA on the parameters of a mixture, as PEFT writes it, beside one on a layer."""
    torch.manual_seed(0)
    shapes = {
        "m.experts.base_layer.lora_A": (6, 5), "m.experts.base_layer.lora_B": (8, 6),
        "m.experts.lora_A": (3, 4), "m.experts.lora_B": (5, 3), "m.router.lora_A": (2, 5), "m.router.lora_B": (3, 2),
    }  # fmt: skip
    path.mkdir()
    tensors = {f"base_model.model.{k}.weight": torch.randn(shape) for k, shape in shapes.items()}
    save_file(tensors, path / files.TENSORS)
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["router"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"router": 7, "m.experts.down_proj": 5},
    }  # fmt: skip
    (path / files.CONFIG).write_text(json.dumps(config))


def diffusers(path):
    torch.manual_seed(0)
    adapter = shake(undula.attach(net(), undula.LoRA(r=2, alpha=3.0), overrides={"2": undula.LoRA(r=1)}).copy())
    undula.io.export_diffusers(adapter, path)


MADE = {"experts": experts, "diffusers": diffusers}


@pytest.mark.parametrize("kind", [*sorted(p.name for p in FIXTURES.iterdir() if p.is_dir()), *MADE])
def test_layer_by_layer_is_the_whole(kind, tmp_path):
    """What earlier versions wrote, PEFT's and diffusers' forms: read so it is what `load` gives, and what is written so
    loads as the same."""
    source = FIXTURES / kind
    if kind in MADE:
        source = tmp_path / "source"
        MADE[kind](source)
    wanted = undula.Adapter.load(source)
    with Opened(source) as opened:
        assert all(t.is_meta for _, _, t in opened.outline.tensors())
        parts = [opened.site(site) for site in opened.methods]
        for part, (site, f) in zip(parts, wanted.factors.items(), strict=True):
            assert list(part.factors) == [site]
            assert all(torch.equal(part.factors[site][k], t) for k, t in f.items())
        with pytest.raises(LookupError, match="nothing at 'nowhere'"):
            opened.site("nowhere")
    copied(source, tmp_path / "copy")
    wanted.save(tmp_path / "saved")
    same(undula.Adapter.load(tmp_path / "copy"), undula.Adapter.load(tmp_path / "saved"))
    sizes = [(tmp_path / name / files.TENSORS).stat().st_size for name in ("saved", "copy")]
    assert abs(sizes[0] - sizes[1]) < 64, "what is shared, or made anew from a seed, is not stored again"


def test_a_walk_is_over_the_layers_of_all_and_refuses_other_models(tmp_path):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    for name, where in (("a", ["0", "1"]), ("b", ["1", "2"])):
        undula.attach(model, undula.LoRA(r=1), where, name=name).save(tmp_path / name)
    held = undula.Adapter.load(tmp_path / "b")
    with Opened(tmp_path / "a") as a:
        found = {site: [part is not None for part in parts] for site, parts in walk([a, held])}
    assert found == {"0": [True, False], "1": [True, True], "2": [False, True]}
    other = undula.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)), undula.LoRA(r=1)).copy()
    with pytest.raises(ValueError, match=r"different models: 1 is \(4, 4\) and \(5, 4\)"):
        list(walk([held, other]))


def test_the_memory_is_that_of_one_layer(tmp_path, monkeypatch):
    """Eight adapters of sixteen layers: of all the tensors that are read, no more live at once than those of one layer
    of each, and no file is read further than asked."""
    size, number, layers = 64, 8, 16
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))
    for i in range(number):
        undula.attach(model, undula.LoRA(r=2), name=str(i)).save(tmp_path / str(i))
    read, alive, most = tensorfile.read, weakref.WeakValueDictionary(), [0]

    def counted(*arguments):
        found = read(*arguments)
        alive.update({id(t): t for t in found.values()})
        most[0] = max(most[0], sum(t.numel() for t in alive.values()))
        return found

    monkeypatch.setattr(sites.tensorfile, "read", counted)
    with ExitStack() as stack, Writer(tmp_path / "out") as writer:
        opened = [stack.enter_context(Opened(tmp_path / str(i))) for i in range(number)]
        assert most[0] == 0, "opening reads no numbers"
        for site, parts in walk(opened):
            writer.add(sum(parts).site(site))
            del parts
        writer.finish()
    one = 2 * 2 * size  # the numbers of one layer of one adapter
    assert number * one <= most[0] <= 2 * number * one  # of the layer before until the loop lets go of it
    assert len(undula.Adapter.load(tmp_path / "out").methods) == layers


def test_a_writing_that_is_killed_anywhere_leaves_the_old_or_the_new_adapter(tmp_path, monkeypatch):
    """At every system call, over another adapter; one that ends before `finish` leaves nothing."""
    old, new = small(16.0, 1.0), small(64.0, 2.0)
    new.save(tmp_path / "new")
    seen, done = set(), False
    for nth in range(100):
        path = tmp_path / str(nth)
        old.save(path)
        with monkeypatch.context() as patched:
            stops(patched, nth)
            try:
                copied(tmp_path / "new", path)
                done = True
            except Killed:
                pass
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = what(undula.Adapter.load(path))
        assert found in (what(old), what(new))
        seen.add(found)
        if done:
            break
    assert done
    assert len(seen) == 2
    with Writer(tmp_path / "begun") as writer:
        writer.add(new.site("0"))
    assert not (tmp_path / "begun").exists()


def test_a_save_over_an_opened_directory_changes_nothing_there(tmp_path):
    old, new = small(16.0, 1.0), small(64.0, 2.0)
    old.save(tmp_path)
    with Opened(tmp_path) as opened:
        new.save(tmp_path)
        assert what(opened.site("0")) == what(old)
    assert what(undula.Adapter.load(tmp_path)) == what(new)


def test_numbers_that_no_adapter_has_are_refused_where_they_are_read_and_written(tmp_path):
    adapter = small(16.0, 1.0).copy()
    adapter.save(tmp_path / "a")
    path = tmp_path / "a" / files.TENSORS
    with open(path, "rb") as file:
        entries, _ = tensorfile.entries(file, str(path))
    entry = next(e for k, e in entries.items() if ".1." in k)
    with open(path, "r+b") as file:
        file.seek(entry.begin)
        file.write(b"\xff" * 4)
    with Opened(tmp_path / "a") as opened:
        opened.site("0")
        with pytest.raises(ValueError, match="NaN or infinity"):
            opened.site("1")
    adapter.factors["0"]["A"].data[0, 0] = torch.nan
    with Writer(tmp_path / "b") as writer, pytest.raises(ValueError, match="NaN or infinity"):
        writer.add(adapter.site("0"))
