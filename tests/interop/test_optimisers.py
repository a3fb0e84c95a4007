"""Optimisers that see pairs, and those of the ecosystem, under DDP and in transformers' own Trainer."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import undula
from undula.optim.optimisers import (
    GORP,
    SGD,
    ALLoRA,
    LoRAFA,
    LoRAGGPO,
    LoRAMGPO,
    LoRAPro,
    LoRSum,
    Optimiser,
    Riemannian,
    SAMReference,
)
from undula.penalties import Adapters, GroupLasso, KLToBase, Orthogonal

from ..support import tiny
from ..support.processes import forked

CHOICES = {
    "lorapro": LoRAPro(),
    "lorapro over sgd": LoRAPro(base=SGD()),
    "lorapro, full": LoRAPro(full=True),
    "allora": ALLoRA(),
    "allora, products": ALLoRA(gradient=True, products=True),
    "mgpo": LoRAMGPO(rho=0.5),
    "ggpo": LoRAGGPO(sigma=0.3),
    "gorp": GORP(project=2),
    "sam": SAMReference(rho=0.5),
    "riemannian": Riemannian(),
    "lora-fa": LoRAFA(),
}
PENALTIES = {
    "lasso": GroupLasso(0.5, groups=Adapters()),
    "orthogonal": Orthogonal(0.5),
    "kl": KLToBase(0.5),
    "all": GroupLasso(0.1) + Orthogonal(0.1) + KLToBase(0.1),
}


def course(what, share=None, steps=4):
    """The factors after some steps of a small network, on a share of each step's rows (None: all)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    adapter = undula.attach(model, undula.LoRA(r=3, alpha=4.0), ["0", "2"], full=["4"])
    optimiser = isinstance(what, Optimiser)
    kind, options = what.made() if optimiser else (torch.optim.SGD, {})
    own = {"adapted": model} if optimiser else {}
    optimizer = kind(adapter.parameters(), lr=0.02, **options, **own)
    called = model if share is None else nn.parallel.DistributedDataParallel(model)
    penalty = None if optimiser else what.start(model, optimizer, steps=steps)
    for step in range(steps):
        torch.manual_seed(10 + step)
        x, y = torch.randn(8, 12, dtype=torch.float64), torch.randint(8, (8,))
        x, y = (t if share is None else t.chunk(2)[share] for t in (x, y))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            out = called(x)
            loss = nn.functional.cross_entropy(out, y)
            if penalty is not None:
                loss = loss + penalty.term(x, out)
            loss.backward()
            return loss

        if penalty is None:
            optimizer.step(closure)
            continue
        penalty.before_forward()
        closure()
        penalty.before_update()
        optimizer.step()
        penalty.after_update()
    return {f"{site}.{name}": t.detach().clone() for site, name, t in adapter.tensors()} | {
        name: t.detach().clone() for name, t in adapter.full.items()
    }


def test_two_processes_are_as_one(tmp_path):
    """Of each optimiser and each kind of penalty: half of the rows in each of two under DDP."""
    whatever = CHOICES | PENALTIES
    wanted = {name: course(what) for name, what in whatever.items()}

    def work(rank):
        torch.save({name: course(what, rank) for name, what in whatever.items()}, tmp_path / f"{rank}.pt")
        with pytest.raises(ValueError, match="rows of its own process alone"):
            course(LoRSum(), rank)

    forked(tmp_path, 2, work)
    start = course(CHOICES["lorapro"], steps=0)
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert any(not torch.equal(t, start[k]) for k, t in found.items())
            for key, t in found.items():
                torch.testing.assert_close(t, wanted[name][key], msg=lambda text, n=name, k=key: f"{n}, {k}: {text}")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"))


def theirs(name):
    """An optimiser of another package."""
    if name == "muon":
        return torch.optim.Muon, {}
    if name == "adam8bit":
        return pytest.importorskip("bitsandbytes").optim.Adam8bit, {}
    return pytest.importorskip("schedulefree").AdamWScheduleFree, {}


@pytest.mark.parametrize("name", [*CHOICES, "lorsum", "muon", "adam8bit", "schedule-free"])
def test_under_transformers_own_trainer(name, llama, tmp_path):
    """As the page says: by `optimizer_cls_and_kwargs`, the Trainer's clipping off."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    adapter = undula.attach(model, undula.LoRA(r=2), ["q_proj", "down_proj"])
    choice = (CHOICES | {"lorsum": LoRSum()}).get(name)
    kind, options = theirs(name) if choice is None else choice.made()
    own = {} if choice is None else {"adapted": model} | ({"max_norm": 1.0} if choice.clips else {})
    rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, max_grad_norm=0.0, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(kind, {"lr": 1e-2, **options, **own})
    )
    before = [(p, p.detach().clone()) for p in adapter.parameters()]
    if name == "sam":
        with pytest.raises(RuntimeError, match="closure"):
            trainer.train()
        return
    if name == "schedule-free":
        trainer.create_optimizer()
        trainer.optimizer.train()
    trainer.train()
    moved = [not torch.equal(p, was) for p, was in before if p.requires_grad]
    assert all(moved)
    assert len(moved) == len(before) // (2 if name == "lora-fa" else 1)
    assert all(bool(p.isfinite().all()) for p in adapter.parameters())
