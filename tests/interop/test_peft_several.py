"""Several adapters in one PEFT model: mixed batches and merging."""

import copy
import pickle

import pytest
import torch

import undula
from tests.support.models import hosted, llama, shake, tokens, trained
from undula import AuroRA, LoRA, LoRAN

# Several adapters


def test_mixed_batches_while_generating():
    """Greedy and with beams: every row as if it were alone with its adapter."""
    model, x = hosted(AuroRA(), name="french"), tokens(3)
    model.add_adapter("german", undula.peft_config(LoRA(r=2), ["q_proj"]))
    model.set_adapter("german")
    shake(trained(model).values())
    for beams in (1, 3):
        options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        want = []
        for i, name in enumerate(["german", None, "french"]):
            model.set_adapter(name or "german")
            with model.disable_adapter() if name is None else torch.no_grad():
                want.append(model.generate(input_ids=x[i : i + 1], **options))
        got = model.generate(input_ids=x, adapter_names=["german", "__base__", "french"], **options)
        assert torch.equal(got, torch.cat(want))
    assert not any(m._forward_pre_hooks for m in model.modules() if hasattr(m, "law"))


def test_mixed_batches_refused():
    model, x = hosted(LoRA(), name="french"), tokens(2)
    with pytest.raises(ValueError, match=r"non-existing adapter.* german\. There are: french, __base__"):
        model(x, adapter_names=["french", "german"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 3 and 2 respectively"):
        model(x, adapter_names=["french"] * 3)
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(x, adapter_names=["french"] * 2)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="please call `unmerge_adapter` first"):
        model(x, adapter_names=["french"] * 2)


def test_merging_several(tmp_path):
    """Several active adapters add up, as `adapter + adapter` does."""
    model, x = hosted(LoRA(r=2), name="x"), tokens()
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.weight.clone()
    model.add_adapter("y", undula.peft_config(LoRAN(r=3), ["q_proj"]))
    model.set_adapter("y")
    shake(trained(model).values())
    model.save_pretrained(tmp_path)
    own = llama()
    undula.attach(own, undula.Adapter.load(tmp_path / "x") + undula.Adapter.load(tmp_path / "y"))
    model.base_model.set_adapter(["x", "y"])
    y = model(x).logits
    torch.testing.assert_close(y, own(x).logits)
    model.merge_adapter(["x"])
    with pytest.warns(UserWarning, match="additionally merging y"):
        model.merge_adapter(["y"])
    torch.testing.assert_close(model(x).logits, y)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.weight, weight)
    assert torch.equal(model(x).logits, y)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges
        torch.testing.assert_close(model(x).logits, llama()(x).logits)
    torch.testing.assert_close(model.merge_and_unload()(x).logits, y)


def test_a_method_without_a_weight_is_never_merged():
    """Nor one of several: the model is as it was, and other adapters still merge."""
    model, x = hosted(LoRA(r=2), name="plain", overrides={"down_proj": AuroRA()}), tokens()
    y = model(x).logits
    message = (
        r"AuroRA\(.*cannot be merged: it stands on the rung Method.*2 sites, the first .*down_proj.*undula.collapse"
    )
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=message):
            merge()
    assert torch.equal(model(x).logits, y)
    model.add_adapter("other", undula.peft_config(LoRA(r=2)))
    model.set_adapter("other")
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["other"]


def test_safe_merge():
    model = hosted(LoRA(r=2))
    next(iter(trained(model).values())).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="gives NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model.unload()(tokens()).logits, llama()(tokens()).logits)


def test_copies_and_pickles():
    model, x = hosted(AuroRA(), exclude_modules=["v_proj"]), tokens()
    y = model(x).logits
    twin = copy.deepcopy(model)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x).logits, y)
    shake(trained(twin).values())  # the copy's adapter is the copy's alone
    assert torch.equal(model(x).logits, y)
    assert not torch.equal(twin(x).logits, y)


def test_status():
    status = hosted(LoRA(), name="french").get_model_status()
    assert status.peft_types == {"french": "UNDULA"}
    assert status.adapter_model_type == "UndulaModel"
    assert status.enabled
    assert status.requires_grad == {"french": True}
