"""A training that went wrong says so, and one that was stopped, moved or opened elsewhere is the one that it was."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import undula
from tests.support import tiny
from undula import ranks
from undula.optim.schedules import Constant, Cosine, Linear
from undula.penalties import OrthogonalToEarlier
from undula.study.plan import Plan
from undula.study.read import parse
from undula.study.trial import Diverged, perform
from undula.study.watch import Watch
from undula.train import CausalLM, Classification, Plain, Run, restored
from undula.train.doubts import doubts
from undula.train.prepared import prepare
from undula.train.worries import diverged

from ..support.courses import COURSES

LORA = undula.LoRA(r=2)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", tiny.reviews(40))


@pytest.fixture
def usual(bert, reviews, tmp_path):
    return Run(model=bert, data=reviews, task=Classification(), method=LORA, out=tmp_path / "out", where=("query",),
               lr=5e-3, max_steps=6, batch=4, save_every=2, seed=3)  # fmt: skip


# Parts that the model's files lack


@pytest.fixture(scope="module")
def poolerless(bert, tmp_path_factory):
    """A BERT adapted to a domain by masked words: its files have no pooler, and transformers makes a random one."""
    path = tmp_path_factory.mktemp("mlm")
    model = AutoModelForMaskedLM.from_config(BertConfig.from_pretrained(bert))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(path)
    return str(path)


def test_a_part_of_the_body_that_the_files_lack_trains_and_is_saved(usual, poolerless):
    """Whoever opens the adapter draws another pooler; it must not matter."""
    run = dataclasses.replace(usual, model=poolerless, max_steps=2)
    report = undula.train(run)
    adapter = undula.Adapter.load(run.out)
    lacked = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert lacked <= set(adapter.full)
    assert report["trainable_parameters"] == adapter.num_parameters()
    (note,) = [n for n in report["data"]["notes"] if "pooler" in n]
    assert "lack bert.pooler.dense.weight, bert.pooler.dense.bias: they begin at random numbers, train in full" in note
    batch = AutoTokenizer.from_pretrained(poolerless)(["good film", "bad film"], return_tensors="pt")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(poolerless, num_labels=2).eval()
        undula.attach(model, undula.Adapter.load(run.out))
        found.append(model(**batch).logits)
    assert torch.equal(*found)


def test_an_adapter_without_what_its_base_lacks_is_told_when_opened(usual, poolerless):
    """Adapters of earlier versions: their function hangs on what is drawn."""
    run = dataclasses.replace(usual, model=poolerless, max_steps=1)
    undula.train(run)
    adapter = undula.Adapter.load(run.out)
    part = {n: t for n, t in adapter.full.items() if "pooler" not in n}
    dataclasses.replace(adapter, full=part).save(run.out)
    with pytest.warns(UserWarning, match=r"lack bert\.pooler\.dense.*random"):
        restored(run.out)


def test_a_language_model_without_its_head_is_refused_before_training(usual, bert, tmp_path):
    """A body saved alone: its output layer would be random and frozen.  Named, it trains."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = AutoTokenizer.from_pretrained(bert)
    config = LlamaConfig(**sizes, vocab_size=len(words), pad_token_id=0, bos_token_id=None, eos_token_id=3)
    LlamaModel(config).save_pretrained(tmp_path / "body")
    words.save_pretrained(tmp_path / "body")
    data = tiny.jsonl(tmp_path / "d.jsonl", [{"prompt": f"{w} film", "completion": "bad"} for w in tiny.WORDS[:8]])
    task = CausalLM(generate=0, format=Plain())
    run = dataclasses.replace(
        usual, model=str(tmp_path / "body"), data=data, task=task, where="all-linear", max_steps=1
    )
    with pytest.raises(ValueError, match=r"lack lm_head\.weight.*--full lm_head\.weight"):
        undula.train(run)
    undula.train(dataclasses.replace(run, out=tmp_path / "named", full=("lm_head",)))
    assert set(undula.Adapter.load(tmp_path / "named").full) == {"lm_head.weight"}


# Divergence


