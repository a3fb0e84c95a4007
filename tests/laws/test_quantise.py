"""quantise: what integers cost, on the disk and in the update; and that whoever reads an adapter reads this one.

Oracles: torchao's own primitives, the dense update, the files.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import undula
from tests.support.numbers import shake
from undula import DoRA, LoRA, LoRAN, SHiRA, compress
from undula.cli.main import app
from undula.io import tensorfile
from undula.io.outline import head
from undula.io.packing import Packing
from undula.io.sites import Opened
from undula.methods.activations import Sinter

FIXTURES = sorted(p for p in (Path(__file__).parents[1] / "fixtures/adapters").iterdir() if p.is_dir())
LAYER, FILE = "0", "adapter_model.safetensors"


def adapter_of(m=LoRA(r=8), I=300, O=200, **more):
    return shake(undula.attach(nn.Sequential(nn.Linear(I, O)), m, **more)).copy()


def same(a, b):
    assert a.methods == b.methods
    assert a.shapes == b.shapes
    for site, name, t in a.tensors():
        assert torch.equal(b.factors[site][name], t), (site, name)
        assert b.factors[site][name].dtype == t.dtype or not t.numel()
        assert b.factors[site][name].requires_grad == t.requires_grad


def shared(adapter):
    every = [t for _, _, t in adapter.tensors()]
    return [next(i for i, u in enumerate(every) if u is t) for t in every]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(6, 100), (100, 7), (3, 64), (5, 3, 40), (130,), (1, 1)])
def test_every_number_goes_to_its_nearest_integer_as_torchao_rounds(bits, shape):
    """At the same scales torchao has the same integers and the same numbers; none is further than half a step but for
    what is cut in 4 bits."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    how, x = Packing(bits, group=16), torch.randn(shape)
    q, scale = how.pack(x)
    found = how.unpack(q, scale, x.shape, "x")
    axis = max(range(x.ndim), key=lambda i: shape[i])
    rows = x.movedim(axis, -1).reshape(-1, shape[axis])
    padded = nn.functional.pad(rows, (0, -rows.shape[1] % 16))
    kinds = (1, 16), scale.float(), torch.zeros_like(scale, dtype=torch.int32)
    limits = (-127, 127) if bits == 8 else (-7, 7)
    theirs = primitives.quantize_affine(padded, *kinds, torch.int8, *limits)
    numbers = primitives.dequantize_affine(theirs, *kinds, torch.int8, *limits)[:, : rows.shape[1]]
    torch.testing.assert_close(found.movedim(axis, -1).reshape(numbers.shape), numbers, rtol=1e-6, atol=0)
    step = scale.float().repeat_interleave(16, 1)[:, : rows.shape[1]]
    far = ((found.movedim(axis, -1).reshape(rows.shape) - rows).abs() / step).max()
    assert far <= 0.5 * (1 + 127 * 2**-8) if bits == 8 else far < 3
    assert torch.equal(how.unpack(*how.pack(found), x.shape, "x"), found)  # again changes nothing


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_that_is_larger_than_a_row_takes_no_more_memory(bits):
    """A file says how large it is, so what a file says fills no memory."""
    largest = 0

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            largest = max(largest, found.numel() if isinstance(found, torch.Tensor) else 0)
            return found

    x, whole, row = torch.randn(20, 30), Packing(bits, group=1_000_000), Packing(bits, group=30)
    with Watched():
        q, scale = whole.pack(x)
        found = whole.unpack(q, scale, x.shape, "x")
    assert largest <= 2 * x.numel()
    assert torch.equal(found, row.unpack(*row.pack(x), x.shape, "x"))


@pytest.mark.parametrize(("bits", "share", "error"), [(8, 0.53, 0.012), (4, 0.28, 0.2)])
@pytest.mark.parametrize("m", [LoRA(r=8), LoRAN(r=8, activation=Sinter(a=0.5, w=2.0)), SHiRA(r=8)], ids=repr)
def test_half_and_a_quarter_of_sixteen_bits_and_the_error_is_the_updates(m, bits, share, error, tmp_path):
    adapter = adapter_of(m, 900, 600)
    adapter = adapter.map(lambda f: {k: t.detach().bfloat16() if t.is_floating_point() else t for k, t in f.items()})
    adapter.save(tmp_path / "wide")
    made = undula.quantise(adapter, bits)
    assert made.save(tmp_path / "small") == sum(p.stat().st_size for p in (tmp_path / "small").iterdir())
    sizes = [(tmp_path / n / FILE).stat().st_size for n in ("small", "wide")]
    if not isinstance(m, SHiRA):  # whose places are integers already
        assert sizes[0] <= share * sizes[1] + 2500  # the configuration in it
    read = undula.Adapter.load(tmp_path / "small")
    same(made.adapter, read)
    double = lambda f: {k: t.double() if t.is_floating_point() else t for k, t in f.items()}  # noqa: E731
    before, after = (a.map(double).delta(LAYER) for a in (adapter, read))
    missed, whole = (after - before).norm(), before.norm()
    assert made.errors[LAYER] == pytest.approx(float(missed / whole), rel=1e-6)
    assert 0 < made.error <= error


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.name)
def test_whatever_reads_an_adapter_reads_it(path, tmp_path):
    """Every method: loaded, layer by layer, its outline; saved from there it holds numbers.  What a seed makes stays to
    the bit, what sites share they go on sharing."""
    adapter = undula.Adapter.load(path)
    made = compress.quantise_directory(path, tmp_path / "q", 8, group=16)
    read = undula.Adapter.load(tmp_path / "q")
    kept = undula.quantise(adapter, 8, group=16)
    same(kept.adapter, read)
    assert kept.errors == made.errors
    assert {**read.about, "created_by": 0} == {**adapter.about, "created_by": 0}
    assert list(read.full) == list(adapter.full)
    assert all(torch.equal(t, read.full[n]) for n, t in adapter.full.items())
    assert shared(read) == shared(adapter)
    with Opened(tmp_path / "q") as opened:
        for site in read.methods:
            for name, t in opened.site(site).factors[site].items():
                assert torch.equal(t, read.factors[site][name])
    outline = head(tmp_path / "q").outline()
    assert [(s, n, t.shape, t.dtype) for s, n, t in outline.tensors()] == [
        (s, n, t.shape, t.dtype) for s, n, t in read.tensors()
    ]
    read.save(tmp_path / "numbers")
    same(read, undula.Adapter.load(tmp_path / "numbers"))
    assert "quantised" not in json.loads((tmp_path / "numbers" / "adapter_config.json").read_text())["undula"]


