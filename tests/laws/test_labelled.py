"""The head on labelled positions alone: loss and gradients are those of the whole logits, or the model is left as it
is."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import undula
from tests.support.models import shake
from undula.kernels import cross_entropy
from undula.train.tasks.labelled import BY_COLUMN, EXACTLY, labelled, seen, told

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "initializer_range": 0.3, "head_dim": 8}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**WIDE),
    "a tied head": lambda: transformers.LlamaConfig(**WIDE, tie_word_embeddings=True),
    "gemma2, soft caps": lambda: transformers.Gemma2Config(**WIDE, final_logit_softcapping=2.0),
    "granite, a logit scale": lambda: transformers.GraniteConfig(**WIDE, logits_scaling=3.0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0,
    ),
}  # fmt: skip
BARE = {"llama", "a tied head", "gpt2"}  # whose logits are what a linear layer returns


def made(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MODELS[name]()).double()


def batch(lengths=(9, 4, 6), nothing=False):
    draw = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(1, 40, (len(lengths), width), generator=draw)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    labels = torch.where((mask == 1) & (torch.rand(ids.shape, generator=draw) < 0.5), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, -100) if nothing else labels}


def whole(model, given):
    """The losses of the labels that count, from all logits in float64."""
    logits = model(**{k: v for k, v in given.items() if k != "labels"}).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), given["labels"][:, 1:], reduction="none")
    return each[given["labels"][:, 1:] != -100]


def gradients(model, losses):
    trained = [p for p in model.parameters() if p.requires_grad]
    return [losses.detach(), *torch.autograd.grad((losses * torch.arange(1, len(losses) + 1)).sum(), trained)]


def assert_same(model, head, given):
    for one, other in zip(
        gradients(model, whole(model, given)), gradients(model, head.losses(model, given)), strict=True
    ):
        torch.testing.assert_close(other, one)


OWN = ("llama", "granite, a logit scale")  # whose head is a weight of its own, which may be trained in full


@pytest.mark.parametrize(
    ("name", "trained"),
    [*((name, trained) for name in MODELS for trained in ("body", "head")), *((name, "head in full") for name in OWN)],
)
def test_losses_and_gradients_are_those_of_all_logits(name, trained, monkeypatch):
    """Weighed row by row, in parts; a head that is adapted or learns goes through its own code."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 80)
    monkeypatch.setattr(cross_entropy, "FEWEST", 1)
    model = made(name)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    where = "all-linear" if trained != "head" else (head, "*c_attn" if name == "gpt2" else "*_proj")
    full = () if trained != "head in full" else (f"{head}.weight",)
    shake(undula.attach(model, undula.LoRA(r=2), where, full=full).parameters())
    found = seen(model, batch())
    assert (found.bare is not None) == (name in BARE and trained == "body")
    assert found.keeping is EXACTLY
    assert_same(model, found, batch())
    one = {k: v[:1] for k, v in batch().items()}
    torch.testing.assert_close(found.losses(model, told(one)), whole(model, one))


def test_a_head_that_is_adapted_later_is_computed_by_its_own_code():
    model = made("llama")
    shake(undula.attach(model, undula.LoRA(r=2)).parameters())
    found = seen(model, batch())
    undula.detach(model)
    shake(undula.attach(model, undula.LoRA(r=2), "lm_head").parameters())
    assert_same(model, found, batch())


def test_a_model_that_takes_columns_alone_is_asked_for_those_of_any_row():
    class Columns(transformers.LlamaForCausalLM):
        def forward(self, *given, logits_to_keep=0, **named):
            if torch.is_tensor(logits_to_keep) and logits_to_keep.ndim > 1:
                raise IndexError("columns")
            return super().forward(*given, logits_to_keep=logits_to_keep, **named)

    torch.manual_seed(0)
    model = Columns(MODELS["llama"]()).double()
    shake(undula.attach(model, undula.LoRA(r=2)).parameters())
    found = seen(model, batch())
    assert found.keeping is BY_COLUMN
    assert_same(model, found, batch())


class Deaf(transformers.LlamaForCausalLM):
    """Takes the question, and answers with all positions."""

    def forward(self, *given, logits_to_keep=0, **named):
        return super().forward(*given, **named)


class Strict(transformers.LlamaForCausalLM):
    """Has no such question."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class Smooth(transformers.LlamaForCausalLM):
    """Its loss is more than the labels'."""

    def forward(self, *given, **named):
        found = super().forward(*given, **named)
        found.loss = None if found.loss is None else found.loss + found.logits.square().mean()
        return found


@pytest.mark.parametrize("kind", [Deaf, Strict, Smooth])
def test_a_model_whose_loss_is_not_made_so_is_left_alone(kind):
    torch.manual_seed(0)
    assert seen(kind(MODELS["llama"]()), batch()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.5, 1e-3, 1e-6])
def test_experts_that_are_to_be_evenly_used_are_left_alone(weight, dtype):
    """However little that weighs: 1e-3 is what transformers takes."""
    config = transformers.MixtralConfig(**WIDE, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True,
                                        router_aux_loss_coef=weight)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    assert seen(model, batch()) is None
    config.output_router_logits = False
    assert seen(model, batch()) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slight_part_of_a_loss_is_not_lost(dtype):
    class Slight(transformers.LlamaForCausalLM):
        def forward(self, *given, **named):
            found = super().forward(*given, **named)
            found.loss = None if found.loss is None else found.loss * 1.0005
            return found

    assert seen(Slight(MODELS["llama"]()).to(dtype), batch()) is None


def test_of_rows_without_a_label_that_counts_the_loss_and_the_gradients_are_zero():
    model = made("llama")
    shake(undula.attach(model, undula.LoRA(r=2)).parameters())
    found = seen(model, batch()).losses(model, batch(nothing=True))
    assert found.shape == (1,)
    assert all((g == 0).all() for g in gradients(model, found))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_kernels_are_those_of_torch(dtype, bias, monkeypatch):
    """Of narrow types to their own precision; a target below 0 is none."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 60)
    monkeypatch.setattr(cross_entropy, "FEWEST", 2)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=draw, dtype=torch.float64).to(dtype) for n in (7, 20))
    shift = torch.randn(20, generator=draw, dtype=torch.float64).to(dtype) if bias else None
    targets = torch.tensor([0, 19, 3, -100, 7, 7, 2])
    hidden.requires_grad_()
    logits = F.linear(hidden, weight, shift)
    wanted = F.cross_entropy(logits.double(), targets, reduction="none")
    scale = torch.arange(1.0, 8.0)
    (slope,) = torch.autograd.grad((wanted * scale).sum(), hidden, retain_graph=True)
    for found in (cross_entropy.losses(logits, targets), cross_entropy.through(hidden, weight, shift, targets)):
        (own,) = torch.autograd.grad((found * scale).sum(), hidden, retain_graph=True)
        close = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 0.2}
        torch.testing.assert_close(found.double(), wanted, **close)
        torch.testing.assert_close(own, slope, **close)


def test_equal_parts_hold_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 100)
    monkeypatch.setattr(cross_entropy, "FEWEST", 1)
    for rows, width in ((1, 1000), (7, 30), (100, 1), (9, 25)):
        found = cross_entropy.parts(rows, width)
        assert [i for part in found for i in range(rows)[part]] == list(range(rows))
        assert all(len(range(rows)[part]) <= max(1, 100 // width) for part in found)


def test_labels_are_of_the_position_before():
    there, targets = labelled(torch.tensor([[5, -100, 7], [-100, 8, -100]]))
    assert there.tolist() == [[False, True, False], [True, False, False]]
    assert targets.tolist() == [7, 8]
