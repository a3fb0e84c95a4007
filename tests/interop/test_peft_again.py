"""A configuration that is used again: another adapter, alive and right, for every method there is."""

import copy

import peft
import pytest
import torch

import undula
from tests.support.models import llama, shake, tokens, trained
from tests.support.zoo import ZOO
from undula import Centred, LoRA, LoRASB, Method
from undula.integrations.peft import hosts
from undula.starts import EVA, LoRAGA, PiSSA

TARGETS = ["q_proj", "v_proj"]
DATA = [{"input_ids": tokens(), "labels": tokens()}]


def every():
    """Each registered method, and each wrapped or varied one of the laws; two of a kind tell nothing new."""
    return list(dict.fromkeys(ZOO))


def made(method):
    config = undula.peft_config(method, TARGETS, probe=undula.Probe(DATA))
    return peft.get_peft_model(llama(), config).eval()


def move_frozen(model, name):
    """As allocators, schedules and pruned files leave frozen factors: not where a start would put them."""
    for layer in hosts(model).values():
        hosted = layer.undula_factors[name]
        for k, t in hosted._buffers.items():
            if k in hosted._non_persistent_buffers_set or not t.is_floating_point():
                continue
            t.add_(0.05 * torch.randn_like(t))


def copied(model, a, b):
    """What TRL's trainers do to make a reference policy."""
    for name, p in list(model.named_parameters()):
        if f".{a}." in name:
            model.get_parameter(name.replace(f".{a}.", f".{b}.")).data.copy_(p.data)


@pytest.mark.parametrize("method", every(), ids=repr)
def test_parameters_copied_by_name_make_the_same_policy(method):
    """Frozen factors are no parameters: a second adapter has them from the first."""
    model, x = made(method), tokens()
    shake(trained(model).values())
    move_frozen(model, "default")
    want = model(x).logits
    model.add_adapter("ref", model.peft_config["default"])
    copied(model, "default", "ref")
    assert torch.equal(model(x).logits, want)
    model.set_adapter("ref")
    assert torch.equal(model(x).logits, want)


def test_a_factor_that_was_frozen_by_hand_is_the_first_adapters(tmp_path):
    """Its method would start it anew, and no copy of parameters would bring it."""
    adapter, x = undula.attach(llama(), LoRA(r=2)), tokens()
    for _, factor, t in adapter.tensors():
        t.requires_grad_(factor != "A")
    shake([t for _, _, t in adapter.tensors()])
    adapter.save(tmp_path)
    undula.enable_peft()
    model = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    want = model(x).logits
    model.add_adapter("ref", model.peft_config["default"])
    copied(model, "default", "ref")
    model.set_adapter("ref")
    assert torch.equal(model(x).logits, want)
    assert all(n.endswith(".B") for n in trained(model))


def alive(model, x, name="default"):
    """Every trained tensor has a gradient after one step (a factor that meets a zero at the start has none before)."""
    mine = [p for n, p in trained(model).items() if f".{name}." in n]
    assert mine
    optimizer = torch.optim.SGD(mine, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        optimizer.step()
    return all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in mine)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "method", [m() for m in Method.registry.values() if m not in (undula.Dropout, undula.Sum, Centred)], ids=repr
)
@pytest.mark.parametrize("way", ["live", "copy", "unloaded", "disk"])
def test_a_configuration_used_again_starts_an_adapter(method, way, tmp_path):
    """Where the method's own start is the base, so is this one; and it learns.  What needs data says so."""
    x = tokens()
    model = made(method)
    at_base = torch.allclose(model(x).logits, llama()(x).logits)
    shake(trained(model).values())
    config = model.peft_config["default"]
    if way in ("live", "copy"):
        model.add_adapter("again", config if way == "live" else copy.deepcopy(config))
        model.set_adapter("again")
    elif way == "unloaded":
        model = peft.get_peft_model(model.unload(), config, "again")
    else:
        model.save_pretrained(tmp_path)
        config = peft.PeftConfig.from_pretrained(tmp_path)
        config.inference_mode = False
        model = peft.get_peft_model(llama(), config, "again")
    model.eval()
    if isinstance(method, LoRASB) and way != "unloaded":
        with pytest.raises(RuntimeError, match=r"has no numbers yet in .*R"):
            model(x)
        return
    if at_base:
        torch.testing.assert_close(model(x).logits, llama()(x).logits)
    assert alive(model, x, "again")


