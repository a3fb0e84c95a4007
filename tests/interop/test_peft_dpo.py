"""TRL's preference training takes a second adapter for the reference policy: at the first step both are one."""

import math

import datasets
import peft
import pytest
import trl

import undula
from tests.support.models import llama, shake, trained
from tests.support.tiny import WORDS, tokenizer

CASES = [  # (method, whether it comes from a directory): each costs a trainer
    (undula.LoRAXS(r=4), False),
    (undula.GatedLoRA(r=4, open=2), False),
    (undula.Centred(undula.LoRA(r=2)), True),
    (undula.DyLoRA(r=4), True),
]


@pytest.mark.parametrize(("method", "loaded"), CASES, ids=str)
def test_the_first_loss_is_log_2(method, loaded, tmp_path):
    """Trained before, in this process or another: margin 0 and loss log 2, as the reference is the policy."""
    words = tokenizer(tmp_path / "words")
    base = llama(vocab_size=len(words), pad_token_id=0)
    model = peft.get_peft_model(base, undula.peft_config(method, ["q_proj", "v_proj"]))
    shake(trained(model).values())
    if loaded:
        model.save_pretrained(tmp_path / "adapter")
        base = llama(vocab_size=len(words), pad_token_id=0)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    rows = [{"prompt": f"the {w} was", "chosen": " good", "rejected": " bad"} for w in WORDS[:4]]
    arguments = trl.DPOConfig(
        str(tmp_path / "out"),
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    data = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=words)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