def test_what_is_small_or_counts_stays():
    """DoRA's magnitudes multiply the base's weight; a bfloat16 adapter is read as bfloat16."""
    made = undula.quantise(adapter_of(DoRA(LoRA(r=8))), 4)
    assert torch.equal(made.adapter.factors[LAYER]["m"], made.given.factors[LAYER]["m"])
    assert not torch.equal(made.adapter.factors[LAYER]["A"], made.given.factors[LAYER]["A"])
    zero = undula.attach(nn.Sequential(nn.Linear(9, 8)), LoRA(r=2)).copy()
    assert undula.quantise(zero, 4).error == 0
    tiny = adapter_of().map(lambda f: {k: t.detach() * 1e-9 for k, t in f.items()})
    assert undula.quantise(tiny, 8).error < 0.02


def test_a_method_without_an_update_tells_the_error_of_its_factors():
    adapter = adapter_of(undula.AuroRA())
    made = undula.quantise(adapter, 8)
    assert made.by_factors == (LAYER,)
    assert 0 < made.error < 0.02


def test_damage_is_refused_by_name(tmp_path):
    undula.quantise(adapter_of(), 4).save(tmp_path)
    with (tmp_path / FILE).open("rb") as file:
        found, _ = tensorfile.entries(file, "")
        tensors = tensorfile.read(file, found, "")
    text = (tmp_path / "adapter_config.json").read_text()

    def damaged(config=None, **changed):
        config = json.loads(text) if config is None else config
        kept = {k: changed.get(k.rpartition("undula_factors.")[2].replace(".", "_"), t) for k, t in tensors.items()}
        with (tmp_path / FILE).open("wb") as file:
            tensorfile.write(file, {k: t for k, t in kept.items() if t is not None}, {})
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        for read in (undula.Adapter.load, lambda p: Opened(p).site(LAYER)):
            with pytest.raises(ValueError, match=r"quantised|no [48] bits|scales|factors? (\[')?A") as told:
                read(tmp_path)
            assert str(tmp_path) in str(told.value)

    for wrong in ({"bits": 5}, {"bits": 8}, {"group": 0}, {"group": 7}, {"dtype": "int8"}, {"more": 1}):
        config = json.loads(text)
        config["undula"]["quantised"] |= wrong
        damaged(config)
    config = json.loads(text)
    del config["undula"]["quantised"]
    damaged(config)
    damaged(A=tensors[next(k for k in tensors if k.endswith("factors.A"))][:-1])
    damaged(A_undula_scale=None)
    damaged(A=None)


def test_nan_is_refused():
    adapter = adapter_of()
    with torch.no_grad():
        adapter.factors[LAYER]["B"][3, 2] = float("inf")
    with pytest.raises(ValueError, match="0: the factor B holds NaN or infinity"):
        undula.quantise(adapter, 8)
    with pytest.raises(ValueError, match="4 or 8"):
        undula.quantise(adapter, 5)


def test_the_verb_and_what_leaves_from_there(tmp_path):
    """A plain LoRA of PEFT's, dequantised."""
    adapter = adapter_of()
    adapter.save(tmp_path / "many" / "a")
    run = CliRunner().invoke
    told = tmp_path / "told.json"
    q = tmp_path / "q"
    done = run(app, ["quantise", str(tmp_path / "many" / "a"), "--bits", "4", "--out", str(q), "--json", str(told)])
    assert done.exit_code == 0, done.output
    found = json.loads(told.read_text())
    assert found["error"] == pytest.approx(undula.quantise(adapter, 4).error)
    assert found["bytes"] == sum(p.stat().st_size for p in q.iterdir()) < found["bytes_before"]
    assert "integers of 4 bits" in (q / "README.md").read_text()
    undula.io.export_lora(undula.Adapter.load(q), tmp_path / "lora")
    torch.testing.assert_close(undula.Adapter.load(tmp_path / "lora").delta(LAYER), undula.Adapter.load(q).delta(LAYER))
    assert run(app, ["quantise", str(tmp_path / "many"), "--bits", "5", "--out", str(tmp_path / "x")]).exit_code == 2
    assert not (tmp_path / "x").exists()
    done = run(app, ["quantise", str(tmp_path / "many"), "--out", str(tmp_path / "all")])
    assert done.exit_code == 0, done.output
    assert undula.Adapter.load(tmp_path / "all" / "a").method == adapter.method
