"""Training under PEFT by the real trainers, and everything again in a process that knows nothing of this one."""

import subprocess

import peft
import pytest
import torch
import transformers

import undula
from tests.support.models import llama, shake, tokens, trained
from undula import (
    AuroRA,
    AuroRAStatic,
    DoRA,
    Dropout,
    LoRA,
    LoRAN,
)
from undula.bundled import model_path

TEXTS = {
    0: ["a dull and lifeless film", "the plot goes nowhere", "a waste of two hours", "tedious and badly acted"],
    1: ["a warm and funny film", "the acting is superb", "a small masterpiece", "clever, moving and well made"],
}


@pytest.fixture(scope="module")
def minilm():
    """(model, tokenizer) of the bundled pretrained encoder; a new copy of the model at every call."""
    path = model_path("minilm")

    def make():
        torch.manual_seed(0)  # the new head
        return transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)

    return make, transformers.AutoTokenizer.from_pretrained(path)


def examples(tokenizer):
    rows = [{"labels": label, **tokenizer(text)} for label, texts in TEXTS.items() for text in texts]
    return rows * 4


def trainer(model, tokenizer, out, **options):
    arguments = {
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-2,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(out), **arguments | options),
        train_dataset=examples(tokenizer),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )


def logits(model, tokenizer):
    model.eval()
    with torch.no_grad():
        return model(
            **tokenizer([t for texts in TEXTS.values() for t in texts], padding=True, return_tensors="pt")
        ).logits


@pytest.mark.parametrize("method", [Dropout(LoRAN(r=4), 0.1), AuroRA(r=4)], ids=repr)
def test_trainer(method, minilm, tmp_path):
    """A pretrained encoder learns; interrupted and resumed it ends with the same numbers; both hosts load it."""
    make, tokenizer = minilm
    config = undula.peft_config(method, ["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(make(), config)
    assert {n.rpartition(".")[2] for n in trained(model)} == {"A", "B", "weight", "bias"} | (
        {"H", "S"} if isinstance(method, AuroRA) else set()
    )
    run = trainer(model, tokenizer, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]

    resumed = peft.get_peft_model(make(), config)
    shake(trained(resumed).values())  # what the checkpoint does not restore would show
    trainer(resumed, tokenizer, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, p in trained(model).items():
        assert torch.equal(trained(resumed)[name], p)

    y = logits(model, tokenizer)
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "checkpoint-8")
    torch.testing.assert_close(logits(again, tokenizer), y)
    own = make()
    adapter = undula.attach(own, undula.Adapter.load(tmp_path / "checkpoint-8"))
    assert set(adapter.full) == {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(logits(own, tokenizer), y)


def test_trl(tmp_path):
    """SFTTrainer takes the configuration itself; a causal model with gradient checkpointing, as TRL sets it."""
    import datasets
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path("smollm2"))
    model = llama(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    texts = datasets.Dataset.from_list([{"text": text} for texts in TEXTS.values() for text in texts])
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=4,
        learning_rate=3e-2,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    run = trl.SFTTrainer(
        model, args=arguments, train_dataset=texts, processing_class=tokenizer, peft_config=undula.peft_config(AuroRA())
    )
    assert isinstance(run.model, peft.PeftModel)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    x = tokens()
    own = llama(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    undula.attach(own, undula.Adapter.load(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(own(x).logits, run.model.eval()(x).logits)


def test_a_pretrained_causal_model(tmp_path):
    """Found again by the name of its base, with the same text."""
    path = model_path("smollm2")
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    x = tokenizer("The capital of France is", return_tensors="pt")
    model = peft.get_peft_model(base, undula.peft_config(AuroRA(), task_type="CAUSAL_LM")).eval()
    options = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        assert "Paris" in tokenizer.decode(model.generate(**x, **options)[0])
        shake(trained(model).values())
        y = model(**x).logits
        model.save_pretrained(tmp_path)
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        kept = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(again)
        assert kept[0].keys() == kept[1].keys()
        assert all(torch.equal(t, kept[1][k]) for k, t in kept[0].items())  # to the bit; of the logits bfloat16 keeps
        torch.testing.assert_close(again(**x).logits, y, rtol=0.05, atol=0.05 * float(y.std()))  # what kernels share
        with again.disable_adapter():
            assert "Paris" in tokenizer.decode(again.generate(**x, **options)[0])


FRESH = """
import os, sys
import torch
import peft, transformers
from pathlib import Path
root = Path(sys.argv[1])

def base():
    return transformers.AutoModelForCausalLM.from_pretrained(root / "base")

def same(model, name):
    x, y = torch.load(root / "x.pt"), torch.load(root / f"{name}.pt")
    torch.testing.assert_close(model.eval()(x).logits, y, msg=lambda text: f"{name}: {text}")

# PEFT alone
x = torch.load(root / "x.pt")
for name in ["lora", "static"]:
    got = peft.PeftModel.from_pretrained(base(), root / f"{name}.exported").eval()(x).logits
    torch.testing.assert_close(got, torch.load(root / f"{name}.pt"))
try:
    peft.PeftModel.from_pretrained(base(), root / "aurora")
except KeyError as error:
    assert "UNDULA" in str(error)
else:
    raise AssertionError("PEFT alone took it for something that it knows")
assert "undula" not in sys.modules

import undula
assert "undula.integrations.peft" not in sys.modules
undula.enable_peft()
names = sorted(p.name for p in root.iterdir() if (p / "adapter_config.json").exists() and "exported" not in p.name)
for name in names:
    same(peft.PeftModel.from_pretrained(base(), root / name), name)
same(peft.PeftModel.from_pretrained(base(), root / "aurora", low_cpu_mem_usage=True), "aurora")
same(peft.AutoPeftModelForCausalLM.from_pretrained(root / "aurora"), "aurora")
same(peft.AutoPeftModelForCausalLM.from_pretrained(root / "native"), "native")
print(*names)
"""


def test_fresh_process(tmp_path, python):
    """LoRA directories load with PEFT alone; undula's after `undula.enable_peft()`; by name of the base too."""
    llama().save_pretrained(tmp_path / "base")
    x = tokens()
    torch.save(x, tmp_path / "x.pt")
    methods = {
        "aurora": AuroRA(),
        "dora": DoRA(LoRA(r=2)),
        "lora": LoRA(r=2),
        "loran": LoRAN(r=2, learn=("a", "w")),
        "static": AuroRAStatic(),
    }
    for name, method in methods.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = peft.get_peft_model(base, undula.peft_config(method, task_type="CAUSAL_LM")).eval()
        shake(trained(model).values())
        model.save_pretrained(tmp_path / name)
        torch.save(model(x).logits.detach(), tmp_path / f"{name}.pt")
    for name in ("lora", "static"):
        undula.io.export_lora(undula.Adapter.load(tmp_path / name), tmp_path / f"{name}.exported")
    undula.Adapter.load(tmp_path / "loran").save(tmp_path / "native", base=str(tmp_path / "base"), task="CAUSAL_LM")
    (tmp_path / "native.pt").write_bytes((tmp_path / "loran.pt").read_bytes())
    done = subprocess.run([python, "-c", FRESH, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout.split() == sorted([*methods, "native"]), done.stderr[-3000:]