@pytest.mark.parametrize("start", [EVA(), LoRAGA(), PiSSA()], ids=repr)
def test_a_start_from_data_is_kept_or_missed_by_name(start, tmp_path):
    """Beside the live adapter the start is that one's; from the directory alone nobody knows it."""
    x, model = tokens(), made(Centred(LoRA(r=2), start))
    first = {n: p.detach().clone() for n, p in trained(model).items()}
    shake(trained(model).values())
    model.add_adapter("again", model.peft_config["default"])
    model.set_adapter("again")
    if start == EVA():  # B = 0 at its start: the adapter does not keep where it began
        with pytest.raises(RuntimeError, match="has no numbers yet in A"):
            model(x)
    else:
        torch.testing.assert_close(model(x).logits, llama()(x).logits)
        for name, p in trained(model).items():
            assert torch.equal(first[name.replace(".again.", ".default.")], p)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    begun = peft.get_peft_model(llama(), config)
    if start == PiSSA():
        torch.testing.assert_close(begun(x).logits, llama()(x).logits)
        return
    for use in (begun, begun.merge_adapter, lambda *_: begun.save_pretrained(tmp_path / "no")):
        with pytest.raises(RuntimeError, match="has no numbers yet in A, B"):
            use(*([x] if use is begun else []))
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    model.set_adapter("default")
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_transformers_own_second_adapter():
    """Its `add_adapter` with the configuration of the first."""
    model, x = llama(), tokens()
    model.add_adapter(undula.peft_config(undula.GatedLoRA(r=4, open=2), TARGETS), "first")
    shake(trained(model).values())
    want = model(x).logits
    model.add_adapter(model.peft_config["first"], "second")
    torch.testing.assert_close(model(x).logits, llama()(x).logits)
    copied(model, "first", "second")
    assert torch.equal(model(x).logits, want)


def test_the_configuration_stays_the_callers():
    """PEFT keeps the object that it is given; one adapter more on the same model gets a copy."""
    config = undula.peft_config(LoRA(r=2), TARGETS)
    model = peft.get_peft_model(llama(), config)
    assert model.peft_config["default"] is config
    model.add_adapter("again", config)
    assert model.peft_config["again"] is not config
    assert peft.get_peft_model(llama(), config).peft_config["default"] is config


@pytest.mark.parametrize("method", [LoRA(r=2), undula.AuroRA(), undula.VeRA(r=3), undula.LoRAXS(r=4)], ids=repr)
def test_factors_on_the_meta_device_are_told_of(method, tmp_path):
    """`low_cpu_mem_usage` leaves them there until tensors come; no forward goes through."""
    x, model = tokens(), made(method)
    shake(trained(model).values())
    model.save_pretrained(tmp_path)
    empty = peft.get_peft_model(llama(), undula.peft_config(method, TARGETS), low_cpu_mem_usage=True)
    empty.add_adapter("second", undula.peft_config(method, TARGETS), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in empty.named_parameters() if ".default." in n or ".second." in n} == {"meta"}
    with pytest.raises(RuntimeError, match="no numbers yet"):
        empty(x)
    tensors = peft.utils.save_and_load.load_peft_weights(str(tmp_path), device="cpu")
    peft.set_peft_model_state_dict(empty, tensors, low_cpu_mem_usage=True)
    assert torch.equal(empty.eval()(x).logits, model(x).logits)
    injected = peft.inject_adapter_in_model(undula.peft_config(LoRA(r=2), TARGETS), llama(), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in injected.named_parameters() if ".default." in n} == {"meta"}


def test_tensors_of_a_narrow_file_train_wide(tmp_path):
    """Put in the place of those on the meta device they become what these would have been."""
    model = made(LoRA(r=2))
    shake(trained(model).values())
    model.save_pretrained(tmp_path)
    narrow = {k: t.bfloat16() for k, t in peft.utils.save_and_load.load_peft_weights(str(tmp_path), "cpu").items()}
    empty = peft.get_peft_model(llama(), undula.peft_config(LoRA(r=2), TARGETS), low_cpu_mem_usage=True)
    peft.set_peft_model_state_dict(empty, narrow, low_cpu_mem_usage=True)
    assert {p.dtype for p in trained(empty).values()} == {torch.float32}


def test_a_cell_that_runs_twice():
    """`get_peft_model` on the model that it has changed: PEFT warns and goes on, with a new adapter."""
    base, x = llama(), tokens()
    first = peft.get_peft_model(base, undula.peft_config(LoRA(r=2)))
    shake(trained(first).values())
    with pytest.warns(UserWarning, match="for a second time"):
        model = peft.get_peft_model(base, undula.peft_config(undula.LoRAN(r=3), TARGETS)).eval()
    torch.testing.assert_close(model(x).logits, llama()(x).logits)
    assert {n.split(".undula_factors")[0].rpartition(".")[2] for n in trained(model)} == set(TARGETS)
