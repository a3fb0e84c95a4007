"""In a notebook: what is shown of an adapter, and a first call that does not fit."""

import re
import time
import warnings

import pytest
import torch
from torch import nn

import undula
from undula.core.sketch import norms


def model(layers=2):
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def filled(adapter):
    for p in adapter.parameters():
        nn.init.normal_(p)
    return adapter


@pytest.mark.parametrize("method", [undula.LoRA(r=2), undula.GatedLoRA(r=2), undula.LoRAN(r=2), undula.AuroRA(r=2)])
def test_an_adapter_is_shown_as_a_table_and_a_bar_for_each_layer(method):
    """A bar is as high as what the adapter does there: |B A| where there is a B A, else the norm of what trains."""
    adapter = filled(undula.attach(model(3), method))
    with torch.no_grad():
        for t in adapter.factors["1"].values():
            t.mul_(10 if t.is_floating_point() else 1)
    shown = adapter._repr_html_()
    assert shown.startswith("<table>")
    assert f"{adapter.num_parameters():,} train" in shown
    sizes = {n: float(v) for n, v in re.findall(r"<title>(\d): ([\d.e+-]+)</title>", shown)}
    assert list(sizes) == ["0", "1", "2"]
    for site, size in sizes.items():
        f = adapter.factors[site]
        plain = isinstance(method, undula.LowRank)
        want = method.delta(f).norm() if plain else sum(t.square().sum() for t in f.values() if t.requires_grad) ** 0.5
        assert size == pytest.approx(float(want), rel=1e-2)
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"><title>', shown)]
    assert max(heights) == heights[1] == 60.0
    assert ("|B A|" in shown) == isinstance(method, undula.LowRank)


def test_what_is_shown_of_a_large_adapter_is_small_and_soon_there():
    adapter = undula.attach(model(1000), undula.LoRA(r=2))
    begun = time.process_time()
    shown = adapter._repr_html_()
    assert time.process_time() - begun < 2
    assert len(shown) < 40_000
    assert 60 < shown.count("<rect") <= 160


def test_names_of_layers_are_text_in_what_is_shown():
    adapter = undula.attach(nn.ModuleDict({"<b>": nn.Linear(4, 4), "&": nn.Linear(4, 4)}), undula.LoRA(r=2))
    shown = adapter._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;" in shown


def test_what_has_no_numbers_or_no_layers_is_shown_too():
    assert undula.Adapter({}, {}, {})._repr_html_().startswith("<table>")
    meta = {"A": torch.empty(2, 4, device="meta"), "B": torch.empty(4, 2, device="meta")}
    sites = {"a": undula.LoRA(r=2), "b": undula.LoRA(r=2)}
    assert norms(sites, dict.fromkeys(sites, meta)) == {}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: undula.attach(undula.LoRA(), m), "the model comes first, as in undula.attach(model, undula.LoRA())"),
        (lambda m: undula.attach("gpt2", undula.LoRA()), "AutoModel.from_pretrained('gpt2')"),
        (
            undula.attach,
            "attach needs what. It is called like this: undula.attach(model, undula.LoRA(r=8)",
        ),
        (lambda m: undula.attach(), "attach needs model, what"),
        (lambda m: undula.attach(m, undula.LoRA(), ["0"], "x"), "attach takes model, what, where in this order"),
        (lambda m: undula.attach(m, undula.LoRA(), target_modules=["0"]), "It is called where"),
        (lambda m: undula.attach(m, undula.LoRA(), r=8), "It is an option of the method: LoRA(r=8)"),
        (lambda m: undula.attach(m, undula.LoRA(), what=3), "attach: what is given twice"),
        (lambda m: undula.attach(m, "lora"), "write undula.LoRA()"),
        (lambda m: undula.attach(m, undula.LoRA), "make a method of it, LoRA()"),
        (lambda m: undula.LoRA(dropout=0.1), "Dropout(LoRA(...), p=0.1)"),
        (lambda m: undula.train(model="x", data="y"), "undula.train(undula.Run(model=..."),
        (lambda m: undula.train(), "train needs run"),
        (lambda m: undula.Run(model="a"), "Run needs data, task, method, out"),
        (lambda m: undula.merge(undula.LoRA()), "a model is a torch.nn.Module; found LoRA"),
        (lambda m: undula.select("m", "default"), "a model is a torch.nn.Module"),
        (lambda m: undula.load(), "load needs path"),
        (lambda m: undula.load(3), "load takes the path of a directory, found 3"),
        (lambda m: undula.load("x", base="y"), "It is called model"),
    ],
)
def test_a_first_call_that_does_not_fit_is_told_how_it_is_made(call, told):
    with pytest.raises(TypeError, match=re.escape(told)):
        call(model())


def test_a_pipeline_in_a_models_place_is_told_where_the_model_is():
    class Pipeline:
        def __init__(self):
            self.model = model()

    with pytest.raises(TypeError, match=r"its \.model is one"):
        undula.attach(Pipeline(), undula.LoRA())


def test_a_cell_that_runs_again_says_what_to_do():
    m = model()
    undula.attach(m, undula.LoRA())
    with pytest.raises(ValueError, match=r"undula\.detach\(model\) before it.*attach\(\.\.\., name=\.\.\.\)"):
        undula.attach(m, undula.LoRA())
    undula.detach(m)
    with pytest.raises(LookupError, match=r"attached are: none\. Attach one"):
        undula.merge(m)


def test_get_peft_model_twice_says_so_and_begins_anew():
    """A cell that runs again: as with PEFT's own LoRA, a warning, and an adapter at its start."""
    import peft

    m, x = model(), torch.randn(3, 4)
    want = m(x).detach()

    def again():
        return peft.get_peft_model(m, undula.peft_config(undula.LoRA(r=2), target_modules=["0", "1"]))

    for p in again().parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    with pytest.warns(UserWarning, match="second time"):
        second = again()
    torch.testing.assert_close(second(x), want)
    assert sum(p.numel() for p in second.parameters() if p.requires_grad) == 2 * 2 * 8


def test_a_warning_of_attach_names_the_line_that_called_it():
    """What finds a call's mistakes stands between, and is not to be blamed."""
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        undula.attach(nn.ModuleDict({"plain": nn.Linear(4, 4), "computed": computed}), undula.LoRA(r=2), "*")
    assert [w.filename for w in said if "left out of where" in str(w.message)] == [__file__]