def study(usual, rate):
    text = f"""
seeds = [1]
[train]
steps = 6
batch = 4
evaluations = 3
where = ["query"]
[sweep]
rates = [{rate}]
[[models]]
source = "{usual.model}"
[[data]]
source = "{usual.data}"
task = "classification"
[[methods]]
method = "lora"
set = {{ r = 2 }}
"""
    return Plan(parse(text, check=False)).cells[0].trial(rate, 1, tested=False)


class Poison(Watch):
    """A watch after whose first evaluation the adapter breaks."""

    def evaluate(self, step):
        super().evaluate(step)
        with torch.no_grad():
            next(iter(self.ready.adapter.parameters())).fill_(math.nan)


def test_a_study_records_a_run_that_is_no_longer_finite_as_failed(usual):
    """Its first evaluation was finite, and would else be its result."""
    with pytest.raises(Diverged, match="not finite"):
        perform(study(usual, 1e-3), Poison())


def test_losses_that_ran_away():
    """Far above where they began, or above what guessing between two costs, whatever came before."""
    far = {"before": {"loss": 0.8}, "after": {"loss": 3.0}}
    assert "the loss went from 0.8 to 3" in diverged(far)
    assert "the loss went from 1 to 2.5" in diverged({"losses": [[1, 1.0], [2, 0.5], [3, 2.5]]})
    for first, last in ((0.8, 1.5), (0.01, 1.3), (3.0, 0.8)):
        assert diverged({"before": {"loss": first}, "after": {"loss": last}}) is None


def test_doubts():
    """Which trainings are doubted, and that a plain one is not."""
    held = {"label": [0, 1, 1, 1]}

    class Rows(dict):
        def __len__(self):
            return len(self["label"])

    held = Rows(held)
    good = {"loss": 0.7, "accuracy": 0.75, "macro_f1": 0.73, "mcc": 0.58}
    assert doubts(held, {"loss": 0.7}, good, [[1, 0.7], [2, 0.6]]) == []
    same = {"loss": 0.7, "accuracy": 0.75, "macro_f1": 0.75 / 1.75, "mcc": 0.0}
    assert "of one class, number 1" in doubts(held, {"loss": 0.7}, same, [])[0]
    assert "of one class, 'fine', though" in doubts(held, {"loss": 0.7}, same, [], ("poor", "fine"))[0]
    assert "7.2e+03; before the training it was 1.79" in doubts(held, {"loss": 1.79}, {"loss": 7195.0}, [])[0]
    assert "rose from 0.7 to 9" in doubts(held, {}, {}, [[1, 0.7], [2, 9.0]])[0]


def test_a_training_at_an_absurd_rate_is_doubted_in_the_report(usual):
    report = undula.train(dataclasses.replace(usual, lr=30.0))
    assert report["state"] == "done"
    assert report["warnings"]


# What the tokenizer does not know


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Texts in a language of which the tokenizer has no word, and some with a share of them."""
    folder, words = tmp_path_factory.mktemp("strange"), ["dobry", "zly"]

    def rows(name, known):
        texts = [f"film {words[i % 2]} {words[i % 2]}" if i < known else f"{words[i % 2]} tak" for i in range(40)]
        labels = ["tak", "nie"]
        made = [{"text": t, "prompt": t, "label": labels[i % 2]} for i, t in enumerate(texts)]
        return tiny.jsonl(folder / name, [row | {"completion": row["label"]} for row in made])

    return {"all": rows("all.jsonl", 0), "some": rows("some.jsonl", 20)}


@pytest.mark.parametrize("task", [Classification(), CausalLM()], ids=lambda task: type(task).__name__)
def test_a_tokenizer_that_knows_nothing_of_the_texts_is_refused(task, usual, strange, tmp_path):
    """Every row would be the same to the model; before any step, with the counts."""
    if isinstance(task, CausalLM):
        usual = dataclasses.replace(usual, model=tiny.llama(tmp_path / "llama"), where=("q_proj",))
    run = dataclasses.replace(usual, task=task, data=strange["all"])
    with pytest.raises(
        ValueError, match=r"knows nothing of the train rows: all \d+ tokens of \d+ rows are its unknown"
    ):
        undula.train(run)
    assert not (run.out / "adapter_config.json").exists()


def test_a_tokenizer_that_knows_little_is_told_of(usual, strange):
    """With counts of tokens and rows; and one that knows all is not."""
    report = undula.train(dataclasses.replace(usual, data=strange["some"], max_steps=1))
    told = [n for n in report["data"]["notes"] if "unknown to the tokenizer" in n]
    assert len(told) == 2
    assert "rows hold no other" in told[0]


def test_what_the_tokenizer_knows_is_not_told_of(usual):
    report = undula.train(dataclasses.replace(usual, max_steps=1))
    assert not any("unknown" in n for n in report["data"]["notes"])


# Ends


@pytest.mark.parametrize("when", ["opening", "measuring", "training"])
def test_a_training_that_is_stopped_at_once_says_what_is_kept(when, usual, monkeypatch):
    """Ctrl-C before the first step, and twice within one: in one line, with what to type."""
    from typer.testing import CliRunner

    from undula.cli.main import app
    from undula.train import adapter_trainer, prepared

    seen = []

    def stop(*given, **options):
        seen.append(given)
        if when != "training" or len(seen) == 4:
            raise KeyboardInterrupt

    place = {"opening": (prepared, "open_model"), "measuring": (Classification, "score")}
    monkeypatch.setattr(*place.get(when, (adapter_trainer, "still_statistics")), stop)
    words = ["--task", "classification", "--where", "query", "--max-steps", 6, "--batch", 4, "--save-every", 2]
    command = ["train", "--model", usual.model, "--data", usual.data, "--out", usual.out, *words]
    done = CliRunner().invoke(app, [str(w) for w in command])
    assert done.exit_code == 130
    said = " ".join(done.stderr.split())
    wanted = {
        "opening": f"stopped before the training began: nothing is kept, nothing was written to {usual.out}",
        "measuring": f"stopped before a checkpoint: nothing that was trained is kept; begin again with undula train "
        f"--resume {usual.out}",
        "training": f"stopped at once; step 2 of 6 is kept: go on with undula train --resume {usual.out}",
    }
    assert wanted[when] in said
    monkeypatch.undo()
    again = CliRunner().invoke(
        app, [str(w) for w in (command if when == "opening" else ["train", "--resume", usual.out])]
    )
    assert again.exit_code == 0, again.stderr


class Enough(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= 3


def test_a_stop_by_a_callback_is_an_end(usual):
    """Early stopping: what there is is the result; it is no interruption."""
    report = undula.train(usual, callbacks=(Enough(),))
    assert (report["state"], report["steps"], report["steps_asked"]) == ("stopped", 3, 6)
    assert json.loads((usual.out / "report.json").read_text()) == report
    assert undula.Adapter.load(usual.out).methods


@pytest.mark.parametrize("name", [None, "AdaLoRA", "ReLoRA", "DiffoRA, shared", "LoRASC"])
def test_a_resume_after_the_last_step_makes_none(name, usual, monkeypatch):
    """The evaluation after the training fell: what was trained is measured, and not trained further."""
    method, how = (LORA, None) if name is None else COURSES[name]
    usual = dataclasses.replace(
        usual, method=method, allocator=how, max_steps=12, where=("query", "value"), eval_every=0
    )
    score, calls = Classification.score, []

    def falling(*given):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("the evaluation after training")
        return score(*given)

    monkeypatch.setattr(Classification, "score", falling)
    with pytest.raises(MemoryError):
        undula.train(usual)
    before = undula.Adapter.load(usual.out)
    report = undula.train(Run.load(usual.out), resume=True)
    after = undula.Adapter.load(usual.out)
    assert (report["steps"], report["resumed_from_step"], report["state"]) == (12, 12, "done")
    assert [t.tolist() for t in before.parameters()] == [t.tolist() for t in after.parameters()]
    assert before.methods == after.methods


# Resuming


@pytest.mark.parametrize("part", ["training rows", "model", "the adapter in"])
def test_a_resume_notices_what_has_changed(part, usual, tmp_path):
    """`before` would be of the old rows, `after` of the new ones."""
    import shutil

    folder = shutil.copytree(usual.model, tmp_path / "model")
    data = Path(shutil.copy(usual.data, tmp_path / "rows.jsonl"))
    run, place = dataclasses.replace(usual, model=str(folder), data=str(data)), tmp_path / "earlier"
    earlier = prepare(run).adapter
    if part == "the adapter in":
        earlier.save(place)
        run = dataclasses.replace(run, penalty=OrthogonalToEarlier(earlier=(str(place),)))

    class Fall(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise MemoryError

    with pytest.raises(MemoryError):
        undula.train(run, callbacks=(Fall(),))
    if part == "the adapter in":
        earlier.map(lambda f: {name: t + 1 for name, t in f.items()}).save(place)
    elif part == "model":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 7}))
    else:
        lines = data.read_text().splitlines()
        data.write_text("\n".join([*lines[1:], lines[0].replace("good", "nice"), *lines[:1]]))
    with pytest.raises(ValueError, match=rf"{part}.*not what the run .* began with"):
        undula.train(Run.load(run.out), resume=True)


# Clipping, schedules, accumulation


class Seen(TrainerCallback):
    def __init__(self):
        self.rates, self.norms = [], []

    def on_pre_optimizer_step(self, args, state, control, **found):
        groups = found["optimizer"].param_groups
        self.rates.append(groups[0]["lr"])
        grads = [p.grad.flatten() for g in groups for p in g["params"] if p.grad is not None]
        self.norms.append(float(torch.cat(grads).norm()))


@pytest.mark.parametrize("most", [1e-3, None, 0.0])
@pytest.mark.parametrize("name", [None, "Budget"])
def test_clipping_is_a_choice(most, name, usual):
    """With an allocator too, which sees the gradients before."""
    method, how = (LORA, None) if name is None else COURSES[name]
    seen = Seen()
    where = ("query", "value")
    undula.train(
        dataclasses.replace(usual, method=method, allocator=how, max_grad_norm=most, where=where), callbacks=(seen,)
    )
    assert Run.load(usual.out).max_grad_norm == (most or 0.0)
    assert max(seen.norms) <= 1.001e-3 if most else min(seen.norms) > 1e-2


@pytest.mark.parametrize("schedule", [None, Linear(), Cosine(), Constant(), ranks.relora.Jagged(cycles=2)], ids=repr)
def test_schedules(schedule, usual):
    """What the optimiser has at each step, and that run.json brings it back."""
    seen = Seen()
    run = dataclasses.replace(usual, schedule=schedule, max_steps=10, warmup=0.2)
    undula.train(run, callbacks=(seen,))
    factor = (schedule or Linear()).multiplier(10, 2)
    assert seen.rates == pytest.approx([run.lr * factor(step) for step in range(10)])
    assert Run.load(run.out).rates() == (schedule or Linear())


def test_relora_brings_its_own_schedule(usual):
    """Without a re-warm-up a restart meets the full rate: Lialin et al. 2023, section 3."""
    seen = Seen()
    run = dataclasses.replace(usual, allocator=ranks.ReLoRA(cycles=3), max_steps=12, warmup=0.5)
    undula.train(run, callbacks=(seen,))
    assert [i for i, rate in enumerate(seen.rates) if rate == 0] == [0, 4, 8]
    plain = dataclasses.replace(run, schedule=Constant())
    assert plain.rates() == Constant()
    assert "schedule" in run.encode()
    assert "schedule" not in usual.encode()  # old runs are what they were
    assert "max_grad_norm" not in usual.encode()


def test_a_short_last_batch_counts_by_its_rows(bert, reviews, tmp_path):
    """Ten rows at once are ten rows as 4 + 4 + 2: the loss of a head is a mean over rows, not over batches."""
    config = BertConfig.from_pretrained(bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    from transformers import AutoModel

    AutoModel.from_pretrained(bert, config=config).save_pretrained(tmp_path / "still")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "still")
    found = []
    for batch, accumulate in ((10, 1), (4, 3)):
        out = tmp_path / str(batch)
        run = Run(model=str(tmp_path / "still"), data=reviews, task=Classification(), method=LORA, out=out, lr=1e-2,
                  where=("query",), train_rows=10, epochs=3, batch=batch, accumulate=accumulate,
                  dtype=torch.float64, max_grad_norm=None)  # fmt: skip
        undula.train(run)
        found.append(undula.Adapter.load(out))
    for ours, theirs in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# The best checkpoint, and checkpoints elsewhere, under a Trainer of one's own


def tokens(n, seed):
    rows = torch.randint(3, 40, (n, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in rows]


def plain(name, out, clip=None, checkpoint=None, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40, bos_token_id=None, eos_token_id=2))
    method, how = COURSES[name]
    undula.attach(model, method, ("q_proj", "v_proj"))
    quality = (lambda: 0.0) if how.needs_quality else None
    args = TrainingArguments(str(out), max_steps=12, learning_rate=0.3, per_device_train_batch_size=4, save_steps=3,
                             eval_steps=3, report_to="none", use_cpu=True, disable_tqdm=True,
                             lr_scheduler_type="constant", **options)  # fmt: skip
    callback = undula.allocating(how, quality, clip=clip, checkpoint=checkpoint)
    made = Trainer(model, args, train_dataset=tokens(30, 1), eval_dataset=tokens(12, 2), callbacks=[callback])
    return made


@pytest.mark.parametrize("name", COURSES)
def test_the_best_model_comes_back_as_it_was_measured(name, tmp_path):
    """Methods, pasts, gates and ties of the best checkpoint, whatever has happened since; nothing is finished on it."""
    worst = name in ("ALoRA", "SRLoRA")  # taken for the best there, so that it is not the last
    made = plain(name, tmp_path, eval_strategy="steps", load_best_model_at_end=True, greater_is_better=worst,
                 metric_for_best_model="eval_loss")  # fmt: skip
    made.train()
    assert not made.state.best_model_checkpoint.endswith("-12")
    assert made.evaluate()["eval_loss"] == pytest.approx(made.state.best_metric, rel=1e-5)


@pytest.mark.parametrize("name", ["AdaLoRA", "ReLoRA"])
def test_a_checkpoint_elsewhere_brings_its_own_allocator(name, tmp_path):
    """The Trainer does not tell a callback where it resumes from: another run's state at the same step is not taken."""
    whole = plain(name, tmp_path / "a")
    whole.train()
    other = plain(name, tmp_path / "b")
    other.args.learning_rate = 0.01
    other.train()
    given = str(tmp_path / "a" / "checkpoint-6")
    for folder in ("b", "empty"):
        with pytest.raises(FileNotFoundError, match=r"not there, or another run's.*checkpoint='the/folder"):
            plain(name, tmp_path / folder).train(resume_from_checkpoint=given)
    again = plain(name, tmp_path / "b", checkpoint=given)
    again.train(resume_from_checkpoint=given)
    ours, theirs = (undula.selected(t.model) for t in (again, whole))
    assert [t.tolist() for t in ours.parameters()] == [t.tolist() for t in theirs.parameters()]


def test_scores_are_of_gradients_before_clipping(tmp_path):
    """AdaLoRA's sensitivities are |w dL/dw|, whatever the optimiser is then given."""
    clipped = plain("AdaLoRA", tmp_path / "a", clip=1e-4, max_grad_norm=0.0)
    whole = plain("AdaLoRA", tmp_path / "b", max_grad_norm=0.0)
    found = []
    for made in (clipped, whole):
        made.args.learning_rate = 0.0
        made.train()
        course = next(c for c in made.callback_handler.callbacks if hasattr(c, "course")).course
        found.append(course.mean)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_rows_of_the_quality_are_neither_trained_on_nor_measured(usual, monkeypatch):
    from undula.train import prepared, trainer

    seen = {}
    made = trainer.quality_of

    def noting(model, held):
        seen["aside"] = held.rows["text"][:]
        return made(model, held)

    class Rows(TrainerCallback):
        def on_train_begin(self, args, state, control, **found):
            seen["train"] = found["train_dataloader"].dataset.rows["text"][:]

    monkeypatch.setattr(trainer, "quality_of", noting)
    method, how = COURSES["ALoRA"]
    run = dataclasses.replace(usual, method=method, allocator=how, max_steps=12, where=("query", "value"))
    report = undula.train(run, callbacks=(Rows(),))
    held = prepared.prepare(dataclasses.replace(run, out=run.out)).held.rows["text"][:]
    assert len(seen["aside"]) + len(seen["train"]) + len(held) == 40
    assert report["train_rows"] == len(seen["train"])
